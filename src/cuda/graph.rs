//! A token's steps captured once as a CUDA graph: checked against the plan, replayed by one
//! driver call.

use super::bind::BoundPlan;
use super::driver::{Edge, Graph, GraphExec, Node, NodeKind, Owner, Stream, nvtx};
use super::issue::issue;
use super::stamps::Stamps;
use crate::error::{Error, Result};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What the capture must hold at one place of the chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Label of the step.
    pub label: String,
    /// Kernel.
    pub kernel: String,
    /// Blocks.
    pub grid: u32,
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block, bytes.
    pub shared_bytes: u32,
    /// Whether the edge to it is programmatic; the first has none.
    pub programmatic: bool,
}

/// What a capture was found to hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Kernel nodes.
    pub nodes: usize,
    /// Edges; one less than nodes.
    pub edges: usize,
    /// Programmatic edges; `None` where the driver does not tell.
    pub programmatic: Option<usize>,
    /// Nodes whose kernel the driver named.
    pub named: usize,
}

/// Compares a captured graph with the steps that were to be captured: only kernels, one chain in
/// the plan's order, each with its kernel and geometry, each edge of its kind.
///
/// # Errors
///
/// [`Error::Verification`] with the label of the first step that is not as planned.
pub fn compare(nodes: &[Node], edges: &[Edge], expected: &[Expected]) -> Result<Census> {
    let chain = chain(nodes, edges)?;
    let mut census = Census { edges: edges.len(), programmatic: Some(0), ..Census::default() };
    let walked = expected
        .iter()
        .enumerate()
        .try_for_each(|(i, e)| check_step(nodes, chain.get(i), e, &mut census));
    if nodes.len() == expected.len() {
        return walked.map(|()| census);
    }
    let first = match walked {
        Err(Error::Verification(what)) => what.replace("captured graph: ", ""),
        Err(other) => return Err(other),
        Ok(()) => "all steps, and nodes beyond them".to_owned(),
    };
    differs(format!("{} nodes for {} steps; {first}", nodes.len(), expected.len()))
}

fn differs<T>(what: String) -> Result<T> {
    Err(Error::Verification(format!("captured graph: {what}")))
}

/// A node of a chain, by its index, and the edge to it.
pub(super) type Link = (usize, Option<Edge>);

/// The nodes from the first to the last, each with the edge to it.
///
/// # Errors
///
/// [`Error::Verification`] when they are no chain.
pub(super) fn chain(nodes: &[Node], edges: &[Edge]) -> Result<Vec<Link>> {
    if edges.len() + 1 != nodes.len().max(1) {
        return differs(format!("{} edges between {} nodes", edges.len(), nodes.len()));
    }
    let mut next: Vec<Option<Edge>> = vec![None; nodes.len()];
    let mut is_first = vec![true; nodes.len()];
    for edge in edges {
        let (Some(out), Some(first)) = (next.get_mut(edge.from), is_first.get_mut(edge.to)) else {
            return differs(format!("an edge from {} to {}", edge.from, edge.to));
        };
        if out.replace(*edge).is_some() || !std::mem::replace(first, false) {
            return differs(format!("node {} or {} has several neighbours", edge.from, edge.to));
        }
    }
    let mut chain = Vec::with_capacity(nodes.len());
    let mut link = is_first.iter().position(|first| *first).map(|i| (i, None));
    while let Some((i, _)) = link {
        chain.extend(link);
        link = next[i].map(|edge| (edge.to, Some(edge)));
    }
    Ok(chain)
}

/// Holds one place of the chain to the step that it should be, and counts it.
fn check_step(
    nodes: &[Node],
    link: Option<&Link>,
    e: &Expected,
    census: &mut Census,
) -> Result<()> {
    let Some((i, incoming)) = link else {
        return differs(format!("{}: the chain ends before it", e.label));
    };
    check_node(&nodes[*i], e, census)?;
    census.nodes += 1;
    match incoming.map(|edge| edge.programmatic) {
        Some(Some(p)) if p != e.programmatic => {
            return differs(format!(
                "{}: programmatic is {p}, planned is {}",
                e.label, e.programmatic
            ));
        }
        Some(Some(p)) => census.programmatic = census.programmatic.map(|n| n + usize::from(p)),
        Some(None) => census.programmatic = None,
        None => {}
    }
    Ok(())
}

