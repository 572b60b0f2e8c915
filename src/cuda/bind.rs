//! A plan bound to device memory: weights uploaded, every address resolved, every kernel loaded.
//!
//! ```text
//! weights     Σ tiles of every matrix, f32 vectors        one allocation
//! caches      keys and values of every layer, zeroed      one allocation, with red zones on request
//! workspace   the plan's layout, poisoned with 0xFF       one allocation, with red zones on request
//! state       StepState | counters | forced [capacity]    one allocation
//! ring        RING_SLOTS × 16 bytes, mapped host memory
//! ```

use super::byte_plan::BytePlan;
use super::driver::{Context, DeviceMemory, MappedMemory, PinnedMemory, Stream};
use super::issue::BoundStep;
use super::kernels::PROGRAMMATIC_COMPUTE;
use super::modules::{Functions, load, no_kernel, sources};
use super::program::{BoundProgram, MODULE};
use super::red_zones::{RedZones, ZONE};
use super::step_state::{NOT_FORCED, RING_BYTES, Status, StepState};
use super::upload::{ALIGNMENT, Target, WeightMap, upload};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::ops::{Arg, Buf, Gpu, Launch};
use crate::plan::program::Program;
use crate::plan::{DecodePlan, Placement, WorkspaceLayout};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The PTX text of a module for a compute capability: [`super::kernels::ptx`], or a test's.
pub type KernelSource<'a> = &'a dyn Fn(&str, (u32, u32)) -> Option<&'static str>;

/// How a plan is to be issued.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Want {
    /// The whole token in the persistent kernel, where the plan has a program.
    pub persistent: bool,
    /// The persistent kernel keeps readings of the clock.
    pub trace: bool,
    /// Every workspace buffer and every layer's keys and values between bytes that no kernel may
    /// touch; see [`BoundPlan::check_red_zones`].
    pub red_zones: bool,
}

/// Byte offset of what stays zero behind the step state in the state's allocation.
const ZEROS: u64 = size_of::<StepState>() as u64;
/// Byte offset of the arrival counters in the state's allocation.
const COUNTERS: u64 = ALIGNMENT;
/// Bytes of the arrival counters.
const COUNTER_BYTES: u64 = 4096;
/// Byte offset of the forced tokens.
pub(super) const FORCED: u64 = COUNTERS + COUNTER_BYTES;
/// Every address that a kernel gets is a multiple of this: the widest load is 16 bytes.
const ADDRESS_ALIGNMENT: u64 = 16;

/// Keys and values of every layer in one allocation.
#[derive(Clone, Copy, Debug)]
struct CacheMap {
    /// Bytes of one layer's keys (or values), aligned, and of the red zone behind them.
    half: u64,
    /// Bytes of a red zone.
    zone: u64,
}

impl CacheMap {
    fn of(plan: &DecodePlan, zone: u64) -> Self {
        let bytes = plan.cache.layer_elements() * plan.cache.kind.bytes();
        Self { half: bytes.next_multiple_of(ALIGNMENT) + zone, zone }
    }

    fn keys(self, layer: u32) -> u64 {
        self.zone + 2 * u64::from(layer) * self.half
    }

    fn values(self, layer: u32) -> u64 {
        self.keys(layer) + self.half
    }
}

/// Device addresses of everything that an argument can name.
#[derive(Clone, Debug)]
struct Addresses {
    weights: Vec<u64>,
    buffers: Vec<Option<u64>>,
    caches: u64,
    map: CacheMap,
    layers: u32,
    step: u64,
    ring: u64,
    program: u64,
    trace: u64,
}

impl Addresses {
    /// The parameter slot of `arg`.
    fn slot(&self, label: &str, arg: &Arg) -> Result<u64> {
        let outside = || Error::Internal(format!("{label}: {arg:?} names nothing in the plan"));
        let layer = |l: u32| if l < self.layers { Ok(l) } else { Err(outside()) };
        let address = match arg {
            Arg::Null => return Ok(0),
            Arg::U32(v) => return Ok(u64::from(*v)),
            Arg::F32(v) => return Ok(u64::from(v.to_bits())),
            Arg::Buf(b) => self.buffers.get(b.0 as usize).copied().flatten().ok_or_else(outside)?,
            Arg::Weight(w) => self.weights.get(w.0 as usize).copied().ok_or_else(outside)?,
            Arg::Step => self.step,
            Arg::Zeros => self.step + ZEROS,
            Arg::Counters => self.step + COUNTERS,
            Arg::Forced => self.step + FORCED,
            Arg::Ring => self.ring,
            Arg::Program => self.program,
            Arg::Trace if self.trace == 0 => return Ok(0),
            Arg::Trace => self.trace,
            Arg::Keys(l) => self.caches + self.map.keys(layer(*l)?),
            Arg::Values(l) => self.caches + self.map.values(layer(*l)?),
        };
        if address == 0 || !address.is_multiple_of(ADDRESS_ALIGNMENT) {
            return Err(Error::Internal(format!("{label}: {arg:?} has the address {address:#x}")));
        }
        Ok(address)
    }
}

