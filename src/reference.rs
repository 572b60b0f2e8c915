//! Consumer 1: interprets a plan on the CPU. The definition of correct for every other consumer.

use crate::arch::read_vector;
use crate::checkpoint::Checkpoint;
use crate::engine::{
    CacheHalf, Chosen, DebugLevel, DeviceInfo, Engine, EngineStats, Look, Outputs, Overhead,
    Written, fill_row, stream,
};
use crate::error::{Defect, Error, Result};
use crate::ops::{Buf, HostMemory, HostState, HostWeight, Summary};
use crate::plan::{DecodePlan, Step, WeightSpec};
use rayon::prelude::*;
use std::fmt::Write as _;
use std::io::Write;
use std::ops::ControlFlow;
use std::time::Instant;

/// Reads the weights that `plan` names and makes the memory that it touches; `progress` is told
/// (bytes of weights done, of all).
///
/// # Errors
///
/// Those of [`Checkpoint::read`], and [`Error::Usage`] when the cache does not fit the memory.
pub fn load(
    checkpoint: &Checkpoint,
    plan: &DecodePlan,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<HostMemory> {
    let size = |spec: &WeightSpec| match spec {
        WeightSpec::Matrix { format, rows, columns, .. } => {
            format.row_bytes(*columns as usize).unwrap_or(0) as u64 * u64::from(*rows)
        }
        other => checkpoint.tensor(other.name()).map_or(0, |t| t.bytes),
    };
    let total = plan.weights.iter().map(size).sum();
    let mut done = 0;
    progress(done, total);
    let mut weights = Vec::with_capacity(plan.weights.len());
    for spec in &plan.weights {
        weights.push(read_weight(checkpoint, spec)?);
        done += size(spec);
        progress(done, total);
    }
    checkpoint.verify_unchanged()?;
    let elements = plan.cache.layer_elements();
    let too_large =
        || Error::Usage(format!("a cache of {} positions is too large", plan.cache.capacity));
    let elements = usize::try_from(elements).map_err(|_| too_large())?;
    let layers = plan.cache.layers as usize;
    // Asked for in one piece first: an allocation that fails inside the references aborts.
    let all = elements.checked_mul(2 * layers).ok_or_else(too_large)?;
    Vec::<f32>::new().try_reserve_exact(all).map_err(|_| too_large())?;
    Ok(plan.workspace().host_memory(weights, layers, elements))
}

fn read_weight(checkpoint: &Checkpoint, spec: &WeightSpec) -> Result<HostWeight> {
    match spec {
        WeightSpec::Matrix { name, first_row, format, rows, columns, .. } => {
            let info = checkpoint.tensor(name).ok_or_else(|| {
                let why = "the plan names a tensor that is not there";
                Error::invalid(checkpoint.path(), name, None, Defect::MissingTensor, why)
            })?;
            let row = format.row_bytes(*columns as usize).unwrap_or(0);
            let length = row.saturating_mul(*rows as usize);
            let mut bytes = Vec::new();
            bytes.try_reserve_exact(length).map_err(|_| {
                Error::Usage(format!("no memory for the {length} bytes of tensor {name}"))
            })?;
            bytes.resize(length, 0);
            checkpoint.read(info, u64::from(*first_row) * row as u64, &mut bytes)?;
            Ok(HostWeight::Matrix { format: *format, columns: *columns as usize, bytes })
        }
        WeightSpec::Vector { name, first, len } => {
            let all = read_vector(checkpoint, name)?;
            let part = all.into_iter().skip(*first as usize).take(*len as usize);
            Ok(HostWeight::Vector(part.collect()))
        }
        WeightSpec::Computed { values, .. } => Ok(HostWeight::Vector(values.clone())),
    }
}

/// Computes one token: every step of `plan` by its reference, in order. Token and position are
/// those of `memory.state`; the choice is there afterwards.
///
/// # Errors
///
/// [`Error::Decode`] for a position at capacity or a token outside the vocabulary (nothing is
/// written then), and for logits that are not finite.
pub fn interpret(plan: &DecodePlan, memory: &mut HostMemory) -> Result<()> {
    interpret_with(plan, memory, &mut |_, _| {})
}

/// [`interpret`] with a hook after each step, which gets the step's index. Hook and steps run on a
/// thread of rayon's pool, so that a step does not wake the pool anew.
///
/// # Errors
///
/// As there.
pub fn interpret_with(
    plan: &DecodePlan,
    memory: &mut HostMemory,
    after: &mut (dyn FnMut(usize, &HostMemory) + Send),
) -> Result<()> {
    let HostState { token, position, .. } = memory.state;
    let fail = |what: String| Err(Error::Decode { position, what });
    if position >= plan.cache.capacity {
        return fail(format!("the cache of {} positions is full", plan.cache.capacity));
    }
    if token >= plan.vocab {
        return fail(format!("token {token} is outside the vocabulary of {}", plan.vocab));
    }
    rayon::scope(|_| {
        for (i, step) in plan.steps.iter().enumerate() {
            step.op.describe().reference(memory);
            after(i, memory);
        }
    });
    if memory.state.finite { Ok(()) } else { fail("a logit is not finite".to_owned()) }
}

/// The CPU's engine.
pub(crate) struct CpuEngine {
    plan: DecodePlan,
    memory: HostMemory,
    debug: DebugLevel,
    info: DeviceInfo,
    /// First forced position and the inputs from there on.
    forced: (u32, Vec<u32>),
    load_seconds: f64,
    /// Where the clock of `stamps` starts.
    start: Instant,
    /// The clock before the first step and at the end of each, ns, if it is kept: of the last run.
    stamps: Option<Vec<u64>>,
    /// Which steps debug lines are of.
    look: Look,
    /// Where debug lines go, if not to the log.
    out: Option<Box<dyn Write + Send>>,
}

impl CpuEngine {
    /// `stamps` is where the clock is kept, if it is.
    pub(crate) fn new(
        checkpoint: &Checkpoint,
        plan: &DecodePlan,
        debug: DebugLevel,
        stamps: Option<Vec<u64>>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let start = Instant::now();
        let memory = load(checkpoint, plan, progress)?;
        Ok(Self {
            plan: plan.clone(),
            memory,
            debug,
            info: cpu_info(),
            forced: (0, Vec::new()),
            load_seconds: start.elapsed().as_secs_f64(),
            start,
            stamps,
            look: Look::default(),
            out: None,
        })
    }

    fn input(&self, position: u32) -> u32 {
        let (first, tokens) = &self.forced;
        let at = position.checked_sub(*first).and_then(|i| tokens.get(i as usize));
        at.copied().unwrap_or(self.memory.state.next)
    }
}

/// Name and threads of this machine's CPU.
fn cpu_info() -> DeviceInfo {
    let read = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = read.lines().find(|l| l.starts_with("model name"));
    let name = model.and_then(|l| l.split_once(": ")).map_or("CPU", |(_, name)| name);
    let sms = u32::try_from(rayon::current_num_threads()).unwrap_or(0);
    DeviceInfo { name: name.trim().to_owned(), sms, ..DeviceInfo::default() }
}

/// A step's label, op and shape, and what it wrote.
fn told(position: u32, step: &Step, written: &[Written]) -> String {
    let op = step.op.describe();
    let mut line = format!("position {position} {} {} {}", step.label, op.name(), op.shape());
    for w in written {
        let _ = write!(line, " | {} {}", w.name, Summary::of(&w.values));
    }
    line
}

impl Engine for CpuEngine {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn backend(&self) -> &'static str {
        "cpu"
    }

    fn mode(&self) -> &'static str {
        "reference"
    }

    fn stats(&self) -> EngineStats {
        EngineStats { load_seconds: self.load_seconds, ..EngineStats::default() }
    }

    fn seek(&mut self, position: u32) -> Result<()> {
        self.memory.state = HostState { position, ..HostState::default() };
        self.forced = (position, Vec::new());
        Ok(())
    }

    fn force(&mut self, position: u32, tokens: &[u32]) -> Result<()> {
        self.forced = (position, tokens.to_vec());
        Ok(())
    }

    fn run(&mut self, steps: u32, sink: &mut dyn FnMut(Chosen) -> ControlFlow<()>) -> Result<u32> {
        if let Some(stamps) = &mut self.stamps {
            stamps.clear();
        }
        let start = self.start;
        let stamp = |stamps: &mut Option<Vec<u64>>| {
            if let Some(stamps) = stamps {
                stamps.push(start.elapsed().as_nanos() as u64);
            }
        };
        for step in 0..steps {
            let position = self.memory.state.position;
            self.memory.state.token = self.input(position);
            let (plan, debug, out) = (&self.plan, self.debug, &mut self.out);
            let (stamps, look) = (&mut self.stamps, &self.look);
            let mut kept = Ok(());
            stamp(stamps);
            interpret_with(plan, &mut self.memory, &mut |i, memory| {
                stamp(stamps);
                let step = &plan.steps[i];
                if debug == DebugLevel::Off || !look.steps.selects(&step.label) {
                    return;
                }
                let mut from = memory;
                let written = match from.all(plan, step, position) {
                    Ok(written) if kept.is_ok() => written,
                    Ok(_) => return,
                    Err(error) => return kept = Err(error),
                };
                kept = look.keep(position, &step.label, &written);
                let line = told(position, step, &written);
                match out {
                    // A reader that went away does not stop the computation.
                    Some(out) => drop(writeln!(out, "{line}")),
                    None => log::info!("{line}"),
                }
            })?;
            kept?;
            self.memory.state.position = position + 1;
            let token = self.memory.state.next;
            if sink(Chosen { position, token, device_ns: None }).is_break() {
                return Ok(step + 1);
            }
        }
        Ok(steps)
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        Ok(self.memory.buf(self.plan.logits).to_vec())
    }

    fn trace(&mut self) -> Result<Vec<u32>> {
        Ok(Vec::new())
    }

    fn poison(&mut self, byte: u8) -> Result<()> {
        for buf in (0..self.plan.buffers.len()).map(|i| Buf(i as u32)) {
            self.memory.buf_mut(buf).fill(f32::from_bits(u32::from_ne_bytes([byte; 4])));
        }
        Ok(())
    }

    /// A reference that reached outside its buffers would have panicked.
    fn check_red_zones(&mut self) -> Result<()> {
        Ok(())
    }

    fn stamps(&mut self, tokens: u32) -> Result<Vec<u64>> {
        let all = self.stamps.as_deref().unwrap_or_default();
        let wanted = tokens as usize * (self.plan.steps.len() + 1);
        Ok(all[all.len().saturating_sub(wanted)..].to_vec())
    }

    fn look(&mut self, look: Look) {
        self.look = look;
    }

    fn outputs(&mut self, position: u32, token: u32, step: usize) -> Result<Vec<Written>> {
        self.memory.state = HostState { position, token, ..HostState::default() };
        let plan = &self.plan;
        let mut written = Ok(Vec::new());
        let done = interpret_with(plan, &mut self.memory, &mut |i, memory| {
            if let Some(here) = plan.steps.get(i).filter(|_| i == step) {
                let mut from = memory;
                written = from.all(plan, here, position);
            }
        });
        // What the steps wrote is there, finite or not.
        if self.memory.state.finite {
            done?;
        }
        written
    }

    fn overhead(&mut self, _position: u32, _token: u32, _tokens: u32) -> Result<Option<Overhead>> {
        Ok(None)
    }

    fn profiler_range(&mut self, _open: bool) -> Result<()> {
        Ok(())
    }

    fn debug_to(&mut self, out: Box<dyn Write + Send>) {
        self.out = Some(out);
    }

    fn fill_cache(&mut self, positions: u32, seed: u64) -> Result<()> {
        let c = self.plan.cache;
        let (dim, rows) = (c.head_dim as usize, c.capacity as usize * c.head_dim as usize);
        for layer in 0..c.layers {
            let (keys, values) = self.memory.cache_mut(layer);
            for (half, all) in [(CacheHalf::Keys, keys), (CacheHalf::Values, values)] {
                let stream = stream(seed, layer, half);
                for (head, of_head) in (0..c.kv_heads).zip(all.chunks_exact_mut(rows)) {
                    let filled = &mut of_head[..positions as usize * dim];
                    filled.par_chunks_exact_mut(dim).enumerate().for_each(|(p, row)| {
                        fill_row(stream, head, p as u32, row);
                    });
                }
            }
        }
        Ok(())
    }

    fn cache(&mut self, layer: u32) -> Result<(Vec<f32>, Vec<f32>)> {
        let (keys, values) = self.memory.cache(layer);
        Ok((keys.to_vec(), values.to_vec()))
    }
}
