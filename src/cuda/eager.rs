//! `GPU_DEBUG`: a token issued step by step, with a look at what each step wrote.
//!
//! ```text
//! 1   label kernel shape | buffer min max mean rms, NaNs, infinities | time, GB/s; a line a layer
//! 2   also: the step's inputs downloaded, its reference run on them, and the two results compared
//! ```
//!
//! With level 2 every step is judged alone: an error of one step is not seen in the next.

use super::bind::BoundPlan;
use super::driver::{Context, Event, Stream};
use super::issue::issue;
use crate::engine::{Look, Outputs, Written, written_cache};
use crate::error::{Error, Result};
use crate::ops::{Buf, CacheRef, HostMemory, KvType, Op, Summary};
use half::f16;
use std::io::Write;
use std::path::Path;

/// Marks what a reference did not write: a NaN that no computation makes.
const UNTOUCHED: u32 = 0x7FC0_DEAD;

/// How far one buffer that a step wrote is from the reference on the same inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Position of the token.
    pub position: u32,
    /// Label of the step.
    pub label: String,
    /// Name of the op.
    pub op: &'static str,
    /// What was compared: a buffer, `keys`, `values` or `token`.
    pub what: String,
    /// `Σ (x − r)² / Σ r²`.
    pub nmse: f64,
    /// `max |x − r|`.
    pub max_error: f64,
}

/// `(NMSE, maximum error)` of `x` against `reference`, over what the reference wrote. Where one is
/// not finite and the other differs, both are infinite.
pub fn errors(x: &[f32], reference: &[f32]) -> (f64, f64) {
    let (mut noise, mut signal, mut max) = (0.0f64, 0.0f64, 0.0f64);
    for (x, r) in x.iter().zip(reference).filter(|(_, r)| r.to_bits() != UNTOUCHED) {
        let d =
            if x == r || x.is_nan() && r.is_nan() { 0.0 } else { f64::from(*x) - f64::from(*r) };
        if !d.is_finite() {
            return (f64::INFINITY, f64::INFINITY);
        }
        if r.is_finite() {
            signal += f64::from(*r) * f64::from(*r);
        }
        noise += d * d;
        max = max.max(d.abs());
    }
    (if noise == 0.0 { 0.0 } else { noise / signal }, max)
}

/// Cache elements of `kind` as f32.
pub(super) fn cache_to_f32(kind: KvType, bytes: &[u8]) -> Vec<f32> {
    match kind {
        KvType::F16 => {
            bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
        }
        KvType::F32 => {
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        }
    }
}

/// Lines to the log, for a caller that gave no other place.
struct ToLog(Vec<u8>);

