//! The persistent kernel's own readings of the clock, block by block.

use super::{Profile, Span, StepProfile};
use crate::error::{Error, Result};
use crate::plan::DecodePlan;
use crate::session::DecodeSession;

/// Words that the kernel notes for a step and block.
const WORDS: usize = 8;
/// Places of the words: clock cycles, then nanoseconds.
const BEGIN: usize = 0;
const STAGED: usize = 1;
const END: usize = 4;
const BEGIN_NS: usize = 6;
const END_NS: usize = 7;

/// Clock cycles of a block in a step of the persistent kernel, mean over the blocks that had work.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cycles {
    /// Until its inputs were staged.
    pub staged: f64,
    /// From there to its end.
    pub rest: f64,
}

impl Cycles {
    fn all(&mut self) -> [&mut f64; 2] {
        [&mut self.staged, &mut self.rest]
    }

    pub(super) fn add(&mut self, other: &Self) {
        let mut other = *other;
        for (sum, v) in self.all().into_iter().zip(other.all()) {
            *sum += *v;
        }
    }

    pub(super) fn divide(&mut self, by: f64) {
        self.all().into_iter().for_each(|v| *v /= by);
    }
}

/// Profiles `tokens` tokens from where `session` stands.
pub(super) fn take(session: &mut DecodeSession, first: u32, tokens: u32) -> Result<Profile> {
    let mut profile = Profile::default();
    let mut token = first;
    for _ in 0..tokens {
        let position = session.position();
        token = session.feed(token)?;
        let trace = session.trace()?;
        add(&mut profile, session.plan(), position, &trace)?;
    }
    let n = f64::from(profile.tokens.max(1));
    profile.token_us /= n;
    let mut start_us = 0.0;
    for (step, s) in profile.steps.iter_mut().enumerate() {
        s.time_us /= n;
        s.raw_us = s.time_us;
        if let Some(cycles) = &mut s.cycles {
            cycles.divide(n);
        }
        profile.timeline.push(Span { token: 0, step, start_us, us: s.time_us });
        start_us += s.time_us;
    }
    Ok(profile)
}

fn add(profile: &mut Profile, plan: &DecodePlan, position: u32, trace: &[u32]) -> Result<()> {
    let row = trace.len() / plan.steps.len().max(1);
    if row == 0 || !row.is_multiple_of(WORDS) {
        let what =
            "there is nothing to profile: only a graph's steps note the clock (--mode graph)";
        return Err(Error::Usage(what.to_owned()));
    }
    let word = |block: &[u32], i: usize| block.get(i).copied().unwrap_or(0);
    let blocks = |i: usize| trace[i * row..(i + 1) * row].chunks_exact(WORDS);
    // Nanoseconds are modulo 2^32: all are taken relative to the first block's start.
    let start = blocks(0)
        .map(|b| word(b, BEGIN_NS))
        .reduce(|a, b| if (b.wrapping_sub(a) as i32) < 0 { b } else { a });
    let start = start.unwrap_or(0);
    if profile.steps.is_empty() {
        profile.steps = vec![StepProfile::default(); plan.steps.len()];
    }
    let mut before = 0;
    for (i, step) in plan.steps.iter().enumerate() {
        let op = step.op.describe();
        let end = blocks(i).map(|b| word(b, END_NS).wrapping_sub(start)).max().unwrap_or(0);
        // A block without work in this step notes no staging in it.
        let worked = |b: &&[u32]| word(b, STAGED).wrapping_sub(word(b, BEGIN)) as i32 > 0;
        let mean = |value: &dyn Fn(&[u32]) -> u32| {
            let all: Vec<f64> = blocks(i).filter(worked).map(|b| f64::from(value(b))).collect();
            all.iter().sum::<f64>() / all.len().max(1) as f64
        };
        let between = |from: usize, to: usize| mean(&|b| word(b, to).wrapping_sub(word(b, from)));
        let to = &mut profile.steps[i];
        to.label.clone_from(&step.label);
        op.name().clone_into(&mut to.kernel);
        to.time_us += f64::from(end.saturating_sub(before)) / 1e3;
        to.bytes = op.traffic(position).dram();
        to.cycles
            .get_or_insert_default()
            .add(&Cycles { staged: between(BEGIN, STAGED), rest: between(STAGED, END) });
        before = before.max(end);
    }
    profile.token_us += f64::from(before) / 1e3;
    profile.tokens += 1;
    Ok(())
}
