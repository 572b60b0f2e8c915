//! A model that is being decoded: picks graph, eager or reference once, then tokens in, tokens
//! out.

pub use crate::engine::{
    Chosen, DebugLevel, DeviceInfo, EngineStats, Look, MemoryUse, Mode, Overhead, StepFilter,
    Written,
};

use crate::arch::{self, PlanOptions};
use crate::checkpoint::Checkpoint;
use crate::cuda::driver::nvtx;
use crate::cuda::{CudaEngine, CudaOptions};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::ops::{KvType, Sampling};
use crate::plan::{DecodePlan, fuse};
use crate::reference::CpuEngine;
use std::io::Write;
use std::ops::ControlFlow;

/// Where to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum BackendChoice {
    /// CUDA if a device answers, else the CPU reference with one warning.
    #[default]
    Auto,
    /// A CUDA device, or an error.
    Cuda,
    /// The CPU reference.
    Cpu,
}

/// What a session is made for.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionOptions {
    /// Where to compute.
    pub backend: BackendChoice,
    /// How a device is given its work.
    pub mode: Mode,
    /// Ordinal of the device among those that the process may see.
    pub device: u32,
    /// Positions of the key/value cache, at least 1.
    pub capacity: u32,
    /// Element type of the cache; `None` is f16 on CUDA, f32 on the CPU reference.
    pub kv: Option<KvType>,
    /// Whether to fuse the plan; the plain plan computes the same, op by op.
    pub fused: bool,
    /// How tokens are drawn; `None` takes the most probable one, and costs nothing beyond it.
    pub sampling: Option<Sampling>,
    /// What is told about each step.
    pub debug: DebugLevel,
    /// On CUDA, the whole token in the persistent kernel, where the plan has a program.
    pub persistent: bool,
    /// Readings of the clock are kept: [`DecodeSession::stamps`], and of the persistent kernel
    /// [`DecodeSession::trace`].
    pub trace: bool,
    /// On CUDA, buffers and caches lie between bytes that no kernel may touch: for
    /// [`DecodeSession::check_red_zones`].
    pub red_zones: bool,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            backend: BackendChoice::default(),
            mode: Mode::default(),
            device: 0,
            capacity: 4096,
            kv: None,
            fused: true,
            sampling: None,
            debug: DebugLevel::default(),
            persistent: true,
            trace: false,
            red_zones: false,
        }
    }
}

/// Why decoding ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Finish {
    /// All that was asked for was chosen.
    Done,
    /// The sink said stop.
    Stopped,
    /// The cache is full; nothing was written beyond it.
    Capacity,
}

/// A model, its cache and the position in it.
///
/// ```
/// # use decode_graph::checkpoint::{Checkpoint, SyntheticSpec};
/// # use decode_graph::session::{BackendChoice, DecodeSession, SessionOptions};
/// use decode_graph::ops::Sampling;
/// # let model = Checkpoint::synthetic(&SyntheticSpec::parse("tiny")?)?;
/// let sampling = Sampling { temperature: 0.8, top_k: 40, top_p: 0.95, min_p: 0.05, seed: 1 };
/// let options = SessionOptions {
///     backend: BackendChoice::Cpu,
///     capacity: 8,
///     sampling: Some(sampling),
///     ..Default::default()
/// };
/// let mut session = DecodeSession::new(&model, &options, &mut |_, _| {})?;
/// let first = session.feed(1)?;
/// session.reset()?;
/// assert_eq!(session.feed(1)?, first, "seed and position decide the draw");
/// # Ok::<(), decode_graph::error::Error>(())
/// ```
pub struct DecodeSession {
    engine: Box<dyn Engine>,
    plan: DecodePlan,
    position: u32,
    /// The token chosen last: the input of `position` unless another one is given.
    next: Option<u32>,
    /// Whether the engine's position is the session's.
    in_step: bool,
    /// Whether the engine holds logits of a step.
    has_logits: bool,
}

