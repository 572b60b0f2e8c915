//! Where a token's time goes, step by step, inside the graph that computes it.
//!
//! A chain of kernels is captured with a stamp between every two steps (`ptx/stamp.cu`: a kernel of
//! one warp that waits for its predecessor's end and notes the clock; its successor may start before
//! it, as in the plain graph). A step's time is the distance of the stamps around it, less what a
//! stamp costs, and that is what the stamped graph takes longer than the plain one:
//!
//! ```text
//! raw(i)   = stamp(i + 1) − stamp(i)                raw(n) = stamp(0) of the next token − stamp(n)
//! cost     = max(Σ raw − plain replay, 0) / (n + 1) one stamp; n steps
//! time(i)  = max(raw(i) − cost, 0)                  Σ time = the plain replay, where neither max acts
//! ```
//!
//! The persistent kernel notes the clock itself, at a few points of every step in every block. The
//! blocks work on several steps at once, so a step's share of the token is the time from the end of
//! the step before to its own end, each over all blocks:
//!
//! ```text
//! time(i) = max_b end(i, b) − max_b end(i − 1, b)   Σ time = the token, by construction
//! ```
//!
//! What lies between two tokens is then the relaunch gap of the plain graph.
//!
//! The CPU reference notes the clock between its steps, as a graph does.

mod blocks;
mod events;

use crate::error::{Error, Result};
use crate::ops::Gpu;
use crate::plan::{DecodePlan, Step};
use crate::session::DecodeSession;
use std::ops::ControlFlow;

pub use blocks::Cycles;
pub use events::chrome_trace;

/// Seed of the cache contents before the first token.
const CACHE_SEED: u64 = 0x5EED;
/// Tokens of the timeline, at most.
const TIMELINE_TOKENS: usize = 8;

/// One step, mean over the profiled tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepProfile {
    /// Label of the plan.
    pub label: String,
    /// Its kernel; in the persistent kernel and on the CPU the name of its op.
    pub kernel: String,
    /// Its share of the token, microseconds.
    pub time_us: f64,
    /// The same with the cost of a stamp in it.
    pub raw_us: f64,
    /// Bytes that it must read from memory.
    pub bytes: u64,
    /// What the blocks of the persistent kernel did in it.
    pub cycles: Option<Cycles>,
}

/// A step of one token as it was.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// Of the tokens of the timeline.
    pub token: usize,
    /// Of the plan's steps.
    pub step: usize,
    /// After the first span's start, microseconds.
    pub start_us: f64,
    /// Microseconds, with the cost of a stamp in it.
    pub us: f64,
}

/// A token, step by step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    /// In the plan's order.
    pub steps: Vec<StepProfile>,
    /// From the end of a token's last step to the begin of the next token's first, microseconds.
    pub between_us: f64,
    /// Time a token while it is profiled, microseconds.
    pub token_us: f64,
    /// What a stamp was found to cost, microseconds; 0 until [`Self::reconcile`].
    pub stamp_us: f64,
    /// Tokens that the means are over.
    pub tokens: u32,
    /// The last tokens, step by step.
    pub timeline: Vec<Span>,
}

impl Profile {
    /// Profiles `tokens` tokens from position `depth` on of `session`, which keeps readings of the
    /// clock; `first` is the first input. The same tokens are computed once before, so that the
    /// device is awake.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] when the session keeps no readings; [`Error::Verification`] when the clock went
    /// back in all of them; those of [`DecodeSession::decode`].
    pub fn take(session: &mut DecodeSession, first: u32, depth: u32, tokens: u32) -> Result<Self> {
        let run = |session: &mut DecodeSession, n| {
            session.seek(depth, CACHE_SEED)?;
            session.decode(&[first], n, &mut |_| ControlFlow::Continue(())).map(drop)
        };
        run(session, tokens)?;
        let name = kernel_names(session);
        if session.stamps(1)?.is_empty() {
            session.seek(depth, CACHE_SEED)?;
            return blocks::take(session, first, tokens);
        }
        // The last token has no next one, to which there would be a distance.
        run(session, tokens.saturating_add(1))?;
        let stamps = session.stamps(tokens.saturating_add(1))?;
        Self::of_stamps(session.plan(), &name, depth, &stamps)
    }

