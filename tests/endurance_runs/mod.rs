//! Long runs of a session, for a device and for the fake driver: what they compute must not change,
//! and what they hold must not grow.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]
#![allow(dead_code, reason = "each test binary uses a part")]

use decode_graph::checkpoint::Checkpoint;
use decode_graph::cuda::bind::Want;
use decode_graph::cuda::driver::{Context, DeviceMemory, Stream};
use decode_graph::cuda::step_state::StepState;
use decode_graph::cuda::{BoundPlan, CapturedGraph, kernels};
use decode_graph::error::Result;
use decode_graph::plan::DecodePlan;
use decode_graph::session::{DecodeSession, Finish, Mode, SessionOptions};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most that the free memory of a device may change, bytes.
pub(crate) const DEVICE_DRIFT: u64 = 2 << 20;
/// Most that the resident memory of the process may change, bytes.
pub(crate) const HOST_DRIFT: u64 = 1 << 20;

/// Resident memory of this process, bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// FNV-1a (Fowler, Noll, Vo) of words.
struct Hash(u64);

impl Hash {
    fn add(&mut self, words: impl IntoIterator<Item = u32>) {
        for byte in words.into_iter().flat_map(u32::to_le_bytes) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3);
        }
    }
}

/// Fills the cache from position 0 on: the hash of every token, of the last logits, and of all keys
/// and values; and the tokens that were chosen.
fn fill(session: &mut DecodeSession, tokens: &mut Vec<u32>) -> Result<u64> {
    tokens.clear();
    session.reset()?;
    let more_than_fit = session.capacity() + 1;
    let finish = session.decode(&[1, 2, 3], more_than_fit, &mut |c| {
        tokens.push(c.token);
        ControlFlow::Continue(())
    })?;
    assert_eq!(finish, Finish::Capacity);
    assert_eq!(tokens.len(), session.capacity() as usize);
    let mut hash = Hash(0xCBF2_9CE4_8422_2325);
    hash.add(tokens.iter().copied());
    hash.add(session.logits()?.into_iter().map(f32::to_bits));
    for layer in 0..session.plan().cache.layers {
        let (keys, values) = session.cache(layer)?;
        hash.add(keys.into_iter().chain(values).map(f32::to_bits));
    }
    Ok(hash.0)
}

/// Memory before and after.
pub(crate) struct Drift {
    device: [u64; 2],
    host: [u64; 2],
}

impl Drift {
    fn since(device: u64, host: u64, free: &dyn Fn() -> u64) -> Self {
        Self { device: [device, free()], host: [host, resident()] }
    }

    /// Change of the device's free memory, bytes.
    pub(crate) fn device(&self) -> u64 {
        self.device[0].abs_diff(self.device[1])
    }

    /// Growth of the process's resident memory, bytes.
    pub(crate) fn host(&self) -> u64 {
        self.host[1].saturating_sub(self.host[0])
    }
}

/// What a long run came to.
pub(crate) struct Soak {
    pub(crate) tokens: u64,
    /// Different tokens in a fill: a run that repeats itself shows little.
    pub(crate) distinct: usize,
    pub(crate) hash: u64,
    pub(crate) drift: Drift,
    pub(crate) time: Duration,
}

/// Fills the cache of one session `fills` times, after twice to warm up; every fill must leave the
/// same bits. `free` tells the device's free memory.
pub(crate) fn soak(
    checkpoint: &Checkpoint,
    options: &SessionOptions,
    fills: u32,
    free: &dyn Fn() -> u64,
) -> Result<Soak> {
    let mut session = DecodeSession::new(checkpoint, options, &mut |_, _| {})?;
    let mut tokens = Vec::with_capacity(session.capacity() as usize);
    let hash = fill(&mut session, &mut tokens)?;
    assert_eq!(fill(&mut session, &mut tokens)?, hash, "the second fill");
    let mut different = tokens.clone();
    different.sort_unstable();
    different.dedup();
    let distinct = different.len();
    let (start, device, host) = (Instant::now(), free(), resident());
    for n in 0..fills {
        // What stood in the workspace must not matter.
        session.poison(n as u8)?;
        assert_eq!(fill(&mut session, &mut tokens)?, hash, "fill {n} of {fills}");
    }
    session.check_red_zones()?;
    let drift = Drift::since(device, host, free);
    let tokens = u64::from(fills) * tokens.len() as u64;
    assert_eq!(session.stats().allocations_after_freeze, 0);
    Ok(Soak { tokens, distinct, hash, drift, time: start.elapsed() })
}