impl DecodeSession {
    /// Records the plan of `checkpoint` and binds it to memory; `progress` is told (bytes of
    /// weights done, of all).
    ///
    /// # Errors
    ///
    /// Those of [`arch::record`] and [`Checkpoint::read`]; [`Error::NoDevice`] when CUDA was asked
    /// for by name and is not there; [`Error::OutOfMemory`].
    pub fn new(
        checkpoint: &Checkpoint,
        options: &SessionOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let _range = nvtx::range(c"load");
        let (plan, engine) = match options.backend {
            BackendChoice::Cpu => cpu(checkpoint, options, progress)?,
            BackendChoice::Cuda => cuda(checkpoint, options, progress)?,
            BackendChoice::Auto => match cuda(checkpoint, options, progress) {
                Err(e @ Error::NoDevice(_)) => {
                    log::warn!("{e}; the CPU reference computes instead");
                    cpu(checkpoint, options, progress)?
                }
                made => made?,
            },
        };
        Ok(Self { engine, plan, position: 0, next: None, in_step: true, has_logits: false })
    }

    /// Sends the lines of [`SessionOptions::debug`] to `out`; they go to the log until then.
    pub fn debug_to(&mut self, out: Box<dyn Write + Send>) {
        self.engine.debug_to(out);
    }

    /// Only the steps of `look` are told about by [`SessionOptions::debug`], and what they write is
    /// kept where it says.
    pub fn look(&mut self, look: Look) {
        self.engine.look(look);
    }

