//! One kernel launch: queued on a stream, or recorded when the stream is capturing.

use core::ffi::c_void;

use super::abi::{LaunchAttribute, LaunchConfig};
use super::api;
use super::module::Function;
use super::stream::Stream;
use crate::error::{Error, Result};

/// Parameters that a kernel may have.
pub const MAX_ARGS: usize = 64;

/// What a launch asks beyond its geometry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Attributes {
    /// The kernel may be scheduled before the one queued before it has ended; it must execute
    /// `griddepcontrol.wait` before it touches anything that kernel writes. Compute capability 9.0.
    pub programmatic: bool,
    /// Blocks of a cluster, x y z. Compute capability 9.0.
    pub cluster: Option<[u32; 3]>,
    /// All blocks run at the same time, or the launch is refused.
    pub cooperative: bool,
}

/// Launches `function` on `stream`: `grid` [blocks, x y z], `block` [threads, x y z],
/// `shared_bytes` of dynamic shared memory a block.
///
/// Each of `args` is one kernel parameter in the low bytes of its slot: the driver reads as many
/// bytes as the parameter is wide.
///
/// # Errors
///
/// [`Error::Driver`] when the driver refuses the geometry or an attribute; [`Error::Internal`]
/// above [`MAX_ARGS`].
///
/// # Safety
///
/// - `args` match the kernel's parameters in number, order and type, none wider than 8 bytes.
/// - Every address among them is valid for what the kernel reads and writes there, and stays so,
///   with the function's module, until the stream has done the work or, when captured, as long as
///   the graph or an executable of it exists.
pub unsafe fn launch(
    stream: &Stream,
    function: &Function,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    args: &mut [u64],
    attributes: Attributes,
) -> Result<()> {
    if args.len() > MAX_ARGS {
        return Err(Error::Internal(format!(
            "{}: {} parameters, at most {MAX_ARGS}",
            function.name(),
            args.len()
        )));
    }
    stream.context().enter()?;
    let mut pointers = [core::ptr::null_mut::<c_void>(); MAX_ARGS];
    for (pointer, arg) in pointers.iter_mut().zip(args) {
        *pointer = core::ptr::from_mut(arg).cast();
    }
    let (call, code) = if attributes == Attributes::default() {
        let [grid_x, grid_y, grid_z] = grid;
        let [block_x, block_y, block_z] = block;
        // SAFETY: the caller vouches for `args`; the driver copies them before it returns.
        let code = unsafe {
            api::cuLaunchKernel(
                function.raw(),
                grid_x,
                grid_y,
                grid_z,
                block_x,
                block_y,
                block_z,
                shared_bytes,
                stream.raw(),
                pointers.as_mut_ptr(),
                core::ptr::null_mut(),
            )
        };
        ("cuLaunchKernel", code)
    } else {
        let (list, count) = attribute_list(attributes);
        let config = LaunchConfig {
            grid,
            block,
            shared_bytes,
            stream: stream.raw(),
            attributes: list.as_ptr(),
            attribute_count: count,
        };
        // SAFETY: as above; `config` and `list` outlive the call.
        let code = unsafe {
            api::cuLaunchKernelEx(
                &raw const config,
                function.raw(),
                pointers.as_mut_ptr(),
                core::ptr::null_mut(),
            )
        };
        ("cuLaunchKernelEx", code)
    };
    stream.context().check(function.name(), call, code)
}

/// The driver's list, and how many of it are set.
fn attribute_list(attributes: Attributes) -> ([LaunchAttribute; 3], u32) {
    let mut list = [LaunchAttribute::programmatic(); 3];
    let set = [
        attributes.programmatic.then(LaunchAttribute::programmatic),
        attributes.cluster.map(LaunchAttribute::cluster),
        attributes.cooperative.then(LaunchAttribute::cooperative),
    ];
    let mut count = 0;
    for (to, attribute) in list.iter_mut().zip(set.into_iter().flatten()) {
        *to = attribute;
        count += 1;
    }
    (list, count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_attributes_asked_for_are_passed() {
        let ids = |programmatic, cluster, cooperative| {
            let (list, count) = attribute_list(Attributes { programmatic, cluster, cooperative });
            list[..count as usize].iter().map(|a| a.id).collect::<Vec<_>>()
        };
        assert_eq!(ids(false, None, false), [0u32; 0]);
        assert_eq!(ids(true, None, false), [6]);
        assert_eq!(ids(false, Some([2, 1, 1]), false), [4]);
        assert_eq!(ids(true, Some([2, 1, 1]), false), [6, 4]);
        assert_eq!(ids(false, None, true), [2]);
        assert_eq!(ids(true, Some([2, 1, 1]), true), [6, 4, 2]);
    }
}
