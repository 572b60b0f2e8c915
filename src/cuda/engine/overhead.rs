//! What a token costs beside its kernels: the host's thread, and the way from one graph to the next.
//!
//! ```text
//! host_us      (wall time of the run − time polled for a token that is not there yet) / tokens
//! relaunch_us  median of: stamp at the begin of token t + 1 − stamp at the end of token t
//! ```
//!
//! Both are of runs of their own, so that nothing that is measured elsewhere pays for them. The second
//! one replays a graph that holds the same launches between two stamps of one warp, each behind a full
//! edge: between the stamps of two graphs lies what lies between the plain graphs, the end of the
//! one and the start of the other.

use super::CudaEngine;
use crate::cuda::graph::CapturedGraph;
use crate::cuda::kernels;
use crate::cuda::stamps::Stamps;
use crate::engine::Overhead;
use crate::error::Result;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

impl CudaEngine {
    /// As `Engine::overhead`; nothing is counted in [`Self::stats`].
    ///
    /// # Errors
    ///
    /// Those of a run and of a capture.
    pub fn overhead(&mut self, position: u32, token: u32, tokens: u32) -> Result<Option<Overhead>> {
        if self.debug.is_some() {
            return Ok(None);
        }
        self.waited = Some(Duration::ZERO);
        let run = self.timed(position, token, tokens);
        let waited = self.waited.take().unwrap_or_default();
        let host_us = run?.saturating_sub(waited).as_secs_f64() * 1e6 / f64::from(tokens.max(1));
        let relaunch_us = match self.graph {
            Some(_) => self.relaunch_us(position, token, tokens)?,
            None => None,
        };
        Ok(Some(Overhead { tokens, host_us, relaunch_us }))
    }

    /// Wall time of `tokens` steps.
    fn timed(&mut self, position: u32, token: u32, tokens: u32) -> Result<Duration> {
        self.seek(position)?;
        self.force(position, &[token])?;
        self.settle()?;
        let start = Instant::now();
        self.run_steps(tokens, &mut |_| ControlFlow::Continue(()))?;
        Ok(start.elapsed())
    }

    fn relaunch_us(&mut self, position: u32, token: u32, tokens: u32) -> Result<Option<f64>> {
        // Nothing is in flight, and the plain graph's memory stays: room for stamps may be made.
        self.frozen = None;
        let ends = Stamps::at_ends(&self.context, &self.plan, &kernels::ptx).map(Arc::new);
        self.frozen = Some(self.context.freeze());
        let ends = ends?;
        let between = CapturedGraph::capture_between(&self.plan, &self.stream, &ends)?;
        let plain = self.graph.replace(between);
        let run = self.timed(position, token, tokens);
        let idle = self.stream.synchronize();
        self.graph = plain;
        run.and(idle)?;
        let stamps = ends.read(&self.stream, self.launched, tokens)?;
        // Begin and end of each token in turn.
        let gaps = stamps.get(1..).unwrap_or_default().chunks_exact(2);
        let mut gaps: Vec<u64> = gaps.map(|w| w[1].saturating_sub(w[0])).collect();
        gaps.sort_unstable();
        Ok(gaps.get(gaps.len() / 2).map(|ns| *ns as f64 / 1e3))
    }
}