    /// `cuda` or `cpu`.
    pub fn backend(&self) -> &'static str {
        self.engine.backend()
    }

    /// `graph`, `eager` or `reference`.
    pub fn mode(&self) -> &'static str {
        self.engine.mode()
    }

    /// What computes.
    pub fn device(&self) -> &DeviceInfo {
        self.engine.info()
    }

    /// The plan that is computed per token.
    pub fn plan(&self) -> &DecodePlan {
        &self.plan
    }

    /// The position that the next input gets.
    pub fn position(&self) -> u32 {
        self.position
    }

    /// Positions of the cache.
    pub fn capacity(&self) -> u32 {
        self.plan.cache.capacity
    }

    /// Counters since the session was made.
    pub fn stats(&self) -> EngineStats {
        self.engine.stats()
    }

    /// Goes to position 0. The next token is undefined until an input is given.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`].
    pub fn reset(&mut self) -> Result<()> {
        self.go_to(0)
    }

    fn go_to(&mut self, position: u32) -> Result<()> {
        self.position = position;
        self.next = None;
        self.has_logits = false;
        self.in_step = false;
        self.engine.seek(position)?;
        self.in_step = true;
        Ok(())
    }

    /// Feeds `inputs` from the current position on, one a step, then goes on with what it chooses
    /// (the most probable token, or a draw: [`SessionOptions::sampling`]) until
    /// `n_predict` tokens have been chosen after the last input (the choice of the last input's
    /// own step is the first of them). Without inputs it goes on with the token chosen last.
    /// `sink` sees every chosen token in order, also those after the inputs, and may stop.
    ///
    /// # Errors
    ///
    /// [`Error::Decode`] for an input outside the vocabulary (then nothing was computed) or
    /// logits that are not finite (then that step does not count): the session stays usable.
    /// [`Error::Usage`] without inputs where no token was chosen yet. [`Error::Driver`].
    pub fn decode(
        &mut self,
        inputs: &[u32],
        n_predict: u32,
        sink: &mut dyn FnMut(Chosen) -> ControlFlow<()>,
    ) -> Result<Finish> {
        for (i, token) in inputs.iter().enumerate() {
            if *token >= self.plan.vocab {
                let position = self.position.saturating_add(u32::try_from(i).unwrap_or(u32::MAX));
                let vocab = self.plan.vocab;
                let what = format!("token {token} is outside the vocabulary of {vocab}");
                return Err(Error::Decode { position, what });
            }
        }
        let wanted = match inputs.len() as u64 {
            0 => u64::from(n_predict),
            n => n + u64::from(n_predict).saturating_sub(1),
        };
        if wanted == 0 {
            return Ok(Finish::Done);
        }
        let held;
        let inputs = match (inputs, self.next) {
            ([], None) => {
                let why = "there is no chosen token to go on with: give an input";
                return Err(Error::Usage(why.to_owned()));
            }
            ([], Some(next)) => {
                held = [next];
                &held[..]
            }
            (given, _) => given,
        };
        let room = u64::from(self.capacity() - self.position);
        // At most the capacity.
        let steps = wanted.min(room) as u32;
        if steps > 0 && self.run(inputs, steps, sink)? {
            return Ok(Finish::Stopped);
        }
        Ok(if wanted > room { Finish::Capacity } else { Finish::Done })
    }

    /// Runs `steps ≥ 1` steps that all fit; tells whether the sink stopped them.
    fn run(
        &mut self,
        inputs: &[u32],
        steps: u32,
        sink: &mut dyn FnMut(Chosen) -> ControlFlow<()>,
    ) -> Result<bool> {
        let first = self.position;
        if !self.in_step {
            self.engine.seek(first)?;
        }
        let fitting = inputs.len().min(steps as usize);
        self.engine.force(first, &inputs[..fitting])?;
        // Until the run has ended well, only what the sink has seen is sure.
        self.in_step = false;
        let (position, next, has_logits) =
            (&mut self.position, &mut self.next, &mut self.has_logits);
        let mut stopped = false;
        let kept = self.engine.run(steps, &mut |chosen| {
            *position = chosen.position + 1;
            *next = Some(chosen.token);
            *has_logits = true;
            let flow = sink(chosen);
            stopped |= flow.is_break();
            flow
        })?;
        if self.position - first != kept {
            let seen = self.position - first;
            return Err(Error::Internal(format!("{kept} steps were kept, {seen} were seen")));
        }
        self.in_step = true;
        Ok(stopped)
    }

    /// Computes one step and gives the token chosen after it: for teacher forcing.
    ///
    /// # Errors
    ///
    /// As [`decode`](Self::decode), and [`Error::Decode`] when the cache is full.
    pub fn feed(&mut self, token: u32) -> Result<u32> {
        let position = self.position;
        let mut chosen = None;
        let finish = self.decode(&[token], 1, &mut |c| {
            chosen = Some(c.token);
            ControlFlow::Continue(())
        })?;
        chosen.ok_or_else(|| match finish {
            Finish::Capacity => {
                let what = format!("the cache of {} positions is full", self.capacity());
                Error::Decode { position, what }
            }
            Finish::Done | Finish::Stopped => Error::Internal("a step chose no token".to_owned()),
        })
    }

    /// Logits of the last step, `[vocab]`.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] before the first step; [`Error::Driver`].
    pub fn logits(&mut self) -> Result<Vec<f32>> {
        if !self.has_logits {
            return Err(Error::Usage("there are no logits before the first step".to_owned()));
        }
        self.engine.logits()
    }

    /// Fills the caches of `0..position` with seeded data, the same values on every backend, and
    /// goes to `position`.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] for a position beyond the capacity; [`Error::Driver`].
    pub fn seek(&mut self, position: u32, seed: u64) -> Result<()> {
        if position > self.capacity() {
            return Err(Error::Usage(format!(
                "position {position} is beyond the cache of {} positions",
                self.capacity()
            )));
        }
        self.go_to(position)?;
        self.engine.fill_cache(position, seed)
    }

    /// Readings of the clock in the last step, `[steps][blocks][8]` words; empty unless asked for.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`].
    pub fn trace(&mut self) -> Result<Vec<u32>> {
        self.engine.trace()
    }

    /// Fills the workspace with `byte` between two steps: no result depends on it, but for the
    /// logits of the last step.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`].
    pub fn poison(&mut self, byte: u8) -> Result<()> {
        self.has_logits = false;
        self.engine.poison(byte)
    }

    /// Looks whether a kernel has written outside its buffers; finds nothing without
    /// [`SessionOptions::red_zones`].
    ///
    /// # Errors
    ///
    /// [`Error::Verification`] with the buffer and byte; [`Error::Driver`].
    pub fn check_red_zones(&mut self) -> Result<()> {
        self.engine.check_red_zones()
    }

    /// The clock before the first step of a token and at the end of each step,
    /// `[tokens][steps + 1]` nanoseconds, of the last `tokens` tokens (1,024 at most are kept), oldest
    /// first; empty unless asked for, and where steps are issued one by one.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`].
    pub fn stamps(&mut self, tokens: u32) -> Result<Vec<u64>> {
        self.engine.stamps(tokens)
    }

    /// Computes the current position with the input `token`, and gives what step `step` of the plan
    /// wrote there: the buffers and the row of the cache. The position stays, and the next step
    /// needs an input.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] for a step that the plan does not have or a token outside the vocabulary;
    /// [`Error::Decode`] where the cache is full; [`Error::Driver`].
    pub fn outputs(&mut self, token: u32, step: usize) -> Result<Vec<Written>> {
        if step >= self.plan.steps.len() || token >= self.plan.vocab {
            let (steps, vocab) = (self.plan.steps.len(), self.plan.vocab);
            let what = format!("step {step} of {steps}, token {token} of {vocab}");
            return Err(Error::Usage(what));
        }
        if self.position >= self.capacity() {
            let what = format!("the cache of {} positions is full", self.capacity());
            return Err(Error::Decode { position: self.position, what });
        }
        (self.next, self.in_step, self.has_logits) = (None, false, false);
        self.engine.outputs(self.position, token, step)
    }

    /// Replays `tokens` tokens from the current position on, the first of them `token`, and says what
    /// they cost beside their kernels: once as ever, once with the clock noted at both ends of the
    /// graph. `None` on the CPU, and where each step is told about. The position stays, and the next
    /// step needs an input; what the cache holds behind the position is lost.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] for a token outside the vocabulary or tokens that do not fit the cache;
    /// [`Error::Driver`]; those of a capture.
    pub fn overhead(&mut self, token: u32, tokens: u32) -> Result<Option<Overhead>> {
        let (room, vocab) = (self.capacity() - self.position, self.plan.vocab);
        if tokens == 0 || tokens > room || token >= vocab {
            let what = format!("{tokens} tokens in {room} positions, token {token} of {vocab}");
            return Err(Error::Usage(what));
        }
        (self.next, self.in_step, self.has_logits) = (None, false, false);
        self.engine.overhead(self.position, token, tokens)
    }

    /// Opens or closes the range that nsys and ncu record when they are told to wait for it; nothing
    /// on the CPU.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`].
    pub fn profiler_range(&mut self, open: bool) -> Result<()> {
        self.engine.profiler_range(open)
    }

    /// Keys and values of a layer as f32, `[kv_heads, capacity, head_dim]` each.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] for a layer that the model does not have; [`Error::Driver`].
    pub fn cache(&mut self, layer: u32) -> Result<(Vec<f32>, Vec<f32>)> {
        let layers = self.plan.cache.layers;
        if layer >= layers {
            return Err(Error::Usage(format!("layer {layer}: the model has {layers}")));
        }
        self.engine.cache(layer)
    }
}

