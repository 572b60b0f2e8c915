//! The engine on a device: one graph a token, launched ahead of the host, which reads the chosen
//! tokens from a ring in mapped memory.
//!
//! ```text
//! host    launch launch … launch          poll ──▶ sink   poll ──▶ sink
//! device        token p   token p+1  …    token p+31
//! ```
//!
//! The device chooses and advances by itself; what it ran ahead of a sink that says stop is thrown
//! away by setting the step state back. Cache rows beyond the position are written again before
//! they are read.

mod inspect;
mod overhead;

use super::bind::{BoundPlan, KernelSource, Want};
use super::byte_plan::BytePlan;
use super::driver::{Context, Device, Frozen, Stream, calls};
use super::eager::{Debugger, OnDevice};
use super::fill::fill_caches;
use super::graph::CapturedGraph;
use super::issue::issue;
use super::kernels;
use super::stamps::Stamps;
use super::step_state::{Entry, NOT_FORCED, RingReader, StepState};
use crate::checkpoint::Checkpoint;
use crate::engine::{
    Chosen, DebugLevel, DeviceInfo, Engine, EngineStats, Look, Mode, Outputs, Overhead, Written,
};
use crate::error::{Error, Result};
use crate::plan::DecodePlan;
use crate::reference;
use std::io::Write;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Tokens in flight, at most: more than covers a launch, fewer than the ring's slots.
const GRAPHS_AHEAD: u32 = 32;
/// As [`GRAPHS_AHEAD`], launch by launch.
const EAGER_AHEAD: u32 = 2;
/// Polls before the thread gives way to others between them.
const SPINS: u32 = 4096;
/// Polls between two looks at the clock.
const POLLS: u32 = 64;
/// After this time without a token the driver is asked whether the device still works.
const FIRST_QUERY: Duration = Duration::from_millis(50);
/// After this time without a token the device counts as lost, unless another is set.
const DEADLINE: Duration = Duration::from_secs(120);

/// What an engine is made for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CudaOptions {
    /// Ordinal of the device among those that the process may see.
    pub device: u32,
    /// Replay a graph, or issue launch by launch.
    pub mode: Mode,
    /// Anything but off is launch by launch.
    pub debug: DebugLevel,
    /// The whole token in the persistent kernel, where the plan has a program.
    pub persistent: bool,
    /// Readings of the clock are kept: by the persistent kernel, or by a stamp between the steps of
    /// the graph.
    pub trace: bool,
    /// Buffers and caches lie between bytes that no kernel may touch.
    pub red_zones: bool,
}

/// A plan bound to a device, and where it stands.
pub struct CudaEngine {
    stream: Stream,
    graph: Option<CapturedGraph>,
    /// The clock between the graph's steps.
    stamps: Option<Arc<Stamps>>,
    debug: Option<Debugger>,
    plan: Arc<BoundPlan>,
    /// Given up only while [`Self::overhead`] makes room for its stamps.
    frozen: Option<Frozen>,
    context: Context,
    info: DeviceInfo,
    stats: EngineStats,
    reader: RingReader,
    /// Tokens launched since the engine was made: above every sequence in the ring.
    launched: u32,
    position: u32,
    /// Input of `position`, once it is known.
    input: Option<u32>,
    /// The last step that counts: its position and input.
    last: Option<(u32, u32)>,
    /// Whether the device's step state is not `position` and `input`.
    stale: bool,
    /// Whether the logits are those of a step beyond `last`.
    overrun: bool,
    /// First forced position and the inputs from there on.
    forced: (u32, Vec<u32>),
    /// Positions of the device's table that are forced.
    table: (u32, u32),
    /// After this time without a token the device counts as lost.
    deadline: Duration,
    /// Time spent waiting for tokens, where that is asked for.
    waited: Option<Duration>,
}

impl CudaEngine {
    /// Binds `plan` to a device with the embedded kernels; captures its graph where the mode is
    /// graph. `progress` is told (bytes of weights done, of all).
    ///
    /// # Errors
    ///
    /// [`Error::NoDevice`], and those of [`BoundPlan::new`] and [`CapturedGraph::capture`].
    pub fn new(
        checkpoint: &Checkpoint,
        plan: &DecodePlan,
        options: CudaOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        Self::with_kernels(checkpoint, plan, options, &kernels::ptx, progress)
    }