/// A plan and all device memory and code that its steps use.
#[derive(Debug)]
pub struct BoundPlan {
    plan: DecodePlan,
    gpu: Gpu,
    launches: Vec<Launch>,
    steps: Vec<BoundStep>,
    /// All steps as one launch.
    token: Option<(Launch, BoundStep)>,
    program: Option<BoundProgram>,
    layout: WorkspaceLayout,
    cache_map: CacheMap,
    /// Of the workspace, of the caches.
    red_zones: [RedZones; 2],
    bytes: BytePlan,
    caches: DeviceMemory,
    workspace: DeviceMemory,
    state: DeviceMemory,
    ring: MappedMemory,
    /// Only kernels look at them.
    _weights: DeviceMemory,
    /// Seconds: weights; kernels.
    times: (Duration, Duration),
}

/// Copies staging buffers to the weights' allocation, on a stream of its own.
struct Staging<'a> {
    context: &'a Context,
    stream: Stream,
    weights: &'a DeviceMemory,
}

/// A page-locked staging buffer.
struct Pinned(PinnedMemory);

impl AsMut<[u8]> for Pinned {
    fn as_mut(&mut self) -> &mut [u8] {
        self.0.as_mut_slice()
    }
}

impl Target for Staging<'_> {
    type Buffer = Pinned;

    fn buffer(&self, bytes: u64) -> Result<Pinned> {
        PinnedMemory::alloc(self.context, "staging of weights", bytes).map(Pinned)
    }

    fn copy(&self, buffer: &Pinned, to: u64, bytes: u64) -> Result<()> {
        let staged = buffer.0.as_slice().get(..bytes as usize);
        let staged = staged.ok_or_else(|| Error::Internal("a window above its buffer".into()))?;
        self.weights.upload(&self.stream, to, staged).map_err(|e| e.at("weights"))
    }
}

/// What the geometry of a launch depends on, for the device of `context`.
///
/// # Errors
///
/// [`Error::Driver`] when the driver does not answer.
pub fn gpu_of(context: &Context) -> Result<Gpu> {
    use super::driver::attribute as a;
    let device = context.device();
    Ok(Gpu {
        sms: device.attribute(a::MULTIPROCESSOR_COUNT)?,
        compute: (
            device.attribute(a::COMPUTE_CAPABILITY_MAJOR)?,
            device.attribute(a::COMPUTE_CAPABILITY_MINOR)?,
        ),
        shared_per_block: device.attribute(a::SHARED_BYTES_PER_BLOCK_OPTIN)?,
    })
}