    /// The profile of a plan from its stamps, `[tokens + 1][steps + 1]` nanoseconds, of the tokens
    /// from position `first` on. Means are over the half of the tokens whose times lie in the middle;
    /// a token in which the clock went back is left out.
    fn of_stamps(
        plan: &DecodePlan,
        kernel: &dyn Fn(&Step) -> String,
        first: u32,
        stamps: &[u64],
    ) -> Result<Self> {
        let slots = plan.steps.len() + 1;
        let rows: Vec<&[u64]> = stamps.chunks_exact(slots).collect();
        let mut tokens: Vec<(&[u64], u64)> =
            rows.windows(2).map(|pair| (pair[0], pair[1][0])).collect();
        if tokens.is_empty() {
            return Err(Error::Usage("a profile needs two tokens at least".to_owned()));
        }
        tokens.retain(|(row, next)| row.is_sorted() && row.last() <= Some(next));
        if tokens.is_empty() {
            let what = "the clock went back in every token that was profiled: profile again";
            return Err(Error::Verification(what.to_owned()));
        }
        let back = tokens.len().saturating_sub(TIMELINE_TOKENS);
        let timeline = timeline(&tokens[back..]);
        tokens.sort_by_key(|(row, next)| next.wrapping_sub(row[0]));
        let all = tokens.len();
        let middle = &tokens[all / 4..all - all / 4];
        // Distances of clock readings: exact as f64 for 2^53 ns.
        let mean = |distance: &dyn Fn(&[u64], u64) -> u64| {
            let sum: f64 = middle.iter().map(|(row, next)| distance(row, *next) as f64).sum();
            sum / middle.len() as f64 / 1e3
        };
        let position = first.saturating_add(all as u32 / 2);
        let steps = plan.steps.iter().enumerate().map(|(i, step)| {
            let raw_us = mean(&|row, _| row[i + 1].saturating_sub(row[i]));
            StepProfile {
                label: step.label.clone(),
                kernel: kernel(step),
                time_us: raw_us,
                raw_us,
                bytes: step.op.describe().traffic(position).dram(),
                cycles: None,
            }
        });
        Ok(Self {
            steps: steps.collect(),
            between_us: mean(&|row, next| next.saturating_sub(row[slots - 1])),
            token_us: mean(&|row, next| next.saturating_sub(row[0])),
            stamp_us: 0.0,
            tokens: middle.len() as u32,
            timeline,
        })
    }

    /// Takes the cost of the stamps off every step, where `replay_us` is the time a token of the
    /// plain replay, microseconds. The persistent kernel's steps are left as they are: it notes no
    /// clock between two tokens, so that `relaunch_us` ([`Overhead`]) stands there.
    ///
    /// [`Overhead`]: crate::session::Overhead::relaunch_us
    pub fn reconcile(&mut self, replay_us: f64, relaunch_us: Option<f64>) {
        if self.steps.iter().any(|s| s.cycles.is_some()) {
            self.between_us = relaunch_us.unwrap_or(0.0);
            return;
        }
        let stamps = (self.steps.len() + 1) as f64;
        self.stamp_us = ((self.token_us - replay_us) / stamps).max(0.0);
        for step in &mut self.steps {
            step.time_us = (step.raw_us - self.stamp_us).max(0.0);
        }
        self.between_us = (self.between_us - self.stamp_us).max(0.0);
    }

    /// Σ of the steps and what lies between two tokens, microseconds.
    pub fn sum_us(&self) -> f64 {
        self.steps.iter().map(|s| s.time_us).sum::<f64>() + self.between_us
    }

    /// The same by kernel, in the order of their first steps: how many steps, and their sums (means
    /// for the cycles).
    pub fn by_kernel(&self) -> Vec<(usize, StepProfile)> {
        let mut all: Vec<(usize, StepProfile)> = Vec::new();
        for step in &self.steps {
            let Some((n, sum)) = all.iter_mut().find(|(_, s)| s.kernel == step.kernel) else {
                all.push((1, step.clone()));
                continue;
            };
            *n += 1;
            sum.time_us += step.time_us;
            sum.raw_us += step.raw_us;
            sum.bytes += step.bytes;
            if let (Some(sum), Some(step)) = (&mut sum.cycles, &step.cycles) {
                sum.add(step);
            }
        }
        for (n, s) in &mut all {
            if let Some(cycles) = &mut s.cycles {
                cycles.divide(*n as f64);
            }
        }
        all
    }
}

impl StepProfile {
    /// GB/s of its bytes in its time; `None` for a step without either.
    pub fn gb_per_s(&self) -> Option<f64> {
        (self.bytes > 0 && self.time_us > 0.0).then(|| self.bytes as f64 / self.time_us / 1e3)
    }
}

/// What names a step's kernel: on a device the entry point, else the op.
fn kernel_names(session: &DecodeSession) -> impl Fn(&Step) -> String + use<> {
    let device = session.device();
    let cuda = session.backend() == "cuda";
    // The name does not depend on the geometry.
    let gpu = Gpu { sms: device.sms, compute: device.compute, ..Gpu::H200 };
    move |step| {
        let op = step.op.describe();
        if cuda { op.launch(&gpu).kernel } else { op.name().to_owned() }
    }
}

/// Steps of `tokens`, each a token's stamps and the next token's first one.
fn timeline(tokens: &[(&[u64], u64)]) -> Vec<Span> {
    let origin = tokens.first().and_then(|(row, _)| row.first()).copied().unwrap_or(0);
    let us = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e3;
    let of_token = |(token, (row, _)): (usize, &(&[u64], u64))| -> Vec<Span> {
        let span = |(step, pair): (usize, &[u64])| Span {
            token,
            step,
            start_us: us(origin, pair[0]),
            us: us(pair[0], pair[1]),
        };
        row.windows(2).enumerate().map(span).collect()
    };
    tokens.iter().enumerate().flat_map(of_token).collect()
}

#[cfg(test)]
mod tests;
