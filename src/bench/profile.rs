//! Where a token's time goes, step by step, inside the one kernel that computes it.
//!
//! The persistent kernel notes the clock at a few points of every step in every block. The blocks
//! work on several steps at once, so a step's share of the token is the time from the end of the
//! step before to its own end, each over all blocks:
//!
//! ```text
//! share(i) = max_b end(i, b) − max_b end(i − 1, b)        Σ share = the token, by construction
//! ```

use crate::error::{Error, Result};
use crate::plan::DecodePlan;
use crate::session::DecodeSession;

/// Words that the kernel notes for a step and block.
const WORDS: usize = 8;
/// Places of the words: clock cycles, then nanoseconds.
const BEGIN: usize = 0;
const STAGED: usize = 1;
const FIRST: usize = 2;
const STARVED: usize = 3;
const END: usize = 4;
const ASKING: usize = 5;
const BEGIN_NS: usize = 6;
const END_NS: usize = 7;

/// One step, mean over the profiled tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepProfile {
    /// Label of the plan.
    pub label: String,
    /// Name of the op.
    pub op: String,
    /// Its share of the token, microseconds.
    pub time_us: f64,
    /// Bytes that it must read from memory.
    pub bytes: u64,
    /// Clock cycles of a block, mean over the blocks that had work: until its inputs were staged.
    pub staged: f64,
    /// From there until the sums of its first tiles were complete.
    pub first: f64,
    /// From there to its end.
    pub rest: f64,
    /// Of these, those in which the block's first warp waited for weights.
    pub starved: f64,
    /// And those in which it asked for weights of later steps.
    pub asking: f64,
}

/// A token, step by step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    /// In the plan's order.
    pub steps: Vec<StepProfile>,
    /// From the first block's start to the last block's end, microseconds.
    pub token_us: f64,
    /// Tokens that the means are over.
    pub tokens: u32,
}

impl Profile {
    /// Profiles `tokens` tokens from where `session`, which keeps a trace, stands; `first` is the
    /// first input.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] when the session keeps no trace; those of a step.
    pub fn take(session: &mut DecodeSession, first: u32, tokens: u32) -> Result<Self> {
        let mut this = Self::default();
        let mut token = first;
        for _ in 0..tokens {
            let position = session.position();
            token = session.feed(token)?;
            let trace = session.trace()?;
            this.add(session.plan(), position, &trace)?;
        }
        let n = f64::from(this.tokens.max(1));
        this.token_us /= n;
        for s in &mut this.steps {
            for v in [
                &mut s.time_us,
                &mut s.staged,
                &mut s.first,
                &mut s.rest,
                &mut s.starved,
                &mut s.asking,
            ] {
                *v /= n;
            }
        }
        Ok(this)
    }

    fn add(&mut self, plan: &DecodePlan, position: u32, trace: &[u32]) -> Result<()> {
        let row = trace.len() / plan.steps.len().max(1);
        if row == 0 || !row.is_multiple_of(WORDS) {
            let what = "there is nothing to profile: this plan is issued kernel by kernel";
            return Err(Error::Usage(what.to_owned()));
        }
        let word = |block: &[u32], i: usize| block.get(i).copied().unwrap_or(0);
        let blocks = |i: usize| trace[i * row..(i + 1) * row].chunks_exact(WORDS);
        // Nanoseconds are modulo 2^32: all are taken relative to the first block's start.
        let start = blocks(0)
            .map(|b| word(b, BEGIN_NS))
            .reduce(|a, b| if (b.wrapping_sub(a) as i32) < 0 { b } else { a });
        let start = start.unwrap_or(0);
        if self.steps.is_empty() {
            self.steps = vec![StepProfile::default(); plan.steps.len()];
        }
        let mut before = 0;
        for (i, step) in plan.steps.iter().enumerate() {
            let op = step.op.describe();
            let end = blocks(i).map(|b| word(b, END_NS).wrapping_sub(start)).max().unwrap_or(0);
            // A block without work in this step notes no staging in it.
            let worked = |b: &&[u32]| word(b, STAGED).wrapping_sub(word(b, BEGIN)) as i32 > 0;
            let mean = |from: usize, to: usize| {
                let all: Vec<f64> = blocks(i)
                    .filter(worked)
                    .map(|b| f64::from(word(b, to).wrapping_sub(word(b, from))))
                    .collect();
                all.iter().sum::<f64>() / all.len().max(1) as f64
            };
            let to = &mut self.steps[i];
            to.label.clone_from(&step.label);
            op.name().clone_into(&mut to.op);
            to.time_us += f64::from(end.saturating_sub(before)) / 1e3;
            to.bytes = op.traffic(position).dram();
            to.staged += mean(BEGIN, STAGED);
            to.first += mean(STAGED, FIRST);
            to.rest += mean(FIRST, END);
            let sum = |word_: usize| {
                let all: Vec<f64> =
                    blocks(i).filter(worked).map(|b| f64::from(word(b, word_))).collect();
                all.iter().sum::<f64>() / all.len().max(1) as f64
            };
            to.starved += sum(STARVED);
            to.asking += sum(ASKING);
            before = before.max(end);
        }
        self.token_us += f64::from(before) / 1e3;
        self.tokens += 1;
        Ok(())
    }

    /// The same by op: how many steps, and their sums (means for the cycles).
    pub fn by_op(&self) -> Vec<(usize, StepProfile)> {
        let mut all: Vec<(usize, StepProfile)> = Vec::new();
        for step in &self.steps {
            let at = all.iter().position(|(_, s)| s.op == step.op);
            let (n, sum) = match at.and_then(|i| all.get_mut(i)) {
                Some(found) => found,
                None => {
                    all.push((1, step.clone()));
                    continue;
                }
            };
            *n += 1;
            sum.time_us += step.time_us;
            sum.bytes += step.bytes;
            sum.staged += step.staged;
            sum.first += step.first;
            sum.rest += step.rest;
            sum.starved += step.starved;
            sum.asking += step.asking;
        }
        for (n, s) in &mut all {
            for v in [&mut s.staged, &mut s.first, &mut s.rest, &mut s.starved, &mut s.asking] {
                *v /= *n as f64;
            }
        }
        all
    }
}