impl Write for ToLog {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        for byte in bytes {
            if *byte == b'\n' {
                log::info!("{}", String::from_utf8_lossy(&self.0));
                self.0.clear();
            } else {
                self.0.push(*byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Sums over the steps of a layer, or of a token.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    steps: u32,
    microseconds: f64,
    bytes: u64,
    bad: usize,
}

impl Sums {
    fn add(&mut self, microseconds: f64, bytes: u64, bad: usize) {
        self.steps += 1;
        self.microseconds += microseconds;
        self.bytes += bytes;
        self.bad += bad;
    }

    fn line(&self) -> String {
        let Self { steps, microseconds, bytes, bad } = self;
        let rate = rate(*bytes, *microseconds);
        format!("{steps} steps {microseconds:.1} us {bytes} bytes {rate:.1} GB/s not finite {bad}")
    }
}

/// Bytes per microsecond as GB/s.
fn rate(bytes: u64, microseconds: f64) -> f64 {
    if microseconds > 0.0 { bytes as f64 / microseconds / 1e3 } else { 0.0 }
}

/// Issues tokens step by step and tells what each step did.
pub(super) struct Debugger {
    out: Box<dyn Write + Send>,
    /// The reference's memory, at level 2.
    host: Option<HostMemory>,
    look: Look,
    events: [Event; 2],
    position: u32,
    layer: Sums,
    token: Sums,
    comparisons: Vec<Comparison>,
}

impl Debugger {
    /// `host` is the memory of the reference for level 2.
    pub(super) fn new(context: &Context, host: Option<HostMemory>) -> Result<Self> {
        Ok(Self {
            out: Box::new(ToLog(Vec::new())),
            host,
            look: Look::default(),
            events: [Event::new(context)?, Event::new(context)?],
            position: 0,
            layer: Sums::default(),
            token: Sums::default(),
            comparisons: Vec::new(),
        })
    }

    /// Lines go to `out` from here on.
    pub(super) fn write_to(&mut self, out: Box<dyn Write + Send>) {
        self.out = out;
    }

    /// Only these steps are told about, from here on.
    pub(super) fn look(&mut self, look: Look) {
        self.look = look;
    }

    /// What level 2 compared so far.
    pub(super) fn comparisons(&self) -> &[Comparison] {
        &self.comparisons
    }

    /// Computes one token on `stream`.
    pub(super) fn token(&mut self, plan: &BoundPlan, stream: &Stream) -> Result<()> {
        let state = plan.state(stream)?;
        self.position = state.position;
        (self.layer, self.token) = (Sums::default(), Sums::default());
        self.line(format_args!("position {} token {}", state.position, state.token))?;
        if let Some(host) = &mut self.host {
            host.state.token = state.token;
            host.state.position = state.position;
        }
        let active = state.status == 0 && state.position < plan.plan().cache.capacity;
        self.before(plan, stream, 0)?;
        let mut after =
            |step| self.after(plan, stream, step, active).map_err(|e| e.at(plan.label(step)));
        issue(plan, stream, Some(&mut after))?;
        let total = self.token.line();
        self.line(format_args!("position {}: {total}", state.position))
    }

    /// Compares the device's choice with the reference's.
    pub(super) fn chosen(&mut self, plan: &BoundPlan, token: u32) -> Result<()> {
        let last = plan.plan().steps.last().filter(|s| self.look.steps.selects(&s.label));
        let (Some(host), Some(last)) = (&self.host, last) else { return Ok(()) };
        let next = host.state.next;
        let different = f64::from(u8::from(next != token));
        let (op, what) = (last.op.describe().name(), "token".to_owned());
        let (position, label) = (self.position, last.label.clone());
        let (nmse, max_error) = (different, different);
        self.comparisons.push(Comparison { position, label, op, what, nmse, max_error });
        self.line(format_args!("chosen {token}, reference {next}"))
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) -> Result<()> {
        writeln!(self.out, "{line}")
            .map_err(|e| Error::io(Path::new("GPU_DEBUG output"), "write", e))
    }

    /// Downloads what `step` is going to read, and starts the clock.
    fn before(&mut self, plan: &BoundPlan, stream: &Stream, step: usize) -> Result<()> {
        let Some(step) = plan.plan().steps.get(step) else { return Ok(()) };
        if let (Some(host), true) = (&mut self.host, self.look.steps.selects(&step.label)) {
            let op = step.op.describe();
            for buf in op.writes() {
                host.buf_mut(buf).fill(f32::from_bits(UNTOUCHED));
            }
            for buf in op.reads() {
                copy(host.buf_mut(buf), &plan.buffer(stream, buf)?);
            }
            if let Some(cache) = touched_cache(&step.op) {
                let [k, v] = plan.cache_bytes(stream, cache.layer)?;
                let (keys, values) = host.cache_mut(cache.layer);
                copy(keys, &cache_to_f32(cache.kind, &k));
                copy(values, &cache_to_f32(cache.kind, &v));
            }
        }
        self.events[0].record(stream)
    }

    fn after(
        &mut self,
        plan: &BoundPlan,
        stream: &Stream,
        step: usize,
        active: bool,
    ) -> Result<()> {
        self.events[1].record(stream)?;
        stream.synchronize()?;
        let [start, end] = &self.events;
        let microseconds = f64::from(end.milliseconds_since(start)?) * 1e3;
        let Some(here) = plan.plan().steps.get(step) else { return Ok(()) };
        if !self.look.steps.selects(&here.label) {
            return self.before(plan, stream, step + 1);
        }
        let op = here.op.describe();
        let bytes = op.traffic(self.position).dram();
        let kernel = plan.launches().get(step).map_or("", |l| &l.kernel);
        let mut line = format!("{:<18} {kernel:<20} {}", here.label, op.shape());
        let mut device = OnDevice { plan, stream };
        let mut written = device.buffers(plan.plan(), here)?;
        let mut bad = 0;
        for Written { name, values } in &written {
            let summary = Summary::of(values);
            bad += summary.nans + summary.infinities;
            line.push_str(&format!(" | {name} {summary}"));
        }
        if active && (self.host.is_some() || self.look.dump.is_some()) {
            written.extend(device.row(here, self.position)?);
        }
        let rate = rate(bytes, microseconds);
        self.line(format_args!("{line} | {microseconds:.1} us {rate:.1} GB/s"))?;
        self.look.keep(self.position, &here.label, &written)?;
        if active {
            self.compare(plan, step, &written)?;
        }
        self.layer.add(microseconds, bytes, bad);
        self.token.add(microseconds, bytes, bad);
        let next = plan.plan().steps.get(step + 1).and_then(|s| s.layer);
        if next != here.layer {
            if let Some(layer) = here.layer.filter(|_| self.layer.steps > 0) {
                let sums = self.layer.line();
                self.line(format_args!("layer {layer}: {sums}"))?;
            }
            self.layer = Sums::default();
        }
        self.before(plan, stream, step + 1)
    }

    /// Runs the reference of `step` and compares what the two wrote.
    fn compare(&mut self, plan: &BoundPlan, step: usize, written: &[Written]) -> Result<()> {
        let (Some(host), Some(here)) = (&mut self.host, plan.plan().steps.get(step)) else {
            return Ok(());
        };
        let op = here.op.describe();
        op.reference(host);
        let reference = (&*host).all(plan.plan(), here, self.position)?;
        let found: Vec<_> = written
            .iter()
            .zip(&reference)
            .map(|(device, host)| (device.name.clone(), errors(&device.values, &host.values)))
            .collect();
        for (what, (nmse, max_error)) in found {
            let (position, label) = (self.position, here.label.clone());
            self.line(format_args!(
                "{label:<18} {what}: nmse {nmse:.3e} max error {max_error:.3e}"
            ))?;
            let op = op.name();
            self.comparisons.push(Comparison { position, label, op, what, nmse, max_error });
        }
        Ok(())
    }
}

/// What the steps of a plan wrote on the device, once the stream has done them.
pub(super) struct OnDevice<'a> {
    pub(super) plan: &'a BoundPlan,
    pub(super) stream: &'a Stream,
}

impl Outputs for OnDevice<'_> {
    fn buffer(&mut self, buf: Buf) -> Result<Vec<f32>> {
        self.plan.buffer(self.stream, buf)
    }

