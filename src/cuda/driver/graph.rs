//! A captured graph: what is in it, and its executable form.

use core::any::Any;
use core::cell::Cell;
use core::marker::PhantomData;
use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::path::Path;
use std::sync::Arc;

use super::abi::{EdgeData, Handle, KernelNodeParams, Raw};
use super::api;
use super::context::Context;
use super::stream::{Stream, non_null};
use crate::error::{Error, Result};

/// Something that a graph points at, kept alive by it.
pub type Owner = Arc<dyn Any + Send + Sync>;

/// What a node does (CUgraphNodeType).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NodeKind {
    /// A kernel.
    Kernel,
    /// A copy.
    Memcpy,
    /// A fill.
    Memset,
    /// A function on the host.
    Host,
    /// A nested graph.
    Child,
    /// Nothing: a point of joining.
    Empty,
    /// Waits for an event.
    WaitEvent,
    /// Records an event.
    RecordEvent,
    /// An allocation.
    Alloc,
    /// A free.
    Free,
    /// Any other, by the driver's number.
    Other(u32),
}

impl NodeKind {
    fn from_code(code: u32) -> Self {
        match code {
            0 => Self::Kernel,
            1 => Self::Memcpy,
            2 => Self::Memset,
            3 => Self::Host,
            4 => Self::Child,
            5 => Self::Empty,
            6 => Self::WaitEvent,
            7 => Self::RecordEvent,
            10 => Self::Alloc,
            11 => Self::Free,
            other => Self::Other(other),
        }
    }
}

/// A kernel as the graph holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelNode {
    /// The function's name; `None` where the driver does not tell (before CUDA 12.3).
    pub name: Option<String>,
    /// Blocks, x y z.
    pub grid: [u32; 3],
    /// Threads per block, x y z.
    pub block: [u32; 3],
    /// Dynamic shared memory per block, bytes.
    pub shared_bytes: u32,
}

/// A node of a graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// What it does.
    pub kind: NodeKind,
    /// For a kernel, which one; `None` for other kinds and where the driver does not tell.
    pub kernel: Option<KernelNode>,
}

/// A dependency between two nodes, by their index in [`Graph::nodes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edge {
    /// The node that comes first.
    pub from: usize,
    /// The node that depends on it.
    pub to: usize,
    /// The second may be scheduled before the first has ended. `None` where the driver does not
    /// tell (before CUDA 12.3).
    pub programmatic: Option<bool>,
}

/// A recorded graph. The driver does not lock graphs, so it is not shared between threads.
#[derive(Debug)]
pub struct Graph {
    context: Context,
    handle: Handle,
    not_sync: PhantomData<Cell<()>>,
}

impl Graph {
    /// Owns what a capture returned; `None` for null.
    pub(super) fn own(context: &Context, raw: Raw) -> Option<Self> {
        let handle = Handle::new(raw)?;
        Some(Self { context: context.clone(), handle, not_sync: PhantomData })
    }

    fn raw_nodes(&self) -> Result<Vec<Raw>> {
        self.context.enter()?;
        let mut count = 0;
        // SAFETY: a null list asks for the count; the graph is live.
        let code = unsafe {
            api::cuGraphGetNodes(self.handle.raw(), core::ptr::null_mut(), &raw mut count)
        };
        self.context.check("graph", "cuGraphGetNodes", code)?;
        let mut nodes = vec![core::ptr::null_mut(); count];
        if count == 0 {
            return Ok(nodes);
        }
        // SAFETY: `nodes` has room for `count` entries.
        let code =
            unsafe { api::cuGraphGetNodes(self.handle.raw(), nodes.as_mut_ptr(), &raw mut count) };
        self.context.check("graph", "cuGraphGetNodes", code)?;
        nodes.truncate(count);
        Ok(nodes)
    }

    /// All nodes, in the driver's order.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] when the driver does not answer.
    pub fn nodes(&self) -> Result<Vec<Node>> {
        self.raw_nodes()?.into_iter().map(|node| self.node(node)).collect()
    }

    fn node(&self, node: Raw) -> Result<Node> {
        let mut code_of_kind = 0;
        // SAFETY: the node belongs to this graph; the other is a place to write to.
        let code = unsafe { api::cuGraphNodeGetType(node, &raw mut code_of_kind) };
        self.context.check("graph", "cuGraphNodeGetType", code)?;
        let kind = NodeKind::from_code(code_of_kind);
        let kernel = if kind == NodeKind::Kernel { kernel_node(node) } else { None };
        Ok(Node { kind, kernel })
    }

    /// All dependencies.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] when the driver does not answer.
    pub fn edges(&self) -> Result<Vec<Edge>> {
        let nodes = self.raw_nodes()?;
        let index: HashMap<Raw, usize> = nodes.into_iter().zip(0..).collect();
        let null = core::ptr::null_mut();
        let count = self.query_edges(null, null, core::ptr::null_mut(), 0)?;
        let mut from = vec![core::ptr::null_mut(); count];
        let mut to = from.clone();
        let mut data = vec![EdgeData::default(); count];
        if count > 0 {
            self.query_edges(from.as_mut_ptr(), to.as_mut_ptr(), data.as_mut_ptr(), count)?;
        }
        let place = |node: &Raw| {
            index.get(node).copied().ok_or_else(|| {
                Error::Internal("an edge of a graph names a node outside it".to_owned())
            })
        };
        let told = api::has_edge_data();
        from.iter()
            .zip(&to)
            .zip(&data)
            .map(|((from, to), data)| {
                let programmatic = told.then_some(data.kind == 1);
                Ok(Edge { from: place(from)?, to: place(to)?, programmatic })
            })
            .collect()
    }

