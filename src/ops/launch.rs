//! A kernel launch as plain data, so that geometry and arguments are tested without a GPU.

use super::{Buf, WeightId};

/// What geometry depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Streaming multiprocessors.
    pub sms: u32,
    /// Compute capability, `(major, minor)`.
    pub compute: (u32, u32),
    /// Shared memory that one block may ask for, bytes.
    pub shared_per_block: u32,
}

impl Gpu {
    /// An H200 (or H100 SXM): what golden listings and tests are made for.
    pub const H200: Self = Self { sms: 132, compute: (9, 0), shared_per_block: 232_448 };

    /// Whether programmatic dependent launch and bulk copies exist.
    pub fn is_hopper_or_later(&self) -> bool {
        self.compute.0 >= 9
    }
}

/// One kernel argument. Anything that changes per token is reached through [`Arg::Step`], never
/// passed by value: a captured graph freezes values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    /// Device address of a workspace buffer.
    Buf(Buf),
    /// Device address of a weight.
    Weight(WeightId),
    /// A null pointer where a kernel's operand is optional.
    Null,
    /// Device address of the `StepState`.
    Step,
    /// Device address of what has the layout of a `StepState` and is zero: position 0 for what stands
    /// in the place of a cache and is none.
    Zeros,
    /// Device address of the forced tokens, `[capacity]` u32.
    Forced,
    /// Device address of the mapped token ring.
    Ring,
    /// Device address of a layer's keys.
    Keys(u32),
    /// Device address of a layer's values.
    Values(u32),
    /// Device address of the arrival counters: zero before and after every kernel that uses them.
    Counters,
    /// Device address of the persistent kernel's instructions.
    Program,
    /// Device address of its trace; null unless it is profiled.
    Trace,
    /// A count or size fixed for the life of the plan.
    U32(u32),
    /// A constant fixed for the life of the plan.
    F32(f32),
}

/// A kernel launch.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// PTX module that holds the kernel, for example `gemv_q4_k`.
    pub module: String,
    /// Entry point, for example `down_q4_k`: what a profiler shows.
    pub kernel: String,
    /// Blocks.
    pub grid: u32,
    /// Threads of a block.
    pub block: u32,
    /// Blocks of a cluster; 1 where clusters are not used.
    pub cluster: u32,
    /// Dynamic shared memory of a block, bytes.
    pub shared_bytes: u32,
    /// Whether it may start before its predecessor ends: the kernel executes
    /// `griddepcontrol.wait` before it touches anything that another kernel writes.
    pub programmatic: bool,
    /// Arguments in the order of the kernel's parameters.
    pub args: Vec<Arg>,
}