    fn cache(&mut self, layer: u32) -> Result<(Vec<f32>, Vec<f32>)> {
        let kind = self.plan.plan().cache.kind;
        let [keys, values] = self.plan.cache_bytes(self.stream, layer)?;
        Ok((cache_to_f32(kind, &keys), cache_to_f32(kind, &values)))
    }
}

fn copy(to: &mut [f32], from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from;
    }
}

/// The cache that `op` reads or writes.
fn touched_cache(op: &Op) -> Option<CacheRef> {
    match op {
        Op::Attention(a) => Some(a.cache),
        other => written_cache(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_relative_to_the_reference_and_infinite_where_one_side_is_not_finite() {
        assert_eq!(errors(&[1.0, 2.0], &[1.0, 2.0]), (0.0, 0.0));
        let (nmse, max) = errors(&[1.0, 2.5], &[1.0, 2.0]);
        assert!((nmse - 0.25 / 5.0).abs() < 1e-12 && max == 0.5);
        assert_eq!(errors(&[f32::NAN], &[1.0]), (f64::INFINITY, f64::INFINITY));
        assert_eq!(errors(&[1.0], &[f32::INFINITY]).0, f64::INFINITY);
        assert_eq!(errors(&[9.0, 1.0], &[f32::from_bits(UNTOUCHED), 1.0]), (0.0, 0.0));
        assert_eq!(errors(&[1.0], &[0.0]).0, f64::INFINITY);
    }

    #[test]
    fn cache_bytes_of_either_type_become_the_same_numbers() {
        let values = [1.5f32, -0.25, 0.0];
        let halves: Vec<u8> = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        let floats: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(cache_to_f32(KvType::F16, &halves), values);
        assert_eq!(cache_to_f32(KvType::F32, &floats), values);
    }
}