    /// Asks for edges, or with null lists for their number. Lists have room for `count` entries.
    fn query_edges(
        &self,
        from: *mut Raw,
        to: *mut Raw,
        data: *mut EdgeData,
        count: usize,
    ) -> Result<usize> {
        self.context.enter()?;
        let mut count = count;
        let graph = self.handle.raw();
        let (call, code) = if api::has_edge_data() {
            // SAFETY: the lists are null or have room for `count` entries.
            let code = unsafe { api::cuGraphGetEdges_v2(graph, from, to, data, &raw mut count) };
            ("cuGraphGetEdges_v2", code)
        } else {
            // SAFETY: as above.
            let code = unsafe { api::cuGraphGetEdges(graph, from, to, &raw mut count) };
            ("cuGraphGetEdges", code)
        };
        self.context.check("graph", call, code)?;
        Ok(count)
    }

    /// Writes what the driver holds as DOT text to `path`, with all parameters.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] when the driver cannot write there; [`Error::Usage`] for a path with NUL.
    pub fn write_dot(&self, path: &Path) -> Result<()> {
        const VERBOSE: u32 = 1;
        self.context.enter()?;
        let c_path = CString::new(path.as_os_str().as_encoded_bytes())
            .map_err(|_| Error::Usage(format!("{}: a NUL byte in the path", path.display())))?;
        // SAFETY: the graph is live; the path is NUL-terminated.
        let code =
            unsafe { api::cuGraphDebugDotPrint(self.handle.raw(), c_path.as_ptr(), VERBOSE) };
        self.context.check(&path.display().to_string(), "cuGraphDebugDotPrint", code)
    }

    /// Makes the executable form; it keeps `owners` (all memory and functions that the kernels
    /// use) alive.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] or [`Error::Driver`] when the driver cannot.
    pub fn instantiate(&self, owners: Vec<Owner>) -> Result<GraphExec> {
        self.context.enter_outside_capture("graph instantiation")?;
        let mut raw = core::ptr::null_mut();
        // SAFETY: `raw` is a place to write to; the graph is live.
        let code = unsafe { api::cuGraphInstantiateWithFlags(&raw mut raw, self.handle.raw(), 0) };
        self.context.check("graph instantiation", "cuGraphInstantiateWithFlags", code)?;
        let handle = non_null("graph instantiation", raw)?;
        Ok(GraphExec { context: self.context.clone(), handle, _owners: owners })
    }
}

/// The parameters of a kernel node; `None` where the driver does not tell.
fn kernel_node(node: Raw) -> Option<KernelNode> {
    let mut params = KernelNodeParams::empty();
    // SAFETY: a live kernel node, and a place to write to.
    let code = unsafe { api::cuGraphKernelNodeGetParams_v2(node, &raw mut params) };
    if code != 0 {
        return None;
    }
    let KernelNodeParams { grid, block, shared_bytes, .. } = params;
    Some(KernelNode { name: kernel_name(&params), grid, block, shared_bytes })
}

fn kernel_name(params: &KernelNodeParams) -> Option<String> {
    let mut text = core::ptr::null();
    let code = if params.function.is_null() {
        // SAFETY: the kernel comes from a live node; `text` is a place to write to.
        unsafe { api::cuKernelGetName(&raw mut text, params.kernel) }
    } else {
        // SAFETY: the function comes from a live node; `text` is a place to write to.
        unsafe { api::cuFuncGetName(&raw mut text, params.function) }
    };
    if code != 0 || text.is_null() {
        return None;
    }
    // SAFETY: NUL-terminated text that lives as long as the function, and is copied now.
    Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.enter_to_free() {
            // SAFETY: owned since the capture, destroyed only here.
            let _ = unsafe { api::cuGraphDestroy(self.handle.raw()) };
        }
    }
}

/// The executable form of a graph, with what it points at.
#[derive(Debug)]
pub struct GraphExec {
    context: Context,
    handle: Handle,
    /// Dropped after the executable: `drop` runs before the fields go.
    _owners: Vec<Owner>,
}

impl GraphExec {
    /// Brings the graph to the device, so that the first launch costs what the others do.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] when the driver refuses.
    pub fn upload(&mut self, stream: &Stream) -> Result<()> {
        self.context.enter_outside_capture("graph upload")?;
        // SAFETY: both are live.
        let code = unsafe { api::cuGraphUpload(self.handle.raw(), stream.raw()) };
        self.context.check("graph upload", "cuGraphUpload", code)
    }

    /// Queues the whole graph on `stream`: one driver call.
    ///
    /// What its kernels may touch was promised where they were launched under capture.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`], fatal when earlier work faulted.
    #[inline]
    pub fn launch(&mut self, stream: &Stream) -> Result<()> {
        self.context.enter_outside_capture("graph launch")?;
        // SAFETY: both are live; `&mut self` keeps other threads out.
        let code = unsafe { api::cuGraphLaunch(self.handle.raw(), stream.raw()) };
        self.context.check("graph launch", "cuGraphLaunch", code)
    }
}

impl Drop for GraphExec {
    fn drop(&mut self) {
        if self.context.enter_to_free() {
            // SAFETY: made in `instantiate`, destroyed only here; a launch in flight completes.
            let _ = unsafe { api::cuGraphExecDestroy(self.handle.raw()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_kind_that_is_not_known_keeps_its_number() {
        assert_eq!(NodeKind::from_code(0), NodeKind::Kernel);
        assert_eq!(NodeKind::from_code(2), NodeKind::Memset);
        assert_eq!(NodeKind::from_code(13), NodeKind::Other(13));
    }
}