/// Builds, uses and destroys `n` sessions, after three to warm up; each must choose the same tokens.
pub(crate) fn build_and_destroy(
    checkpoint: &Checkpoint,
    options: &SessionOptions,
    n: u32,
    free: &dyn Fn() -> u64,
) -> Result<(Drift, Duration)> {
    let life = || -> Result<Vec<u32>> {
        let mut session = DecodeSession::new(checkpoint, options, &mut |_, _| {})?;
        let mut tokens = Vec::new();
        session.decode(&[1, 2, 3], 4, &mut |c| {
            tokens.push(c.token);
            ControlFlow::Continue(())
        })?;
        Ok(tokens)
    };
    let first = life()?;
    for _ in 0..2 {
        assert_eq!(life()?, first);
    }
    let (start, device, host) = (Instant::now(), free(), resident());
    for i in 0..n {
        assert_eq!(life()?, first, "session {i}");
    }
    let time = start.elapsed();
    Ok((Drift::since(device, host, free), time))
}

/// Fills the cache `runs` times: in turn replayed and launch by launch, ten times a session, the
/// workspace poisoned with another byte each time. The one hash of all.
pub(crate) fn one_hash(
    checkpoint: &Checkpoint,
    options: &SessionOptions,
    runs: u32,
) -> Result<u64> {
    let mut hashes = Vec::new();
    let mut tokens = Vec::new();
    while hashes.len() < runs as usize {
        let mode = if hashes.len() / 10 % 2 == 0 { Mode::Graph } else { Mode::Eager };
        let options = SessionOptions { mode, ..options.clone() };
        let mut session = DecodeSession::new(checkpoint, &options, &mut |_, _| {})?;
        for _ in 0..10.min(runs as usize - hashes.len()) {
            session.poison(hashes.len() as u8)?;
            hashes.push(fill(&mut session, &mut tokens)?);
        }
    }
    let first = hashes[0];
    let other = hashes.iter().position(|h| *h != first);
    assert_eq!(other, None, "a run with another hash than the first");
    Ok(first)
}

/// With a device's memory held elsewhere but for `left` bytes there is no session, and the parts of
/// what it needs are told; when it is given back there is.
pub(crate) fn memory_held_elsewhere(
    context: &Context,
    checkpoint: &Checkpoint,
    options: &SessionOptions,
    left: u64,
) -> Result<()> {
    let bytes = context.memory()?.0 - left;
    let held = DeviceMemory::alloc(context, "held elsewhere", bytes)?;
    let refused = DecodeSession::new(checkpoint, options, &mut |_, _| {}).map(drop).unwrap_err();
    assert_eq!(refused.exit_code(), 6, "{refused}");
    assert!(refused.to_string().contains("KV cache"), "{refused}");
    drop(held);
    DecodeSession::new(checkpoint, options, &mut |_, _| {})?.feed(1).map(drop)
}

/// Replays steps whose position or token is out of range: each sets its status, moves nothing on,
/// and leaves caches and red zones as they were.
pub(crate) fn steps_that_write_nothing(
    context: &Context,
    checkpoint: &Checkpoint,
    plan: &DecodePlan,
    persistent: bool,
) -> Result<()> {
    let want = Want { persistent, red_zones: true, ..Want::default() };
    let bound =
        Arc::new(BoundPlan::new(context, checkpoint, plan, &kernels::ptx, want, &mut |_, _| {})?);
    let stream = Stream::new(context)?;
    let mut graph = CapturedGraph::capture(&bound, &stream)?;
    let (capacity, vocab) = (plan.cache.capacity, plan.vocab);
    let look = || -> Result<Vec<[Vec<u8>; 2]>> {
        (0..plan.cache.layers).map(|layer| bound.cache_bytes(&stream, layer)).collect()
    };
    let state = StepState { capacity, vocab, ..StepState::default() };
    bound.set_state(&stream, StepState { token: 1, position: capacity - 1, ..state })?;
    graph.replay(&stream)?;
    assert_eq!(bound.state(&stream)?.position, capacity, "a step in range goes on");
    let before = look()?;
    let beyond = [capacity, capacity + 1, i32::MAX as u32, u32::MAX];
    let positions = beyond.map(|position| (position, 1, 1));
    let tokens = [vocab, u32::MAX].map(|token| (0, token, 2));
    for (steps, (position, token, status)) in (1..).zip(positions.into_iter().chain(tokens)) {
        let given = StepState { position, token, steps, ..state };
        bound.set_state(&stream, given)?;
        graph.replay(&stream)?;
        let after = bound.state(&stream)?;
        assert_eq!(after, StepState { status, ..given }, "position {position}, token {token}");
        assert!(look()? == before, "position {position}, token {token}: the cache was changed");
    }
    bound.check_red_zones(&stream)
}
