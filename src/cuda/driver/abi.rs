//! Structures passed to the driver by address, laid out as cuda.h of CUDA 12.3 and later has them.

use core::ffi::{c_uint, c_void};

/// An opaque driver handle (context, stream, function, graph…), as the driver sees it.
pub type Raw = *mut c_void;

/// A handle that the driver returned, never null.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub(super) struct Handle(core::ptr::NonNull<c_void>);

impl Handle {
    /// `None` for null.
    pub(super) fn new(raw: Raw) -> Option<Self> {
        core::ptr::NonNull::new(raw).map(Self)
    }

    /// The handle as the driver takes it.
    pub(super) fn raw(self) -> Raw {
        self.0.as_ptr()
    }
}

// SAFETY: a handle is a name that is only passed to the driver, never dereferenced here; the
// driver's handles are valid on every thread of the process.
unsafe impl Send for Handle {}
// SAFETY: as above. Objects that the driver does not lock (graphs) take `&mut self` or are not
// Sync in their own types.
unsafe impl Sync for Handle {}

/// CUlaunchAttribute: an id and a 64-byte union.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct LaunchAttribute {
    /// CUlaunchAttributeID.
    pub id: u32,
    /// Padding, zero.
    pub pad: u32,
    /// The union, its first words first.
    pub value: [u64; 8],
}

impl LaunchAttribute {
    /// CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, set.
    pub(super) fn programmatic() -> Self {
        Self::words(6, [1, 0, 0])
    }

    /// CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, in blocks.
    pub(super) fn cluster(blocks: [u32; 3]) -> Self {
        Self::words(4, blocks)
    }

    /// CU_LAUNCH_ATTRIBUTE_COOPERATIVE, set.
    pub(super) fn cooperative() -> Self {
        Self::words(2, [1, 0, 0])
    }

    fn words(id: u32, [x, y, z]: [u32; 3]) -> Self {
        let mut value = [0; 8];
        value[0] = u64::from(x) | u64::from(y) << 32;
        value[1] = u64::from(z);
        Self { id, pad: 0, value }
    }
}

/// CUlaunchConfig.
#[repr(C)]
#[derive(Debug)]
pub struct LaunchConfig {
    /// Blocks, x y z.
    pub grid: [c_uint; 3],
    /// Threads per block, x y z.
    pub block: [c_uint; 3],
    /// Dynamic shared memory per block, bytes.
    pub shared_bytes: c_uint,
    /// CUstream.
    pub stream: Raw,
    /// `attribute_count` attributes.
    pub attributes: *const LaunchAttribute,
    /// Number of attributes.
    pub attribute_count: c_uint,
}

/// CUDA_KERNEL_NODE_PARAMS_v2.
#[repr(C)]
#[derive(Debug)]
pub struct KernelNodeParams {
    /// CUfunction; null when `kernel` is set.
    pub function: Raw,
    /// Blocks, x y z.
    pub grid: [c_uint; 3],
    /// Threads per block, x y z.
    pub block: [c_uint; 3],
    /// Dynamic shared memory per block, bytes.
    pub shared_bytes: c_uint,
    /// One pointer per kernel parameter.
    pub args: *mut *mut c_void,
    /// Parameters as one buffer, or null.
    pub extra: *mut *mut c_void,
    /// CUkernel; null when `function` is set.
    pub kernel: Raw,
    /// CUcontext.
    pub context: Raw,
}

impl KernelNodeParams {
    /// All zero: a place for the driver to write to.
    pub(super) fn empty() -> Self {
        let null = core::ptr::null_mut();
        Self {
            function: null,
            grid: [0; 3],
            block: [0; 3],
            shared_bytes: 0,
            args: core::ptr::null_mut(),
            extra: core::ptr::null_mut(),
            kernel: null,
            context: null,
        }
    }
}

/// CUgraphEdgeData.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct EdgeData {
    /// Port of the upstream node: 0 its end, 1 its programmatic trigger, 2 its launch order.
    pub from_port: u8,
    /// Port of the downstream node.
    pub to_port: u8,
    /// 0 a full dependency, 1 (CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC) programmatic.
    pub kind: u8,
    /// Zero.
    pub reserved: [u8; 5],
}

// On the 64-bit targets that the shim admits.
const _: () = {
    assert!(size_of::<LaunchAttribute>() == 72);
    assert!(core::mem::offset_of!(LaunchAttribute, value) == 8);
    assert!(size_of::<LaunchConfig>() == 56);
    assert!(core::mem::offset_of!(LaunchConfig, stream) == 32);
    assert!(size_of::<KernelNodeParams>() == 72);
    assert!(core::mem::offset_of!(KernelNodeParams, args) == 40);
    assert!(core::mem::offset_of!(KernelNodeParams, kernel) == 56);
    assert!(size_of::<EdgeData>() == 8);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attribute_words_stand_where_the_driver_reads_them() {
        let cluster = LaunchAttribute::cluster([2, 3, 4]);
        assert_eq!((cluster.id, cluster.value[0], cluster.value[1]), (4, 2 | 3 << 32, 4));
        let programmatic = LaunchAttribute::programmatic();
        assert_eq!((programmatic.id, programmatic.value[0]), (6, 1));
    }
}