impl BoundPlan {
    /// Binds `plan` to the device of `context`: checks all launches against `kernels`, compares
    /// the memory needed with what is free, allocates, uploads the weights of `checkpoint` and
    /// resolves every address. `progress` is told (bytes of weights done, of all).
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] with the parts of the memory; [`Error::Unsupported`] for a device or
    /// a weight type without kernels; [`Error::InvalidModel`]; [`Error::Driver`].
    pub fn new(
        context: &Context,
        checkpoint: &Checkpoint,
        plan: &DecodePlan,
        kernels: KernelSource<'_>,
        want: Want,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let gpu = gpu_of(context)?;
        let stream = Stream::new(context)?;
        let program = match Program::of(plan, &gpu) {
            Some(p) if want.persistent && kernels(MODULE, gpu.compute).is_some() => {
                Some(BoundProgram::new(context, &stream, p, want.trace)?)
            }
            _ => None,
        };
        let mut launches: Vec<Launch> = match &program {
            Some(p) => (0..p.steps()).map(|i| p.launch(i, i + 1)).collect(),
            None => plan.steps.iter().map(|s| s.op.describe().launch(&gpu)).collect(),
        };
        let code = sources(plan, &launches, gpu, kernels).map_err(|e| no_kernel(checkpoint, e))?;
        let map = WeightMap::of(plan)?;
        let own = program.as_ref().map_or(0, BoundProgram::bytes);
        let (layout, cache_map, red_zones) = if want.red_zones {
            let (layout, cache_map) =
                (WorkspaceLayout::apart(plan, ZONE as usize), CacheMap::of(plan, ZONE));
            let zones = [buffers(plan, &layout), halves(plan, cache_map)];
            (layout, cache_map, zones)
        } else {
            let layout = match &program {
                Some(_) => WorkspaceLayout::apart(plan, 0),
                None => plan.workspace(),
            };
            (layout, CacheMap::of(plan, 0), Default::default())
        };
        let mut bytes = BytePlan::of(plan, &map, &layout, own);
        bytes.caches = bytes.caches.max(cache_map.keys(plan.cache.layers));
        bytes.check(context.memory()?.0 + own)?;

        let weights = DeviceMemory::alloc(context, "weights", bytes.weights)?;
        let caches = DeviceMemory::alloc(context, "KV cache", bytes.caches)?;
        let workspace = DeviceMemory::alloc(context, "workspace", bytes.workspace)?;
        let state = DeviceMemory::alloc(context, "step state", bytes.state)?;
        let ring = MappedMemory::alloc(context, "token ring", RING_BYTES)?;
        caches.fill(&stream, 0)?;
        workspace.fill(&stream, 0xFF)?;
        red_zones[0].write(&stream, &workspace)?;
        red_zones[1].write(&stream, &caches)?;
        state.fill(&stream, 0)?;
        state.upload(&stream, FORCED, &vec![NOT_FORCED; plan.cache.capacity as usize])?;

        let start = Instant::now();
        let functions = load(context, &launches, &code)?;
        let jit = start.elapsed();
        let start = Instant::now();
        let staging = Staging { context, stream: Stream::new(context)?, weights: &weights };
        upload(checkpoint, plan, &map, staging, progress)?;
        let times = (start.elapsed(), jit);

        let base = workspace.slice(0, 0)?.address();
        let addresses = Addresses {
            weights: map.offsets.iter().map(|o| weights.address() + o).collect(),
            buffers: layout
                .placements()
                .iter()
                .map(|p| (p.bytes > 0).then_some(base + p.offset as u64))
                .collect(),
            caches: caches.address(),
            map: cache_map,
            layers: plan.cache.layers,
            step: state.address(),
            ring: ring.device_address(),
            program: program.as_ref().map_or(0, BoundProgram::table),
            trace: program.as_ref().map_or(0, BoundProgram::trace_address),
        };
        let mut labels: Vec<&str> = plan.steps.iter().map(|s| s.label.as_str()).collect();
        if let Some(p) = &program {
            p.fill(&stream, &|arg| addresses.slot("program", arg))?;
            launches.push(p.launch(0, p.steps()));
            labels.push("token");
        }
        let mut steps = bind_steps(&labels, gpu, &launches, &functions, &addresses)?;
        let token = match program {
            Some(_) => launches.pop().zip(steps.pop()),
            None => None,
        };
        stream.synchronize()?;
        let plan = plan.clone();
        Ok(Self {
            plan,
            gpu,
            launches,
            steps,
            token,
            program,
            layout,
            cache_map,
            red_zones,
            bytes,
            caches,
            workspace,
            state,
            ring,
            _weights: weights,
            times,
        })
    }

    /// The plan.
    pub fn plan(&self) -> &DecodePlan {
        &self.plan
    }

    /// What the geometry was made for.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The launches, in the order of the plan.
    pub fn launches(&self) -> &[Launch] {
        &self.launches
    }

    /// Device memory, bytes.
    pub fn bytes(&self) -> BytePlan {
        self.bytes
    }

    /// Time that the upload of the weights and the loading of the kernels took.
    pub fn times(&self) -> (Duration, Duration) {
        self.times
    }

    pub(super) fn bound(&self) -> &[BoundStep] {
        &self.steps
    }

    /// All steps as one launch, where there is a program.
    pub(super) fn token(&self) -> Option<&(Launch, BoundStep)> {
        self.token.as_ref()
    }

    /// Label of a step.
    pub(super) fn label(&self, step: usize) -> &str {
        self.plan.steps.get(step).map_or("", |s| &s.label)
    }

    /// Whether each step may start before its predecessor in the graph has ended.
    pub fn programmatic(&self, step: usize) -> bool {
        step > 0 && self.steps.get(step).is_some_and(|s| s.programmatic)
    }

    /// Address of the step state.
    pub(super) fn state_address(&self) -> u64 {
        self.state.address()
    }

    /// The mapped ring.
    pub(super) fn ring(&self) -> &MappedMemory {
        &self.ring
    }

    /// Contents of a workspace buffer, `[elements]`.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] for a buffer that no step names; [`Error::Driver`].
    pub fn buffer(&self, stream: &Stream, buf: Buf) -> Result<Vec<f32>> {
        let place = self.layout.placements().get(buf.0 as usize).filter(|p| p.bytes > 0);
        let place = place
            .ok_or_else(|| Error::Internal(format!("{buf:?} has no place in the workspace")))?;
        let mut out = vec![0.0; place.bytes / 4];
        self.workspace.download(stream, place.offset as u64, &mut out)?;
        Ok(out)
    }

    /// Fills the workspace with `byte`.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`].
    pub fn poison(&self, stream: &Stream, byte: u8) -> Result<()> {
        self.workspace.fill(stream, byte)?;
        self.red_zones[0].write(stream, &self.workspace)
    }

    /// Looks whether any kernel has written outside the workspace's buffers or the caches, after
    /// the work queued on `stream`; finds nothing where the plan was bound without red zones.
    ///
    /// # Errors
    ///
    /// [`Error::Verification`] with the buffer and byte; [`Error::Driver`].
    pub fn check_red_zones(&self, stream: &Stream) -> Result<()> {
        self.red_zones[0].check(stream, &self.workspace)?;
        self.red_zones[1].check(stream, &self.caches)
    }

    /// The step state on the device.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`].
    pub fn state(&self, stream: &Stream) -> Result<StepState> {
        let mut out = [StepState::default()];
        self.state.download(stream, 0, &mut out)?;
        let [state] = out;
        Ok(state)
    }

    /// Sets the step state, with the status of a token outside the vocabulary where it is one: what
    /// the kernels choose or take from the forced inputs has it already, and none looks again.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`].
    pub fn set_state(&self, stream: &Stream, state: StepState) -> Result<()> {
        if let Some(program) = &self.program {
            program.reset(stream, state.steps)?;
        }
        let outside = if state.token >= state.vocab { Status::TOKEN } else { 0 };
        let state = StepState { status: state.status | outside, ..state };
        self.state.upload(stream, 0, &[state])
    }

    /// Readings of the clock in the last token, `[steps][blocks][8]`; empty unless asked for.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`].
    pub(super) fn trace(&self, stream: &Stream) -> Result<Vec<u32>> {
        self.program.as_ref().map_or(Ok(Vec::new()), |p| p.trace(stream))
    }

    /// Sets the inputs of positions `from..`.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] beyond the capacity; [`Error::Driver`].
    pub fn set_forced(&self, stream: &Stream, from: u32, tokens: &[u32]) -> Result<()> {
        self.state.upload(stream, FORCED + 4 * u64::from(from), tokens)
    }

    /// Byte offset of a layer's keys and values in the caches.
    fn halves(&self, layer: u32) -> Result<[u64; 2]> {
        if layer >= self.plan.cache.layers {
            return Err(Error::Usage(format!(
                "layer {layer}: the model has {}",
                self.plan.cache.layers
            )));
        }
        Ok([self.cache_map.keys(layer), self.cache_map.values(layer)])
    }

    /// Bytes of a layer's keys and of its values, `[kv_heads, capacity, head_dim]`.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] for a layer that is not there; [`Error::Driver`].
    pub fn cache_bytes(&self, stream: &Stream, layer: u32) -> Result<[Vec<u8>; 2]> {
        let cache = &self.plan.cache;
        let bytes = (cache.layer_elements() * cache.kind.bytes()) as usize;
        let [keys, values] = self.halves(layer)?;
        let mut out = [vec![0u8; bytes], vec![0u8; bytes]];
        self.caches.download(stream, keys, &mut out[0])?;
        self.caches.download(stream, values, &mut out[1])?;
        Ok(out)
    }

    /// Addresses of a layer's keys and of its values.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] for a layer that is not there.
    pub(super) fn cache_addresses(&self, layer: u32) -> Result<[u64; 2]> {
        Ok(self.halves(layer)?.map(|half| self.caches.address() + half))
    }
}

