//! One test, measured: warm-up until stable, then repetitions, each timed as a whole and token by
//! token.

use super::stats::Sorted;
use crate::error::{Error, Result};
use crate::session::{Chosen, DecodeSession, Finish};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// Tokens of a warm-up round, at most.
const WARMUP_TOKENS: u32 = 64;
/// Warm-up rounds, at most.
const WARMUP_ROUNDS: u32 = 10;
/// Longest warm-up, all rounds together.
const WARMUP_TIME: Duration = Duration::from_secs(3);
/// Two rounds agree when their medians differ by no more than this fraction.
const WARMUP_AGREEMENT: f64 = 0.02;
/// Seed of the cache contents before `depth`.
const CACHE_SEED: u64 = 0x5EED;

/// What is timed: `n_prompt` given tokens, then `n_gen` chosen ones, starting at `depth`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Test {
    /// Prompt tokens, each computed in one step.
    pub n_prompt: u32,
    /// Generated tokens.
    pub n_gen: u32,
    /// Position of the first token: what is before it is seeded data.
    pub depth: u32,
}

impl Test {
    /// Steps that are timed; `u32::MAX` when they are too many to count.
    pub fn steps(&self) -> u32 {
        self.n_prompt.saturating_add(self.n_gen)
    }

    /// Positions that the cache must have.
    pub fn capacity(&self) -> u32 {
        self.depth.saturating_add(self.steps())
    }
}

/// `pp512`, `tg128`, `pp512+tg128`, with ` @ d4096` at a depth.
impl std::fmt::Display for Test {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.n_prompt, self.n_gen) {
            (0, n) => write!(f, "tg{n}")?,
            (p, 0) => write!(f, "pp{p}")?,
            (p, n) => write!(f, "pp{p}+tg{n}")?,
        }
        if self.depth > 0 { write!(f, " @ d{}", self.depth) } else { Ok(()) }
    }
}

/// How a test is repeated.
#[derive(Clone, Copy, Debug)]
pub struct Repeat {
    /// Repetitions.
    pub times: u32,
    /// Whether to warm up.
    pub warmup: bool,
    /// Pause before each repetition.
    pub delay: Duration,
}

/// One repetition.
#[derive(Clone, Debug, PartialEq)]
pub struct Repetition {
    /// Wall time of all steps on the host's clock, ns.
    pub ns: u64,
    /// Gaps between consecutive tokens, ns: one fewer than tokens.
    pub gaps_ns: Vec<u64>,
}

/// What the warm-up did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Warmup {
    /// Rounds.
    pub rounds: u32,
    /// Tokens in all rounds.
    pub tokens: u32,
    /// Time of all rounds, s.
    pub seconds: f64,
    /// Whether the last two rounds agreed, rather than the time or rounds having run out.
    pub stable: bool,
}

/// A test's samples.
#[derive(Clone, Debug, PartialEq)]
pub struct Measurement {
    /// The test.
    pub test: Test,
    /// `None` when it was not asked for.
    pub warmup: Option<Warmup>,
    /// Whether gaps are on the device's clock rather than the host's.
    pub device_clock: bool,
    /// The repetitions that were completed, at least one.
    pub repetitions: Vec<Repetition>,
}

impl Measurement {
    /// Tokens a second of each repetition.
    pub fn tokens_per_second(&self) -> Vec<f64> {
        let steps = f64::from(self.test.steps());
        self.repetitions.iter().map(|r| steps * 1e9 / r.ns.max(1) as f64).collect()
    }

    /// All gaps between tokens, ms; the mean time a token where a test has one token only.
    pub fn token_ms(&self) -> Vec<f64> {
        let steps = f64::from(self.test.steps());
        let gaps = self.repetitions.iter().flat_map(|r| &r.gaps_ns);
        let gaps: Vec<f64> = gaps.map(|&ns| ns as f64 / 1e6).collect();
        if !gaps.is_empty() {
            return gaps;
        }
        self.repetitions.iter().map(|r| r.ns as f64 / 1e6 / steps).collect()
    }
}

/// What a measurement needs of a session; a mock in tests.
pub trait Decoder {
    /// Goes to `depth`, with seeded data before it.
    ///
    /// # Errors
    /// Those of the session.
    fn seek(&mut self, depth: u32) -> Result<()>;
    /// As [`DecodeSession::decode`].
    ///
    /// # Errors
    /// Those of the session.
    fn decode(
        &mut self,
        inputs: &[u32],
        n_predict: u32,
        sink: &mut dyn FnMut(Chosen) -> ControlFlow<()>,
    ) -> Result<Finish>;
    /// Token ids are below this.
    fn vocab(&self) -> u32;
}

impl Decoder for DecodeSession {
    fn seek(&mut self, depth: u32) -> Result<()> {
        DecodeSession::seek(self, depth, CACHE_SEED)
    }

