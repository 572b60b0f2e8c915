//! A token's time, step by step, in the graph itself: a kernel between every two steps that notes
//! the clock.
//!
//! ```text
//! stamp 0 ─ step 0 ─ stamp 1 ─ step 1 ─ … ─ step n−1 ─ stamp n          a graph, replayed as ever
//! stamps [ROWS, n + 1]    row: the token's number modulo ROWS;  nanoseconds
//! ```
//!
//! A stamp lets its successor start at once and waits itself, so that a step still fetches its
//! weights while the one before drains. What it costs is its own way through the chain, about the
//! same at every step: the difference to a plain replay, shared out, takes it off again.

use super::bind::{BoundPlan, KernelSource};
use super::driver::{Context, DeviceMemory, Module, Stream};
use super::graph::Expected;
use super::issue::{BoundStep, issue_one};
use super::kernels::{PROGRAMMATIC_COMPUTE, ParamType, entry_parameters};
use super::modules::prepare;
use crate::error::{Error, Result};

/// Module and entry of the kernel.
const STAMP: &str = "stamp";
/// Threads of its one block.
const BLOCK: u32 = 32;
/// Tokens whose stamps are kept.
pub(super) const ROWS: u32 = 1024;

/// What the kernel takes: step state, stamps, slot, slots, rows, behind.
const PARAMETERS: [ParamType; 6] = {
    use ParamType::{U32, U64};
    [U64, U64, U32, U32, U32, U32]
};

/// The stamps of a plan's steps.
#[derive(Debug)]
pub(super) struct Stamps {
    memory: DeviceMemory,
    launches: Vec<BoundStep>,
}

impl Stamps {
    /// Between the steps of `plan`, and at its ends.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`]; [`Error::Driver`].
    pub(super) fn new(
        context: &Context,
        plan: &BoundPlan,
        kernels: KernelSource<'_>,
    ) -> Result<Self> {
        Self::spaced(context, plan, kernels, plan.bound().len(), true)
    }

    /// At the ends of `plan` only, both behind full edges: whatever the plan is issued as.
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    pub(super) fn at_ends(
        context: &Context,
        plan: &BoundPlan,
        kernels: KernelSource<'_>,
    ) -> Result<Self> {
        Self::spaced(context, plan, kernels, 1, false)
    }

    /// `gaps + 1` stamps; between two of them is a step each, or all of them.
    fn spaced(
        context: &Context,
        plan: &BoundPlan,
        kernels: KernelSource<'_>,
        gaps: usize,
        programmatic: bool,
    ) -> Result<Self> {
        let compute = plan.gpu().compute;
        let text = kernels(STAMP, compute)
            .ok_or_else(|| Error::NoDevice(format!("no kernels for compute {compute:?}")))?;
        if entry_parameters(text, STAMP).as_deref() != Some(&PARAMETERS) {
            return Err(Error::Internal(format!("{STAMP} takes other parameters")));
        }
        let function = Module::load(context, STAMP, text)?.function(STAMP)?;
        prepare(&function, 0)?;
        let slots = gaps as u64 + 1;
        let memory = DeviceMemory::alloc(context, "stamps", 8 * slots * u64::from(ROWS))?;
        let launch = |slot: usize| {
            let behind = u64::from(slot == gaps);
            let args = [plan.state_address(), memory.address(), slot as u64, slots];
            BoundStep {
                function: function.clone(),
                grid: 1,
                block: BLOCK,
                cluster: 1,
                shared_bytes: 0,
                // The first one follows the token before.
                programmatic: programmatic && slot > 0 && compute >= PROGRAMMATIC_COMPUTE,
                cooperative: false,
                args: args.into_iter().chain([u64::from(ROWS), behind]).collect(),
            }
        };
        let launches = (0..=gaps).map(launch).collect();
        Ok(Self { memory, launches })
    }

    /// Puts stamp `slot` on `stream`.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`].
    pub(super) fn put(&self, stream: &Stream, slot: usize) -> Result<()> {
        let launch = self.launches.get(slot);
        let launch = launch.ok_or_else(|| Error::Internal(format!("there is no stamp {slot}")))?;
        issue_one(launch, stream).map_err(|e| e.at(STAMP))
    }

    /// What a capture must hold: `steps`, with the stamps before, between and behind them.
    pub(super) fn between(&self, steps: Vec<Expected>) -> Vec<Expected> {
        let in_a_gap = steps.len() / (self.launches.len() - 1);
        let mut steps = steps.into_iter();
        let mut all = Vec::new();
        for (slot, launch) in self.launches.iter().enumerate() {
            all.push(Expected {
                label: format!("{STAMP} {slot}"),
                kernel: STAMP.to_owned(),
                grid: launch.grid,
                block: launch.block,
                shared_bytes: launch.shared_bytes,
                programmatic: launch.programmatic,
            });
            all.extend(steps.by_ref().take(in_a_gap));
        }
        all
    }

    /// The stamps of the `tokens` tokens before number `end`, `[tokens][steps + 1]` nanoseconds,
    /// oldest first; of no more than [`ROWS`].
    ///
    /// # Errors
    ///
    /// [`Error::Driver`].
    pub(super) fn read(&self, stream: &Stream, end: u32, tokens: u32) -> Result<Vec<u64>> {
        let slots = self.launches.len();
        let mut all = vec![0u64; slots * ROWS as usize];
        self.memory.download(stream, 0, &mut all)?;
        let rows = (1..=tokens.min(ROWS)).rev().map(|back| end.wrapping_sub(back) % ROWS);
        Ok(rows.flat_map(|row| &all[row as usize * slots..][..slots]).copied().collect())
    }
}
