//! A kernel's parameters as the operands of an op, and the op's reference run on them.

use super::plants::Plant;
use super::state::State;
use super::tiles::Tiles;
use decode_graph::cuda::step_state::StepState;
use decode_graph::ops::{
    Buf, CacheRef, HostMemory, HostState, HostWeight, KvType, MatVec, Matrix, Op, Pairing, RmsNorm,
    Vector, WeightId,
};
use decode_graph::plan::PlanBuilder;
use decode_graph::quant::{QuantFormat, RowOrder, TileLayout};
use half::f16;
use std::collections::HashMap;

/// Format, rows, columns and order of a matrix.
type Kind = (QuantFormat, usize, usize, RowOrder);

/// Weights taken back to the file's bytes, by what stands on the device.
#[derive(Default)]
pub(super) struct Unpacked {
    tiles: Tiles,
    files: HashMap<Kind, HashMap<Vec<u8>, Vec<u8>>>,
}

impl Unpacked {
    fn file(&mut self, layout: &TileLayout, order: RowOrder, packed: &[u8]) -> Vec<u8> {
        let kind = (layout.format, layout.rows, layout.columns, order);
        let known = self.files.entry(kind).or_default();
        if !known.contains_key(packed) {
            known.insert(packed.to_vec(), self.tiles.unpack(layout, order, packed));
        }
        known[packed].clone()
    }
}

/// One kernel under way.
pub(super) struct Kernel<'a> {
    pub(super) s: &'a mut State,
    pub(super) step: StepState,
    pub(super) args: &'a [u64],
    /// The next parameter.
    pub(super) next: usize,
    pub(super) builder: PlanBuilder,
    pub(super) buffers: Vec<(Buf, Option<u64>)>,
    pub(super) weights: Vec<HostWeight>,
    /// Keys, values.
    pub(super) cache: Option<(CacheRef, [u64; 2])>,
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

impl<'a> Kernel<'a> {
    pub(super) fn raw(&mut self) -> u64 {
        self.next += 1;
        self.args.get(self.next - 1).copied().unwrap_or(u64::MAX)
    }

    pub(super) fn address(&mut self) -> u64 {
        self.raw()
    }

    pub(super) fn u32(&mut self) -> u32 {
        self.raw() as u32
    }

    pub(super) fn f32(&mut self) -> f32 {
        f32::from_bits(self.raw() as u32)
    }

    /// A buffer on the device.
    pub(super) fn buf(&mut self, address: u64, elements: u32) -> Buf {
        let buf = self.builder.buffer("on the device", elements);
        self.buffers.push((buf, Some(address)));
        buf
    }

    /// A buffer that the kernel keeps to itself.
    pub(super) fn inner(&mut self, elements: u32) -> Buf {
        let buf = self.builder.buffer("within the kernel", elements);
        self.buffers.push((buf, None));
        buf
    }

    /// A buffer at the address that [`Self::norm`] put in the place of one.
    pub(super) fn sized(&mut self, argument: Buf, elements: u32) -> Buf {
        let address = self.args[argument.0 as usize];
        self.buf(address, elements)
    }

    pub(super) fn vector(&mut self, address: u64, len: u32) -> Result<Vector, u32> {
        let values = floats(self.s.read(address, 4 * len as usize)?);
        self.weights.push(HostWeight::Vector(values));
        Ok(Vector { id: WeightId(self.weights.len() as u32 - 1), len })
    }

    pub(super) fn optional(&mut self, address: u64, len: u32) -> Result<Option<Vector>, u32> {
        if address == 0 { Ok(None) } else { self.vector(address, len).map(Some) }
    }

    pub(super) fn matrix(
        &mut self,
        address: u64,
        format: QuantFormat,
        rows: u32,
        columns: u32,
        order: RowOrder,
    ) -> Result<Matrix, u32> {
        let layout = TileLayout { format, rows: rows as usize, columns: columns as usize };
        let packed = self.s.read(address, layout.bytes())?.to_vec();
        let mut bytes = self.s.unpacked.file(&layout, order, &packed);
        if self.s.plant == Some(Plant::SubBlockScale) && format == QuantFormat::Q8_0 {
            // f16 scale and 32 quants a block: two neighbours change scales.
            for pair in bytes.as_chunks_mut::<68>().0 {
                let [a, b, ..] = *pair;
                (pair[0], pair[1]) = (pair[34], pair[35]);
                (pair[34], pair[35]) = (a, b);
            }
        }
        self.weights.push(HostWeight::Matrix { format, columns: columns as usize, bytes });
        let id = WeightId(self.weights.len() as u32 - 1);
        Ok(Matrix { id, format, rows, columns, order })
    }

    pub(super) fn product(
        &mut self,
        weight: u64,
        bias: u64,
        format: QuantFormat,
        (rows, columns): (u32, u32),
        x: Buf,
        out: Buf,
    ) -> Result<MatVec, u32> {
        let weight = self.matrix(weight, format, rows, columns, RowOrder::Natural)?;
        Ok(MatVec { x, weight, bias: self.optional(bias, rows)?, out })
    }

    /// The leading parameters `x, gain, eps` of a kernel that normalises; sizes are known later, so
    /// `x` is the number of the parameter until [`Self::sized`], and the gain's address is beside.
    pub(super) fn norm(&mut self) -> Result<(RmsNorm, u64), u32> {
        let at = self.next as u32;
        let (_x, gain, eps) = (self.address(), self.address(), self.f32());
        let none = Vector { id: WeightId(u32::MAX), len: 0 };
        Ok((RmsNorm { x: Buf(at), gain: none, out: Buf(0), rows: 1, eps }, gain))
    }