fn check_node(node: &Node, e: &Expected, census: &mut Census) -> Result<()> {
    let bug = |what: String| differs(format!("{}: {what}", e.label));
    if node.kind != NodeKind::Kernel {
        return bug(format!("a {:?} node", node.kind));
    }
    let Some(kernel) = &node.kernel else { return Ok(()) };
    if let Some(name) = kernel.name.as_ref().filter(|name| **name != e.kernel) {
        return bug(format!("kernel {name}, planned {}", e.kernel));
    }
    let geometry = (kernel.grid, kernel.block, kernel.shared_bytes);
    let planned = ([e.grid, 1, 1], [e.block, 1, 1], e.shared_bytes);
    if geometry != planned {
        return bug(format!("grid, block, shared {geometry:?}, planned {planned:?}"));
    }
    census.named += usize::from(kernel.name.is_some());
    Ok(())
}

/// What `plan` expects of its capture.
pub(super) fn expected(plan: &BoundPlan) -> Vec<Expected> {
    let of = |(i, launch): (usize, &crate::ops::Launch)| Expected {
        label: plan.label(i).to_owned(),
        kernel: launch.kernel.clone(),
        grid: launch.grid,
        block: launch.block,
        shared_bytes: launch.shared_bytes,
        programmatic: plan.programmatic(i),
    };
    match plan.token() {
        Some((launch, _)) => vec![Expected { label: "token".to_owned(), ..of((0, launch)) }],
        None => plan.launches().iter().enumerate().map(of).collect(),
    }
}

/// One token as an executable graph; owns, by reference count, all memory that it points at.
#[derive(Debug)]
pub struct CapturedGraph {
    exec: GraphExec,
    graph: Graph,
    census: Census,
    time: Duration,
}

impl CapturedGraph {
    /// Captures the steps of `plan` on `stream`, checks what the driver holds against them,
    /// instantiates it and brings it to the device.
    ///
    /// # Errors
    ///
    /// [`Error::Verification`] when the capture is not the plan; [`Error::Driver`].
    pub fn capture(plan: &Arc<BoundPlan>, stream: &Stream) -> Result<Self> {
        let record = || issue(plan, stream, None);
        Self::captured(stream, record, &expected(plan), vec![plan.clone()])
    }

    /// As [`Self::capture`], with a stamp before the first step and after each.
    ///
    /// # Errors
    ///
    /// As there.
    pub(super) fn capture_stamped(
        plan: &Arc<BoundPlan>,
        stream: &Stream,
        stamps: &Arc<Stamps>,
    ) -> Result<Self> {
        let record = || {
            stamps.put(stream, 0)?;
            issue(plan, stream, Some(&mut |step| stamps.put(stream, step + 1)))
        };
        let owners: Vec<Owner> = vec![plan.clone(), stamps.clone()];
        Self::captured(stream, record, &stamps.between(expected(plan)), owners)
    }

    /// As [`Self::capture`], with a stamp before the first step and one behind the last.
    ///
    /// # Errors
    ///
    /// As there.
    pub(super) fn capture_between(
        plan: &Arc<BoundPlan>,
        stream: &Stream,
        ends: &Arc<Stamps>,
    ) -> Result<Self> {
        let record = || {
            ends.put(stream, 0)?;
            issue(plan, stream, None)?;
            ends.put(stream, 1)
        };
        let owners: Vec<Owner> = vec![plan.clone(), ends.clone()];
        Self::captured(stream, record, &ends.between(expected(plan)), owners)
    }

    fn captured(
        stream: &Stream,
        record: impl FnOnce() -> Result<()>,
        expected: &[Expected],
        owners: Vec<Owner>,
    ) -> Result<Self> {
        let _range = nvtx::range(c"capture");
        let start = Instant::now();
        let graph = stream.capture(record)?;
        let census = compare(&graph.nodes()?, &graph.edges()?, expected)?;
        let mut exec = graph.instantiate(owners)?;
        exec.upload(stream)?;
        stream.synchronize()?;
        Ok(Self { exec, graph, census, time: start.elapsed() })
    }

    /// What the capture holds.
    pub fn census(&self) -> Census {
        self.census
    }

    /// Time of capture, check, instantiation and upload.
    pub fn time(&self) -> Duration {
        self.time
    }

    /// Queues one token on `stream`: one driver call.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`], fatal when an earlier token faulted.
    #[inline]
    pub fn replay(&mut self, stream: &Stream) -> Result<()> {
        self.exec.launch(stream)
    }

    /// Nodes and edges as the driver holds them.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`].
    pub(super) fn holds(&self) -> Result<(Vec<Node>, Vec<Edge>)> {
        Ok((self.graph.nodes()?, self.graph.edges()?))
    }

