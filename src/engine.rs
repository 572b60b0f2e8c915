//! What a session asks of whoever computes, the CPU reference or a CUDA device, and the words that
//! they share.

mod look;
mod seeded;

pub use look::{Look, StepFilter, Written};
pub(crate) use look::{Outputs, row_at, written_cache};
pub(crate) use seeded::{CacheHalf, fill_row, stream};

use crate::error::Result;
use std::io::Write;
use std::ops::ControlFlow;

/// How a device is given its work. The CPU has only one way: its mode is `reference`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// One captured graph, replayed per token.
    #[default]
    Graph,
    /// Launch by launch.
    Eager,
}

/// What is told about each step while it is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DebugLevel {
    /// Nothing.
    #[default]
    Off,
    /// Each step, after a sync.
    Print,
    /// Each step, and how far it is from the reference.
    Compare,
}

/// What computes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Product name.
    pub name: String,
    /// Memory, bytes; 0 where it was not asked for.
    pub total_memory: u64,
    /// Streaming multiprocessors; threads of a CPU.
    pub sms: u32,
    /// Compute capability, `(major, minor)`; `(0, 0)` for a CPU.
    pub compute: (u32, u32),
    /// CUDA version of the driver, 1000 · major + 10 · minor; 0 for a CPU.
    pub driver_version: u32,
    /// Ordinal among the devices that the process may see.
    pub ordinal: u32,
    /// PCI address; empty for a CPU.
    pub pci_bus_id: String,
}

/// Counters of an engine since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EngineStats {
    /// Graphs captured.
    pub captures: u64,
    /// Driver calls made by steps.
    pub driver_calls: u64,
    /// Device allocations after everything was in place: always 0, counted to prove it.
    pub allocations_after_freeze: u64,
    /// Loading of the weights, seconds.
    pub load_seconds: f64,
    /// Compilation of kernels by the driver, seconds.
    pub jit_seconds: f64,
    /// Capture and instantiation, seconds.
    pub capture_seconds: f64,
    /// Memory of the device; `None` on the CPU.
    pub memory: Option<MemoryUse>,
}

/// Device memory of an engine, bytes: planned before anything is allocated, and taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Weights.
    pub weights: u64,
    /// Keys and values of all layers.
    pub kv: u64,
    /// Workspace.
    pub workspace: u64,
    /// Step state, forced tokens, program and mail of the persistent kernel.
    pub other: u64,
    /// What the driver had less of, for all processes, once the engine was made: also code, the
    /// graph, and what allocations are rounded up to.
    pub taken: u64,
}

impl MemoryUse {
    /// Sum of the parts.
    pub fn planned(&self) -> u64 {
        self.weights + self.kv + self.workspace + self.other
    }

    /// (taken − planned) / planned, %.
    pub fn excess_percent(&self) -> f64 {
        100.0 * (self.taken as f64 / self.planned().max(1) as f64 - 1.0)
    }
}

/// What a token costs beside the work of its kernels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Overhead {
    /// Tokens that it was measured on.
    pub tokens: u32,
    /// The issuing thread's time a token, mean, microseconds: launching, reading the ring, the loop;
    /// not the time that it polls for a token that is not there yet.
    pub host_us: f64,
    /// From the end of a token's graph to the begin of the next one's on the device's clock, median,
    /// microseconds; `None` where there is no graph, or no second token.
    pub relaunch_us: Option<f64>,
}

/// A token as it was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Position of the input token.
    pub position: u32,
    /// The token chosen after it.
    pub token: u32,
    /// When it was chosen by the device's clock, nanoseconds; `None` on the CPU.
    pub device_ns: Option<u64>,
}

/// A plan bound to memory, ready to compute positions one after another.
///
/// The session has checked what it passes on: positions are below the capacity, token ids below
/// the vocabulary.
pub(crate) trait Engine {
    /// What it runs on.
    fn info(&self) -> &DeviceInfo;
    /// `cuda` or `cpu`.
    fn backend(&self) -> &'static str;
    /// `graph`, `eager` or `reference`.
    fn mode(&self) -> &'static str;
    /// Counters since it was made.
    fn stats(&self) -> EngineStats;
    /// The next step computes `position`.
    fn seek(&mut self, position: u32) -> Result<()>;
    /// Inputs of `position..`, in place of what was forced before; every other position takes the
    /// token chosen before it.
    fn force(&mut self, position: u32, tokens: &[u32]) -> Result<()>;
    /// Computes `steps` positions; `sink` sees each chosen token once, in order, and may stop.
    /// Gives the steps that count: after a stop the next step computes the position after the
    /// last one that the sink has seen.
    fn run(&mut self, steps: u32, sink: &mut dyn FnMut(Chosen) -> ControlFlow<()>) -> Result<u32>;
    /// Logits of the last step, `[vocab]`.
    fn logits(&mut self) -> Result<Vec<f32>>;
    /// Fills positions `0..positions` of all caches with [`fill_row`]'s values.
    fn fill_cache(&mut self, positions: u32, seed: u64) -> Result<()>;
    /// Keys and values of a layer, `[kv_heads, capacity, head_dim]` each.
    fn cache(&mut self, layer: u32) -> Result<(Vec<f32>, Vec<f32>)>;
    /// Readings of the clock in the last step, `[steps][blocks][8]`; empty where none are kept.
    fn trace(&mut self) -> Result<Vec<u32>>;
    /// Fills the workspace with `byte` between two steps: no result may depend on it.
    fn poison(&mut self, byte: u8) -> Result<()>;
    /// An error where a kernel wrote outside its buffers, if the engine was made to look for it.
    fn check_red_zones(&mut self) -> Result<()>;
    /// The clock before the first step and at the end of each, `[tokens][steps + 1]` nanoseconds, of
    /// the last `tokens` tokens, oldest first; empty where none are kept.
    fn stamps(&mut self, tokens: u32) -> Result<Vec<u64>>;
    /// What `tokens` tokens from `position` on cost beside their kernels; `None` on the CPU, and where
    /// each step is told about. The next step must be sought anew.
    fn overhead(&mut self, position: u32, token: u32, tokens: u32) -> Result<Option<Overhead>>;
    /// Opens or closes the range that profilers record.
    fn profiler_range(&mut self, open: bool) -> Result<()>;
    /// Debug lines are of these steps only, from here on.
    fn look(&mut self, look: Look);
    /// Computes `position` with the input `token`, and gives what step `step` of the plan wrote
    /// there. The next step must be sought anew.
    fn outputs(&mut self, position: u32, token: u32, step: usize) -> Result<Vec<Written>>;
    /// Debug lines go to `out` from here on; the log until then.
    fn debug_to(&mut self, out: Box<dyn Write + Send>);
}