/// The red zones of a workspace.
fn buffers(plan: &DecodePlan, layout: &WorkspaceLayout) -> RedZones {
    let placed = plan.buffers.iter().zip(layout.placements()).filter(|(_, p)| p.bytes > 0);
    let range = |p: &Placement| p.offset as u64..(p.offset + p.bytes) as u64;
    RedZones::around(
        placed.map(|(b, p)| (b.name.clone(), range(p))).collect(),
        layout.bytes() as u64,
    )
}

/// The red zones of the caches.
fn halves(plan: &DecodePlan, map: CacheMap) -> RedZones {
    let bytes = plan.cache.layer_elements() * plan.cache.kind.bytes();
    let layer = |l| {
        let half = |what, at| (format!("the {what} of layer {l}"), at..at + bytes);
        [half("keys", map.keys(l)), half("values", map.values(l))]
    };
    let layers = plan.cache.layers;
    RedZones::around((0..layers).flat_map(layer).collect(), map.keys(layers))
}

fn bind_steps(
    labels: &[&str],
    gpu: Gpu,
    launches: &[Launch],
    functions: &Functions,
    addresses: &Addresses,
) -> Result<Vec<BoundStep>> {
    let bind = |(label, l): (&str, &Launch)| {
        let function = functions.get(&(l.module.clone(), l.kernel.clone())).cloned();
        let function = function
            .ok_or_else(|| Error::Internal(format!("{label}: {} is not loaded", l.kernel)))?;
        Ok(BoundStep {
            function,
            grid: l.grid,
            block: l.block,
            cluster: l.cluster,
            shared_bytes: l.shared_bytes,
            // The code for earlier devices does not wait for its predecessor by itself.
            cooperative: l.module == MODULE,
            programmatic: l.programmatic && gpu.compute >= PROGRAMMATIC_COMPUTE,
            args: l.args.iter().map(|a| addresses.slot(label, a)).collect::<Result<_>>()?,
        })
    };
    labels.iter().copied().zip(launches).map(bind).collect()
}