    /// Writes what the driver holds as DOT text.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] when the driver cannot write there.
    pub fn write_dot(&self, path: &Path) -> Result<()> {
        self.graph.write_dot(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::driver::KernelNode;

    fn expected() -> Vec<Expected> {
        (0..4u32)
            .map(|i| Expected {
                label: format!("step {i}"),
                kernel: format!("kernel_{i}"),
                grid: i + 1,
                block: 32,
                shared_bytes: 16 * i,
                programmatic: i != 2 && i > 0,
            })
            .collect()
    }

    /// The chain of `expected`, in the driver's order `order`.
    fn captured(order: [usize; 4]) -> (Vec<Node>, Vec<Edge>) {
        let expected = expected();
        let mut nodes = vec![Node { kind: NodeKind::Kernel, kernel: None }; 4];
        for (step, place) in order.into_iter().enumerate() {
            let e = &expected[step];
            nodes[place].kernel = Some(KernelNode {
                name: Some(e.kernel.clone()),
                grid: [e.grid, 1, 1],
                block: [e.block, 1, 1],
                shared_bytes: e.shared_bytes,
            });
        }
        let edge = |i: usize| Edge {
            from: order[i - 1],
            to: order[i],
            programmatic: Some(expected[i].programmatic),
        };
        (nodes, vec![edge(3), edge(1), edge(2)])
    }

    fn refusal(nodes: &[Node], edges: &[Edge]) -> String {
        compare(nodes, edges, &expected()).unwrap_err().to_string()
    }

    #[test]
    fn the_planned_chain_is_accepted_in_whatever_order_the_driver_lists_it() {
        for order in [[0, 1, 2, 3], [3, 1, 0, 2]] {
            let (nodes, edges) = captured(order);
            let census = compare(&nodes, &edges, &expected()).unwrap();
            let all = Census { nodes: 4, edges: 3, programmatic: Some(2), named: 4 };
            assert_eq!(census, all);
        }
        assert!(compare(&[], &[], &[]).is_ok());
    }

    #[test]
    fn a_driver_that_does_not_tell_names_or_edge_kinds_is_believed() {
        let (mut nodes, mut edges) = captured([0, 1, 2, 3]);
        nodes[1].kernel = None;
        edges[0].programmatic = None;
        let census = compare(&nodes, &edges, &expected()).unwrap();
        assert_eq!((census.named, census.programmatic), (3, None));
    }

    #[test]
    fn another_node_kernel_geometry_or_edge_is_refused_with_the_steps_label() {
        let (good, edges) = captured([0, 1, 2, 3]);
        let (short, last) = (&good[..3], "3 nodes for 4 steps; step 3: the chain ends before it");
        assert!(refusal(short, &edges[1..]).contains(last));
        let without = [&good[..1], &good[2..]].concat();
        let first = "3 nodes for 4 steps; step 1: kernel kernel_2, planned kernel_1";
        assert!(refusal(&without, &captured([0, 1, 2, 3]).1[1..]).contains(first));
        assert!(refusal(&good, &edges[..2]).contains("2 edges between 4 nodes"));

        let mut nodes = good.clone();
        nodes[2].kind = NodeKind::Memset;
        assert!(refusal(&nodes, &edges).contains("step 2: a Memset node"));
        let mut nodes = good.clone();
        nodes.swap(1, 3);
        assert!(refusal(&nodes, &edges).contains("step 1: kernel kernel_3, planned kernel_1"));
        let mut nodes = good.clone();
        if let Some(kernel) = &mut nodes[1].kernel {
            kernel.grid = [2, 2, 1];
        }
        assert!(refusal(&nodes, &edges).contains("step 1: grid, block, shared"));
        let mut nodes = good.clone();
        if let Some(kernel) = &mut nodes[3].kernel {
            kernel.name = Some("other".into());
        }
        assert!(refusal(&nodes, &edges).contains("step 3: kernel other, planned kernel_3"));

        for (i, step) in [(0, 3), (2, 2)] {
            let mut edges = edges.clone();
            edges[i].programmatic = edges[i].programmatic.map(|p| !p);
            assert!(refusal(&good, &edges).contains(&format!("step {step}: programmatic is")));
        }
        let mut fork = edges.clone();
        fork[0].from = 0;
        assert!(refusal(&good, &fork).contains("several neighbours"));
        let mut outside = edges.clone();
        outside[0].to = 9;
        assert!(refusal(&good, &outside).contains("from 2 to 9"));
        let mut cycle = edges;
        cycle[1] = Edge { from: 3, to: 2, programmatic: Some(true) };
        assert!(compare(&good, &cycle, &expected()).is_err());
    }
}