    fn decode(
        &mut self,
        inputs: &[u32],
        n_predict: u32,
        sink: &mut dyn FnMut(Chosen) -> ControlFlow<()>,
    ) -> Result<Finish> {
        DecodeSession::decode(self, inputs, n_predict, sink)
    }

    fn vocab(&self) -> u32 {
        self.plan().vocab
    }
}

/// Measures `test`. `stop` is asked after each token: once it says so, the repetition under way is
/// dropped and what was completed is returned, or [`Error::Interrupted`] if nothing was.
/// `progress` is called with each token.
///
/// # Errors
/// Those of the session; [`Error::Usage`] for a test without tokens.
pub fn measure(
    decoder: &mut dyn Decoder,
    test: Test,
    repeat: Repeat,
    stop: &dyn Fn() -> bool,
    progress: &mut dyn FnMut(),
) -> Result<Measurement> {
    if test.steps() == 0 || repeat.times == 0 {
        return Err(Error::Usage("a test needs at least one token and one repetition".to_owned()));
    }
    let mut run = Run { decoder, stop, progress, device_clock: true };
    let warmup = if repeat.warmup { Some(run.warm_up(test)?) } else { None };
    let mut repetitions = Vec::new();
    for _ in 0..repeat.times {
        std::thread::sleep(repeat.delay);
        match run.once(test, None)? {
            Some(repetition) => repetitions.push(repetition),
            None => break,
        }
    }
    if repetitions.is_empty() {
        return Err(Error::Interrupted);
    }
    Ok(Measurement { test, warmup, device_clock: run.device_clock, repetitions })
}

struct Run<'a> {
    decoder: &'a mut dyn Decoder,
    stop: &'a dyn Fn() -> bool,
    progress: &'a mut dyn FnMut(),
    device_clock: bool,
}

impl Run<'_> {
    /// Rounds of the test's first tokens until two of them take the same time.
    fn warm_up(&mut self, test: Test) -> Result<Warmup> {
        let start = Instant::now();
        let round = Test { n_prompt: 0, n_gen: test.steps().min(WARMUP_TOKENS), ..test };
        let mut done = Warmup::default();
        let mut before = None;
        while done.rounds < WARMUP_ROUNDS && !done.stable {
            let Some(sample) = self.once(round, Some(start + WARMUP_TIME))? else { break };
            let gaps = sample.gaps_ns.iter().map(|&ns| ns as f64);
            let now = Sorted::new(gaps).median().unwrap_or(sample.ns as f64);
            done.stable = before.is_some_and(|b: f64| (now - b).abs() <= WARMUP_AGREEMENT * b);
            done.rounds += 1;
            done.tokens += round.steps();
            before = Some(now);
        }
        done.seconds = start.elapsed().as_secs_f64();
        Ok(done)
    }

    /// One repetition; `None` when it was stopped or the deadline passed.
    fn once(&mut self, test: Test, deadline: Option<Instant>) -> Result<Option<Repetition>> {
        self.decoder.seek(test.depth)?;
        let inputs = inputs(test, self.decoder.vocab());
        // The last input's step chooses a token too: inputs + predicted − 1 steps.
        let predict = test.steps() - (inputs.len() as u32 - 1);
        let mut at = Vec::with_capacity(test.steps() as usize);
        let (stop, progress) = (self.stop, &mut self.progress);
        let start = Instant::now();
        let finish = self.decoder.decode(&inputs, predict, &mut |chosen| {
            let now = Instant::now();
            at.push((now - start, chosen.device_ns));
            progress();
            if stop() || deadline.is_some_and(|d| now > d) {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })?;
        let ns = start.elapsed().as_nanos() as u64;
        match finish {
            Finish::Done => {}
            Finish::Stopped => return Ok(None),
            Finish::Capacity => {
                return Err(Error::Internal(format!("{test} does not fit the session's cache")));
            }
        }
        let device: Option<Vec<u64>> = at.iter().map(|(_, device_ns)| *device_ns).collect();
        self.device_clock &= device.is_some();
        let ticks =
            device.unwrap_or_else(|| at.iter().map(|(host, _)| host.as_nanos() as u64).collect());
        let gaps_ns = ticks.windows(2).map(|w| w[1].saturating_sub(w[0])).collect();
        Ok(Some(Repetition { ns, gaps_ns }))
    }
}

/// The prompt, or one token to begin with: the same ids in every run.
fn inputs(test: Test, vocab: u32) -> Vec<u32> {
    let mut state = 1u32;
    let mut next = || {
        // Marsaglia's xorshift32 (2003): any fixed sequence will do.
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state % vocab.max(1)
    };
    (0..test.n_prompt.max(1)).map(|_| next()).collect()
}

#[cfg(test)]
mod tests;
