//! One test, measured: warm-up until stable, then repetitions, each timed as a whole and token by
//! token.

use super::bootstrap;
use super::stats::Sorted;
use super::telemetry::{Conditions, Monitor, Reading, Span};
use crate::cuda::driver::nvtx;
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
/// Repetitions without which the spread of their medians says nothing.
pub const NOISE_REPETITIONS: usize = 5;
/// Outliers that are told one by one, at most: the farthest.
const OUTLIERS_TOLD: usize = 20;
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
    /// Go on until [`Measurement::noise_percent`] is at most this, %.
    pub max_noise: Option<f64>,
    /// Repetitions with `max_noise`, at most.
    pub most: u32,
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
    /// From the begin until the host saw the token of the first step, ns.
    pub first_ns: u64,
    /// Time to first token: until the host saw the token chosen after the last input, ns.
    pub ttft_ns: u64,
    /// Gaps between consecutive tokens, ns: one fewer than tokens.
    pub gaps_ns: Vec<u64>,
    /// What the device did meanwhile; `None` without a sensor.
    pub span: Option<Span>,
}

impl Repetition {
    /// Median time a token, ms; the mean of `steps` steps where there are no gaps.
    pub fn median_ms(&self, steps: u32) -> f64 {
        let gaps = Sorted::new(self.gaps_ns.iter().map(|&ns| ns as f64 / 1e6));
        gaps.median().unwrap_or(self.ns as f64 / 1e6 / f64::from(steps.max(1)))
    }
}

/// A token that took far longer, or shorter, than the others.
#[derive(Clone, Debug, PartialEq)]
pub struct Outlier {
    /// Repetition, from 0.
    pub repetition: usize,
    /// Position of the step.
    pub position: u32,
    /// Time a token, ms.
    pub ms: f64,
    /// After the begin of the repetition, ms.
    pub at_ms: f64,
    /// The device then; `None` without a sensor.
    pub reading: Option<Reading>,
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
    /// Whether gaps are on the device's clock rather than the host's: that of a device whose clock went
    /// back is not.
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

    /// Median time a token of each repetition, ms.
    pub fn medians_ms(&self) -> Vec<f64> {
        self.repetitions.iter().map(|r| r.median_ms(self.test.steps())).collect()
    }

    /// How well the result is known: half the 95 % bootstrap interval of the median over the
    /// repetitions' medians, % of it. `None` below [`NOISE_REPETITIONS`].
    pub fn noise_percent(&self) -> Option<f64> {
        let medians = self.medians_ms();
        let center = Sorted::new(medians.iter().copied()).median()?;
        let (low, high) = bootstrap::of_median(&medians, 0.95);
        (medians.len() >= NOISE_REPETITIONS).then_some(100.0 * (high - low) / 2.0 / center)
    }

    /// What the device did in all repetitions; `None` without a sensor.
    pub fn conditions(&self) -> Option<Conditions> {
        Conditions::of(self.spans())
    }

    /// The spans of the repetitions.
    pub fn spans(&self) -> impl Iterator<Item = &Span> + Clone {
        self.repetitions.iter().filter_map(|r| r.span.as_ref())
    }