    pub(super) fn pairing(&self, halves: u32) -> Pairing {
        let wrong = self.s.plant == Some(Plant::RopePairs);
        if (halves != 0) != wrong { Pairing::Halves } else { Pairing::Adjacent }
    }

    pub(super) fn cache(
        &mut self,
        at: [u64; 2],
        kv_heads: u32,
        head_dim: u32,
        capacity: u32,
        kind: KvType,
    ) -> CacheRef {
        let cache = CacheRef { layer: 0, kv_heads, head_dim, capacity, kind };
        self.cache = Some((cache, at));
        cache
    }

    /// Runs the reference of `op` and writes what it wrote to the device.
    pub(super) fn compute(self, op: Op) -> Result<(HostMemory, &'a mut State), u32> {
        let Self { s, step, mut builder, buffers, weights, cache, .. } = self;
        let plant = s.plant;
        builder.record("kernel", op.clone());
        let plan = builder.finish();
        let len = cache.map_or(0, |(c, _)| (c.kv_heads * c.capacity * c.head_dim) as usize);
        let mut memory = plan.workspace().host_memory(weights, 1, len);
        let reused = plant == Some(Plant::ReusedActivations) && matches!(op, Op::GateUp(_));
        for (i, (buf, address)) in buffers.iter().enumerate() {
            let Some(address) = *address else { continue };
            let bytes = 4 * plan.buffers[buf.0 as usize].elements as usize;
            let mut data = s.read(address, bytes)?.to_vec();
            if reused && i == 0 {
                let before = s.memories.activations.insert(address, data.clone());
                data = before.unwrap_or(data);
            }
            memory.buf_mut(*buf).copy_from_slice(&floats(&data));
        }
        if let Some((c, at)) = cache {
            let bytes = len * c.kind.bytes() as usize;
            let (k, v) =
                (cached(c.kind, s.read(at[0], bytes)?), cached(c.kind, s.read(at[1], bytes)?));
            let (keys, values) = memory.cache_mut(0);
            keys.copy_from_slice(&k);
            values.copy_from_slice(&v);
        }
        let early =
            plant == Some(Plant::RopePositionBefore) && matches!(op, Op::Qkv(_) | Op::Rope(_));
        let position = if early { step.position.saturating_sub(1) } else { step.position };
        memory.state = HostState { token: step.token, position, ..HostState::default() };
        op.describe().reference(&mut memory);
        let written = op.describe().writes();
        for (buf, address) in &buffers {
            let Some(address) = *address else { continue };
            if !written.contains(buf) {
                continue;
            }
            let mut out: &[f32] = memory.buf(*buf);
            if plant == Some(Plant::LastTile) {
                out = &out[..out.len() / 16 * 16];
            }
            s.write(address, bytemuck::cast_slice(out))?;
            if plant == Some(Plant::OutputOverrun) {
                s.write(address + 4 * out.len() as u64, &[0; 4])?;
            }
        }
        if let (Some((c, at)), Op::Qkv(_) | Op::KvAppend(_) | Op::HeadRope(_)) = (cache, &op) {
            append(s, &memory, c, at, position, step.position)?;
        }
        Ok((memory, s))
    }

    /// As [`Self::compute`], for what chooses a token.
    pub(super) fn compute_choice(
        self,
        op: Op,
        logits: Buf,
    ) -> Result<(HostState, &'a mut State), u32> {
        let (memory, s) = self.compute(op)?;
        let mut state = memory.state;
        if s.plant == Some(Plant::ArgmaxTies) {
            let logits = memory.buf(logits);
            let best = logits.get(state.next as usize).copied();
            let last = logits.iter().rposition(|v| Some(*v) == best);
            state.next = last.map_or(state.next, |i| i as u32);
        }
        Ok((state, s))
    }
}

fn cached(kind: KvType, bytes: &[u8]) -> Vec<f32> {
    match kind {
        KvType::F16 => {
            bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect()
        }
        KvType::F32 => floats(bytes),
    }
}

/// Writes the cache rows of `from` in `memory` to those of `to` on the device.
fn append(
    s: &mut State,
    memory: &HostMemory,
    c: CacheRef,
    at: [u64; 2],
    from: u32,
    to: u32,
) -> Result<(), u32> {
    let (keys, values) = memory.cache(0);
    let late = u32::from(s.plant == Some(Plant::KvOnePositionLate));
    let off = u32::from(s.plant == Some(Plant::KvOneHeadOff));
    let plant_overruns = s.plant == Some(Plant::CacheOverrun);
    let at = if s.plant == Some(Plant::KeysForValues) { [at[1], at[0]] } else { at };
    let (dim, bytes) = (c.head_dim as usize, c.kind.bytes());
    for (rows, base) in [(keys, at[0]), (values, at[1])] {
        for h in 0..c.kv_heads {
            let row = (h * c.capacity + from) as usize * dim;
            let row = &rows[row..row + dim];
            let data: Vec<u8> = match c.kind {
                KvType::F16 => row.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
                KvType::F32 => bytemuck::cast_slice(row).to_vec(),
            };
            let head = (h + off) % c.kv_heads;
            let place = u64::from(head * c.capacity + (to + late).min(c.capacity - 1));
            s.write(base + place * dim as u64 * bytes, &data)?;
            if plant_overruns {
                s.write(base + u64::from(c.kv_heads * c.capacity) * dim as u64 * bytes, &data)?;
            }
        }
    }
    Ok(())
}