/// A bound plan shared with the graphs that point at it.
pub type SharedPlan = Arc<BoundPlan>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::WeightId;

    fn addresses() -> Addresses {
        Addresses {
            weights: vec![0x1000, 0x1008],
            buffers: vec![Some(0x2000), None],
            caches: 0x10_000,
            map: CacheMap { half: 512, zone: 0 },
            layers: 2,
            step: 0x4000,
            ring: 0x8000,
            program: 0x9000,
            trace: 0,
        }
    }

    #[test]
    fn every_argument_becomes_one_slot() {
        let a = addresses();
        let slot = |arg| a.slot("L00.x", &arg).unwrap();
        assert_eq!(slot(Arg::Buf(Buf(0))), 0x2000);
        assert_eq!(slot(Arg::Weight(WeightId(0))), 0x1000);
        assert_eq!(slot(Arg::Null), 0);
        assert_eq!(slot(Arg::Step), 0x4000);
        assert_eq!(slot(Arg::Zeros), 0x4020);
        assert_eq!(slot(Arg::Counters), 0x4100);
        assert_eq!(slot(Arg::Forced), 0x5100);
        assert_eq!(slot(Arg::Ring), 0x8000);
        assert_eq!(slot(Arg::Keys(1)), 0x10_000 + 1024);
        assert_eq!(slot(Arg::Values(1)), 0x10_000 + 1536);
        assert_eq!(slot(Arg::U32(7)), 7);
        assert_eq!(slot(Arg::F32(1.5)), 0x3FC0_0000, "the bits, in the low half");
    }

    #[test]
    fn a_null_misaligned_or_unknown_address_is_refused_by_field_name() {
        let mut a = addresses();
        let text = |a: &Addresses, arg| a.slot("L01.attn.q", &arg).unwrap_err().to_string();
        let misaligned = text(&a, Arg::Weight(WeightId(1)));
        assert!(misaligned.contains("L01.attn.q: Weight(WeightId(1)) has the address 0x1008"));
        assert!(text(&a, Arg::Weight(WeightId(2))).contains("names nothing in the plan"));
        assert!(text(&a, Arg::Buf(Buf(1))).contains("Buf(Buf(1)) names nothing"));
        assert!(text(&a, Arg::Keys(2)).contains("Keys(2) names nothing"));
        a.ring = 0;
        assert!(text(&a, Arg::Ring).contains("Ring has the address 0x0"));
    }
}