    /// The tokens outside [`Sorted::ordinary`], the slowest first, with the device's state then.
    pub fn outliers(&self) -> Vec<Outlier> {
        let ordinary = Sorted::new(self.token_ms()).ordinary();
        let mut found = Vec::new();
        for (repetition, r) in self.repetitions.iter().enumerate() {
            let mut at_ns = r.first_ns;
            for (position, &gap) in (self.test.depth + 1..).zip(&r.gaps_ns) {
                at_ns = at_ns.saturating_add(gap);
                let (ms, at_ms) = (gap as f64 / 1e6, at_ns as f64 / 1e6);
                if !ordinary.contains(&ms) {
                    let reading = r.span.as_ref().and_then(|s| s.nearest(at_ms)).map(|s| s.reading);
                    found.push(Outlier { repetition, position, ms, at_ms, reading });
                }
            }
        }
        found.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        found.truncate(OUTLIERS_TOLD);
        found
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

/// What watches a measurement.
pub struct Watch<'a> {
    /// Asked after each token: once it says so, the repetition under way is dropped.
    pub stop: &'a dyn Fn() -> bool,
    /// Called with each token: whether it is measured, rather than one of the warm-up.
    pub progress: &'a mut dyn FnMut(bool),
    /// Reads the device, where there is a sensor.
    pub monitor: Option<&'a Monitor>,
}

/// Measures `test` on each of `decoders`, their repetitions interleaved: what changes with time
/// hits all of them, and each second round runs backwards. Gives a measurement for each, of as
/// many repetitions; those that were completed when `watch.stop` said so, or
/// [`Error::Interrupted`] if none was.
///
/// # Errors
/// Those of the session; [`Error::Usage`] for a test without tokens; [`Error::Verification`] where the
/// host's clock went back.
pub fn measure(
    decoders: &mut [&mut dyn Decoder],
    test: Test,
    repeat: Repeat,
    watch: &mut Watch<'_>,
) -> Result<Vec<Measurement>> {
    if test.steps() == 0 || repeat.times == 0 {
        return Err(Error::Usage("a test needs at least one token and one repetition".to_owned()));
    }
    let empty =
        |_: &_| Measurement { test, warmup: None, device_clock: true, repetitions: Vec::new() };
    let mut all: Vec<Measurement> = decoders.iter().map(empty).collect();
    if repeat.warmup {
        for (decoder, m) in decoders.iter_mut().zip(&mut all) {
            m.warmup = Some(warm_up(*decoder, test, watch)?);
        }
    }
    let mut round = 0;
    let noisy = |all: &[Measurement]| {
        let bound = repeat.max_noise.unwrap_or(f64::INFINITY);
        all.iter().any(|m| m.noise_percent().unwrap_or(f64::MAX) > bound)
    };
    while round < repeat.times || (round < repeat.most && noisy(&all)) {
        std::thread::sleep(repeat.delay);
        let mut order: Vec<usize> = (0..decoders.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for i in order {
            if let Some((repetition, device_clock)) = once(decoders[i], test, None, watch)? {
                all[i].repetitions.push(repetition);
                all[i].device_clock &= device_clock;
            }
        }
        round += 1;
        if (watch.stop)() {
            break;
        }
    }
    // Pairs only: an interrupt may have come between two decoders.
    let complete = all.iter().map(|m| m.repetitions.len()).min().unwrap_or(0);
    if complete == 0 {
        return Err(Error::Interrupted);
    }
    all.iter_mut().for_each(|m| m.repetitions.truncate(complete));
    Ok(all)
}

/// Rounds of the test's first tokens until two of them take the same time.
fn warm_up(decoder: &mut dyn Decoder, test: Test, watch: &mut Watch<'_>) -> Result<Warmup> {
    let _range = nvtx::range(c"warm-up");
    let start = Instant::now();
    let round = Test { n_prompt: 0, n_gen: test.steps().min(WARMUP_TOKENS), ..test };
    let mut done = Warmup::default();
    let mut before = None;
    while done.rounds < WARMUP_ROUNDS && !done.stable {
        let Some((sample, _)) = once(decoder, round, Some(start + WARMUP_TIME), watch)? else {
            break;
        };
        let now = sample.median_ms(round.steps());
        done.stable = before.is_some_and(|b: f64| (now - b).abs() <= WARMUP_AGREEMENT * b);
        done.rounds += 1;
        done.tokens += round.steps();
        before = Some(now);
    }
    done.seconds = start.elapsed().as_secs_f64();
    Ok(done)
}

/// One repetition, and whether its gaps are on the device's clock; `None` when it was stopped or
/// the deadline passed.
fn once(
    decoder: &mut dyn Decoder,
    test: Test,
    deadline: Option<Instant>,
    watch: &mut Watch<'_>,
) -> Result<Option<(Repetition, bool)>> {
    decoder.seek(test.depth)?;
    let inputs = inputs(test, decoder.vocab());
    // The last input's step chooses a token too: inputs + predicted − 1 steps.
    let predict = test.steps() - (inputs.len() as u32 - 1);
    let mut at = Vec::with_capacity(test.steps() as usize);
    // A warm-up has a range of its own.
    let _range = deadline.is_none().then(|| nvtx::range(c"replays"));
    let start = Instant::now();
    let finish = decoder.decode(&inputs, predict, &mut |chosen| {
        let now = Instant::now();
        at.push((now - start, chosen.device_ns));
        (watch.progress)(deadline.is_none());
        if (watch.stop)() || deadline.is_some_and(|d| now > d) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    let end = Instant::now();
    match finish {
        Finish::Done => {}
        Finish::Stopped => return Ok(None),
        Finish::Capacity => {
            return Err(Error::Internal(format!("{test} does not fit the session's cache")));
        }
    }
    let ns = (end - start).as_nanos() as u64;
    let host: Vec<u64> = at.iter().map(|(host, _)| host.as_nanos() as u64).collect();
    // Differences of the host's clock are zero where it went back.
    if ns == 0 || !host.is_sorted() || host.last().is_some_and(|last| *last > ns) {
        let what =
            format!("{test}: the host's clock went back while it was measured: measure again");
        return Err(Error::Verification(what));
    }
    let host_ns = |step: usize| host.get(step).copied().unwrap_or(0);
    let device: Option<Vec<u64>> = at.iter().map(|(_, device_ns)| *device_ns).collect();
    // A device's clock that went back tells nothing about this repetition.
    let device = device.filter(|ticks| ticks.is_sorted());
    let device_clock = device.is_some();
    let ticks = device.unwrap_or_else(|| host.clone());
    let repetition = Repetition {
        ns,
        first_ns: host_ns(0),
        ttft_ns: host_ns(inputs.len() - 1),
        gaps_ns: ticks.windows(2).map(|w| w[1].saturating_sub(w[0])).collect(),
        span: watch.monitor.map(|m| m.span(start, end)),
    };
    Ok(Some((repetition, device_clock)))
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