    /// As [`Self::new`], with other kernels.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn with_kernels(
        checkpoint: &Checkpoint,
        plan: &DecodePlan,
        options: CudaOptions,
        kernels: KernelSource<'_>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let device = Device::get(options.device)?;
        let context = Context::new(device)?;
        let (free, _) = context.memory()?;
        let info = info(device)?;
        let CudaOptions { persistent, trace, red_zones, .. } = options;
        let want = Want { persistent, trace, red_zones };
        let plan = Arc::new(BoundPlan::new(&context, checkpoint, plan, kernels, want, progress)?);
        let stream = Stream::new(&context)?;
        let before = calls::snapshot();
        let replays = (options.mode, options.debug) == (Mode::Graph, DebugLevel::Off);
        let stamps = (replays && options.trace && plan.token().is_none())
            .then(|| Stamps::new(&context, &plan, kernels).map(Arc::new))
            .transpose()?;
        let graph = match &stamps {
            Some(stamps) => Some(CapturedGraph::capture_stamped(&plan, &stream, stamps)?),
            None if replays => Some(CapturedGraph::capture(&plan, &stream)?),
            None => None,
        };
        let debug = match options.debug {
            DebugLevel::Off => None,
            DebugLevel::Print => Some(Debugger::new(&context, None)?),
            DebugLevel::Compare => {
                let host = reference::load(checkpoint, plan.plan(), &mut |_, _| {})?;
                Some(Debugger::new(&context, Some(host))?)
            }
        };
        let (load, jit) = plan.times();
        let stats = EngineStats {
            captures: (calls::snapshot() - before).captures,
            load_seconds: load.as_secs_f64(),
            jit_seconds: jit.as_secs_f64(),
            capture_seconds: graph.as_ref().map_or(0.0, |g| g.time().as_secs_f64()),
            memory: Some(plan.bytes().with_taken(free.saturating_sub(context.memory()?.0))),
            ..EngineStats::default()
        };
        Ok(Self {
            stream,
            graph,
            stamps,
            debug,
            plan,
            frozen: Some(context.freeze()),
            context,
            info,
            stats,
            reader: RingReader::default(),
            launched: 0,
            position: 0,
            input: None,
            last: None,
            stale: true,
            overrun: false,
            forced: (0, Vec::new()),
            table: (0, 0),
            deadline: DEADLINE,
            waited: None,
        })
    }

    /// Counts the device as lost after `deadline` without a token; 120 seconds unless set.
    ///
    /// Only the wait for a token is bounded: copies to and from the device (while it is made, in
    /// [`seek`](Self::seek), [`logits`](Self::logits), [`cache`](Self::cache)) return when the
    /// driver does. Nothing waits for a device that counts as lost, dropping the engine included.
    pub fn give_up_after(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    /// The plan and its memory.
    pub fn bound(&self) -> &BoundPlan {
        &self.plan
    }

    /// Device memory of the plan, bytes.
    pub fn memory(&self) -> BytePlan {
        self.plan.bytes()
    }

    /// As `Engine::seek`.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`].
    pub fn seek(&mut self, position: u32) -> Result<()> {
        self.position = position;
        (self.input, self.last) = (None, None);
        (self.stale, self.overrun) = (true, false);
        self.force(position, &[])
    }

    /// As `Engine::force`.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] beyond the capacity; [`Error::Driver`].
    pub fn force(&mut self, position: u32, tokens: &[u32]) -> Result<()> {
        let capacity = self.plan.plan().cache.capacity;
        let end = u32::try_from(tokens.len()).ok().and_then(|n| position.checked_add(n));
        if end.is_none_or(|end| end > capacity) {
            let n = tokens.len();
            return Err(Error::Internal(format!("{n} inputs from {position} on, of {capacity}")));
        }
        // The table is read by the steps before; this one's input is in the step state. The stream
        // keeps what ran ahead apart from all of this.
        let here = position == self.position;
        let (from, rest) = match tokens.split_first() {
            Some((_, rest)) if here => (position + 1, rest),
            _ => (position, tokens),
        };
        let (old_from, old_len) = self.table;
        if old_len > 0 {
            let none = vec![NOT_FORCED; old_len as usize];
            self.plan.set_forced(&self.stream, old_from, &none)?;
        }
        if !rest.is_empty() {
            self.plan.set_forced(&self.stream, from, rest)?;
        }
        self.table = (from, rest.len() as u32);
        if let (true, Some(first)) = (here, tokens.first()) {
            self.stale |= self.input != Some(*first);
            self.input = Some(*first);
        }
        self.forced = (position, tokens.to_vec());
        Ok(())
    }

    /// As `Engine::run`. Ends early, and gives the steps that count, where the cache is full.
    ///
    /// # Errors
    ///
    /// [`Error::Decode`] with the position for a token outside the vocabulary or logits that are
    /// not finite: the engine stays usable. [`Error::Driver`].
    pub fn run(
        &mut self,
        steps: u32,
        sink: &mut dyn FnMut(Chosen) -> ControlFlow<()>,
    ) -> Result<u32> {
        let before = calls::snapshot();
        let result = self.run_steps(steps, sink);
        let made = calls::snapshot() - before;
        self.stats.driver_calls += made.driver;
        self.stats.captures += made.captures;
        self.stats.allocations_after_freeze += made.allocations;
        result
    }

    fn run_steps(
        &mut self,
        steps: u32,
        sink: &mut dyn FnMut(Chosen) -> ControlFlow<()>,
    ) -> Result<u32> {
        if steps == 0 {
            return Ok(0);
        }
        self.settle()?;
        // Until the run has ended well the device may be anywhere.
        (self.stale, self.overrun) = (true, true);
        let ahead = match (&self.debug, &self.graph) {
            (Some(_), _) => 1,
            (None, Some(_)) => GRAPHS_AHEAD,
            (None, None) => EAGER_AHEAD,
        };
        let (mut launched, mut kept) = (0, 0);
        while kept < steps {
            while launched < steps && launched - kept < ahead {
                self.launch()?;
                launched += 1;
            }
            let (token, device_ns) = match self.answer()? {
                Entry::Chosen { token, device_ns } => (token, device_ns),
                // What was launched behind it finds the status and leaves everything as it is.
                Entry::Refused(status) if status.is_capacity_only() => {
                    self.overrun = false;
                    return Ok(kept);
                }
                Entry::Refused(status) => {
                    return Err(status.error(self.position, self.plan.plan().vocab));
                }
            };
            if let Some(debug) = &mut self.debug {
                debug.chosen(&self.plan, token)?;
            }
            let position = self.position;
            self.last = self.input.map(|input| (position, input));
            self.position = position + 1;
            self.input = Some(self.forced_at(self.position).unwrap_or(token));
            kept += 1;
            if sink(Chosen { position, token, device_ns: Some(device_ns) }).is_break() {
                break;
            }
        }
        (self.stale, self.overrun) = (launched > kept, launched > kept);
        Ok(kept)
    }

    fn forced_at(&self, position: u32) -> Option<u32> {
        let (first, tokens) = &self.forced;
        let at = position.checked_sub(*first)?;
        tokens.get(at as usize).copied()
    }

    /// Makes the device's step state what the host holds it for.
    fn settle(&mut self) -> Result<()> {
        if !self.stale {
            return Ok(());
        }
        let Some(token) = self.input else {
            return Err(Error::Internal(format!("position {} has no input", self.position)));
        };
        self.go_to(self.position, token)
    }

    fn go_to(&mut self, position: u32, token: u32) -> Result<()> {
        // Beyond every sequence that a step in flight may still write.
        self.reader.go_to(self.launched);
        let cache = &self.plan.plan().cache;
        let state = StepState {
            token,
            position,
            capacity: cache.capacity,
            steps: self.launched,
            vocab: self.plan.plan().vocab,
            ..StepState::default()
        };
        self.plan.set_state(&self.stream, state)
    }

    /// Queues one token.
    fn launch(&mut self) -> Result<()> {
        self.launched = self.launched.wrapping_add(1);
        match (&mut self.debug, &mut self.graph) {
            (Some(debug), _) => debug.token(&self.plan, &self.stream),
            (None, Some(graph)) => graph.replay(&self.stream),
            (None, None) => issue(&self.plan, &self.stream, Some(&mut |_| Ok(()))),
        }
    }

    /// Waits for the next entry of the ring, without the driver as long as tokens come.
    fn answer(&mut self) -> Result<Entry> {
        let mut polls = 0u32;
        // A run that is not asked how long it waits looks at the clock later, and rarely.
        let mut start: Option<Instant> = None;
        let mut query_at = FIRST_QUERY;
        loop {
            if let Some(entry) = self.reader.poll(self.plan.ring())? {
                if let (Some(waited), Some(start)) = (&mut self.waited, start) {
                    *waited += start.elapsed();
                }
                return Ok(entry);
            }
            if self.waited.is_some() && start.is_none() {
                start = Some(Instant::now());
            }
            polls = polls.wrapping_add(1);
            if polls < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
            if !polls.is_multiple_of(POLLS) {
                continue;
            }
            let waited = start.get_or_insert_with(Instant::now).elapsed();
            if waited < query_at {
                continue;
            }
            query_at = (waited * 2).min(self.deadline);
            // A fault is told here, and not waited for.
            if self.stream.is_done()? {
                let entry = self.reader.poll(self.plan.ring())?;
                return entry.ok_or_else(|| {
                    let position = self.position;
                    Error::Internal(format!("position {position}: the graph ended without a token"))
                });
            }
            if waited >= self.deadline {
                return Err(self.context.give_up(&format!(
                    "position {}: no token within {} seconds",
                    self.position,
                    self.deadline.as_secs_f32()
                )));
            }
        }
    }

    /// Logits of the last step that counts, `[vocab]`.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`].
    pub fn logits(&mut self) -> Result<Vec<f32>> {
        if let (true, Some((position, input))) = (self.overrun, self.last) {
            // Steps that do not count have overwritten them: the same step gives them again.
            self.stale = true;
            self.go_to(position, input)?;
            self.launched = self.launched.wrapping_add(1);
            match &mut self.graph {
                Some(graph) => graph.replay(&self.stream)?,
                None => issue(&self.plan, &self.stream, Some(&mut |_| Ok(())))?,
            }
            match self.answer()? {
                Entry::Chosen { .. } => self.overrun = false,
                Entry::Refused(s) => return Err(s.error(position, self.plan.plan().vocab)),
            }
        }
        self.plan.buffer(&self.stream, self.plan.plan().logits)
    }

    /// As `Engine::fill_cache`.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] beyond the capacity; [`Error::Driver`].
    pub fn fill_cache(&mut self, positions: u32, seed: u64) -> Result<()> {
        let capacity = self.plan.plan().cache.capacity;
        if positions > capacity {
            return Err(Error::Internal(format!("{positions} positions to fill, of {capacity}")));
        }
        fill_caches(&self.context, &self.stream, &self.plan, positions, seed)
    }

    /// Keys and values of a layer as f32, `[kv_heads, capacity, head_dim]` each.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] for a layer that the model does not have; [`Error::Driver`].
    pub fn cache(&mut self, layer: u32) -> Result<(Vec<f32>, Vec<f32>)> {
        OnDevice { plan: &self.plan, stream: &self.stream }.cache(layer)
    }

    /// Counters since the engine was made.
    pub fn stats(&self) -> EngineStats {
        self.stats
    }

    /// Where the debug lines go, from here on; the log until then.
    pub fn debug_to(&mut self, out: Box<dyn Write + Send>) {
        if let Some(debug) = &mut self.debug {
            debug.write_to(out);
        }
    }
}