type Made = (DecodePlan, Box<dyn Engine>);

fn plan(checkpoint: &Checkpoint, options: &SessionOptions, kv: KvType) -> Result<DecodePlan> {
    let kv = options.kv.unwrap_or(kv);
    let greedy = arch::record(checkpoint, PlanOptions { capacity: options.capacity, kv })?;
    let plain = match options.sampling {
        Some(sampling) => greedy.sampled(sampling.checked()?),
        None => greedy,
    };
    Ok(if options.fused { fuse::fuse(&plain) } else { plain })
}

fn cpu(
    checkpoint: &Checkpoint,
    options: &SessionOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Made> {
    let plan = plan(checkpoint, options, KvType::F32)?;
    let stamps = options.trace.then(Vec::new);
    let engine = CpuEngine::new(checkpoint, &plan, options.debug, stamps, progress)?;
    Ok((plan, Box::new(engine)))
}

/// The engine on a device.
fn cuda(
    checkpoint: &Checkpoint,
    options: &SessionOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Made> {
    let plan = plan(checkpoint, options, KvType::F16)?;
    let (device, mode, debug) = (options.device, options.mode, options.debug);
    let SessionOptions { persistent, trace, red_zones, .. } = *options;
    let options = CudaOptions { device, mode, debug, persistent, trace, red_zones };
    let engine = CudaEngine::new(checkpoint, &plan, options, progress)?;
    Ok((plan, Box::new(engine)))
}
