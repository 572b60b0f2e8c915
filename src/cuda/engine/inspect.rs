//! Looking into an engine: its graph as the driver holds it, the clock between its steps, what one
//! of them writes. Errors are those of the driver ([`Error::Driver`]) unless a method says more.
//!
//! [`Error::Driver`]: crate::error::Error::Driver

use super::CudaEngine;
use crate::cuda::captured::Captured;
use crate::cuda::ceiling::{self, ReadCeiling};
use crate::cuda::driver::profiler;
use crate::cuda::eager::{Comparison, Debugger, OnDevice};
use crate::cuda::graph::{CapturedGraph, Census};
use crate::cuda::issue::issue;
use crate::cuda::kernels;
use crate::cuda::stamps::Stamps;
use crate::cuda::step_state::Entry;
use crate::engine::{Outputs, Written};
use crate::error::Result;
use crate::ops::Buf;
use std::sync::Arc;

impl CudaEngine {
    /// What the captured graph holds; `None` when there is none.
    pub fn census(&self) -> Option<Census> {
        self.graph.as_ref().map(CapturedGraph::census)
    }

    /// The captured graph; `None` when the mode is eager.
    pub fn graph(&self) -> Option<&CapturedGraph> {
        self.graph.as_ref()
    }

    /// Contents of a workspace buffer after the last step, `[elements]`.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`](crate::error::Error::Internal) for a buffer that no step names.
    pub fn buffer(&mut self, buf: Buf) -> Result<Vec<f32>> {
        self.plan.buffer(&self.stream, buf)
    }

    /// Fills the workspace with `byte` between two steps: no result may depend on it.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`](crate::error::Error::Driver).
    pub fn poison(&mut self, byte: u8) -> Result<()> {
        self.plan.poison(&self.stream, byte)
    }

    /// As [`BoundPlan::check_red_zones`](crate::cuda::BoundPlan::check_red_zones), between two steps.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn check_red_zones(&self) -> Result<()> {
        self.plan.check_red_zones(&self.stream)
    }

    /// Readings of the clock in the last token, `[steps][blocks][8]`; empty unless asked for.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`](crate::error::Error::Driver).
    pub fn trace(&self) -> Result<Vec<u32>> {
        self.plan.trace(&self.stream)
    }

    /// What `DebugLevel::Compare` found so far.
    pub fn comparisons(&self) -> &[Comparison] {
        self.debug.as_ref().map_or(&[], Debugger::comparisons)
    }

    /// Measures the read ceiling of the engine's device, with memory of its own.
    ///
    /// # Errors
    ///
    /// Those of [`ceiling::measure`].
    pub fn measure_ceiling(&self) -> Result<ReadCeiling> {
        ceiling::measure(self.context.device(), &kernels::ptx)
    }

    /// What the driver holds of the captured graph, held against the plan; `None` when there is none.
    ///
    /// # Errors
    ///
    /// [`Error::Verification`](crate::error::Error::Verification) when the two differ.
    pub fn captured(&self) -> Result<Option<Captured>> {
        self.graph.as_ref().map(|graph| Captured::of(graph, &self.plan)).transpose()
    }

    /// The clock before the first step and at the end of each, `[tokens][steps + 1]` nanoseconds, of
    /// the last `tokens` tokens, oldest first; empty unless asked for.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`](crate::error::Error::Driver).
    pub fn stamps(&self, tokens: u32) -> Result<Vec<u64>> {
        let read = |s: &Arc<Stamps>| s.read(&self.stream, self.launched, tokens);
        self.stamps.as_ref().map_or(Ok(Vec::new()), read)
    }

    /// As `Engine::outputs`; issued launch by launch.
    ///
    /// # Errors
    ///
    /// [`Error::Decode`](crate::error::Error::Decode) for a step that computes nothing.
    pub fn outputs(&mut self, position: u32, token: u32, step: usize) -> Result<Vec<Written>> {
        self.stale = true;
        self.go_to(position, token)?;
        self.launched = self.launched.wrapping_add(1);
        let (plan, stream) = (&self.plan, &self.stream);
        let mut written = Vec::new();
        let mut look = |i: usize| {
            let Some(here) = plan.plan().steps.get(i).filter(|_| i == step) else { return Ok(()) };
            stream.synchronize()?;
            written = OnDevice { plan, stream }.all(plan.plan(), here, position)?;
            Ok(())
        };
        issue(plan, stream, Some(&mut look))?;
        match self.answer()? {
            Entry::Refused(s) if !s.is_only_non_finite() => {
                Err(s.error(position, self.plan.plan().vocab))
            }
            // What the steps wrote is there, finite or not.
            Entry::Chosen { .. } | Entry::Refused(_) => Ok(written),
        }
    }

    /// As `Engine::profiler_range`.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`](crate::error::Error::Driver).
    pub fn profiler_range(&mut self, open: bool) -> Result<()> {
        // What is in flight belongs to one side.
        self.stream.synchronize()?;
        if open { profiler::start(&self.context) } else { profiler::stop(&self.context) }
    }
}