impl Drop for CudaEngine {
    fn drop(&mut self) {
        // What is in flight uses the memory that goes next. A fault was told where it happened.
        let _ = self.stream.synchronize();
    }
}

fn info(device: Device) -> Result<DeviceInfo> {
    let info = device.info()?;
    Ok(DeviceInfo {
        name: info.name,
        total_memory: info.memory_bytes,
        sms: info.sm_count,
        compute: info.compute_capability,
        driver_version: info.driver_version,
        ordinal: info.ordinal,
        pci_bus_id: info.pci_bus_id,
    })
}

impl Engine for CudaEngine {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn backend(&self) -> &'static str {
        "cuda"
    }

    fn mode(&self) -> &'static str {
        if self.graph.is_some() { "graph" } else { "eager" }
    }

    fn stats(&self) -> EngineStats {
        self.stats
    }

    fn seek(&mut self, position: u32) -> Result<()> {
        CudaEngine::seek(self, position)
    }

    fn force(&mut self, position: u32, tokens: &[u32]) -> Result<()> {
        CudaEngine::force(self, position, tokens)
    }

    fn run(&mut self, steps: u32, sink: &mut dyn FnMut(Chosen) -> ControlFlow<()>) -> Result<u32> {
        CudaEngine::run(self, steps, sink)
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        CudaEngine::logits(self)
    }

    fn fill_cache(&mut self, positions: u32, seed: u64) -> Result<()> {
        CudaEngine::fill_cache(self, positions, seed)
    }

    fn cache(&mut self, layer: u32) -> Result<(Vec<f32>, Vec<f32>)> {
        CudaEngine::cache(self, layer)
    }

    fn trace(&mut self) -> Result<Vec<u32>> {
        CudaEngine::trace(self)
    }

    fn poison(&mut self, byte: u8) -> Result<()> {
        CudaEngine::poison(self, byte)
    }

    fn check_red_zones(&mut self) -> Result<()> {
        CudaEngine::check_red_zones(self)
    }

    fn stamps(&mut self, tokens: u32) -> Result<Vec<u64>> {
        CudaEngine::stamps(self, tokens)
    }

    fn overhead(&mut self, position: u32, token: u32, tokens: u32) -> Result<Option<Overhead>> {
        CudaEngine::overhead(self, position, token, tokens)
    }

    fn profiler_range(&mut self, open: bool) -> Result<()> {
        CudaEngine::profiler_range(self, open)
    }

    fn look(&mut self, look: Look) {
        if let Some(debug) = &mut self.debug {
            debug.look(look);
        }
    }

    fn outputs(&mut self, position: u32, token: u32, step: usize) -> Result<Vec<Written>> {
        CudaEngine::outputs(self, position, token, step)
    }

    fn debug_to(&mut self, out: Box<dyn Write + Send>) {
        CudaEngine::debug_to(self, out);
    }
}
