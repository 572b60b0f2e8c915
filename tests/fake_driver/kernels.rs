//! What the kernels compute: the CPU reference of the op that a kernel is named after, on the memory
//! that its parameters point at. A new kernel gets an arm in [`run`].

use super::plants::Plant;
use super::state::{Node, State, code};
use super::tiles::Tiles;
use decode_graph::cuda::step_state::{NOT_FORCED, RING_SLOTS, StepState};
use decode_graph::ops::fused::{GateUp, LmHead, Project, Projection, Qkv};
use decode_graph::ops::{
    Add, Argmax, Attention, Buf, CacheRef, Embed, HostMemory, HostState, HostWeight, KvAppend,
    KvType, MatVec, Matrix, Op, Pairing, RmsNorm, Rope, SwiGlu, Vector, WeightId,
};
use decode_graph::plan::{CacheSpec, PlanBuilder};
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
struct Kernel<'a> {
    s: &'a mut State,
    step: StepState,
    args: &'a [u64],
    /// The next parameter.
    next: usize,
    builder: PlanBuilder,
    buffers: Vec<(Buf, Option<u64>)>,
    weights: Vec<HostWeight>,
    /// Keys, values.
    cache: Option<(CacheRef, [u64; 2])>,
}

/// Runs `node`, which is number `place.0` of a graph whose last is `place.1` (0 of 0 alone). An
/// error is the fault that its memory accesses make.
pub(super) fn run(s: &mut State, node: &Node, place: (usize, usize)) -> Result<(), u32> {
    let function = s.functions.get(&node.function).ok_or(code::LAUNCH_FAILED)?;
    let name = function.name.to_string_lossy().into_owned();
    let graph = place.1 > 0;
    if name == "read_ceiling" {
        let bytes = node.args.get(1).copied().unwrap_or(0) as usize * 16;
        return s.read(node.args[0], bytes).map(drop);
    }
    let mut step = read_step(s, node.args[0])?;
    if s.plant == Some(Plant::StalePointer) && graph && place.0 == 0 && step.position == 2 {
        let base = s.base(node.args[2])?;
        s.move_away(base);
    }
    if s.plant == Some(Plant::FrozenPosition) && graph {
        step.position = *s.memories.position.get_or_insert(step.position);
    }
    if s.plant == Some(Plant::LastLayerSkipped)
        && graph
        && (place.1 - 5..place.1).contains(&place.0)
    {
        return Ok(());
    }
    let Some((op, formats)) = split(&name) else {
        eprintln!("the fake driver knows no kernel {name}: give it an arm in kernels.rs");
        return Err(code::NOT_FOUND);
    };
    let chooses = matches!(op, "argmax" | "lm_head");
    let within =
        step.position < step.capacity || chooses && s.plant == Some(Plant::CapacityIgnored);
    let active = step.status == 0 && within && step.token < step.vocab;
    if !active && !chooses {
        return Ok(());
    }
    let spec = CacheSpec { layers: 1, kv_heads: 1, head_dim: 2, capacity: 1, kind: KvType::F32 };
    let mut k = Kernel {
        s,
        step,
        args: &node.args,
        next: 1,
        builder: PlanBuilder::new("a kernel", spec, step.vocab),
        buffers: Vec::new(),
        weights: Vec::new(),
        cache: None,
    };
    // `down_q4_k` is op `down` with weights of format q4_k; `qkv_q4_k_q6_k` has two.
    let weights = formats.first().copied().unwrap_or(QuantFormat::F32);
    match op {
        "rms_norm" => {
            let (x, gain, out, dim, eps) =
                (k.address(), k.address(), k.address(), k.u32(), k.f32());
            let (x, out) = (k.buf(x, dim), k.buf(out, dim));
            let gain = k.vector(gain, dim)?;
            k.compute(Op::RmsNorm(RmsNorm { x, gain, out, eps })).map(drop)
        }
        "add" => {
            let (out, x, len) = (k.address(), k.address(), k.u32());
            let (out, x) = (k.buf(out, len), k.buf(x, len));
            k.compute(Op::Add(Add { out, x, len })).map(drop)
        }
        "swiglu" => {
            let (gate, up, out, len) = (k.address(), k.address(), k.address(), k.u32());
            let (gate, up, out) = (k.buf(gate, len), k.buf(up, len), k.buf(out, len));
            k.compute(Op::SwiGlu(SwiGlu { gate, up, out, len })).map(drop)
        }
        "rope" => {
            let (x, freqs, head_dim, pairs) = (k.address(), k.address(), k.u32(), k.u32());
            let (halves, magnitude, heads) = (k.u32(), k.f32(), node.grid[0]);
            let x = k.buf(x, heads * head_dim);
            let freqs = k.vector(freqs, pairs)?;
            let pairing = k.pairing(halves);
            k.compute(Op::Rope(Rope { x, heads, head_dim, freqs, pairing, magnitude })).map(drop)
        }
        "kv_append" => {
            let (from_k, from_v, keys, values) =
                (k.address(), k.address(), k.address(), k.address());
            let (head_dim, capacity, kv_heads) = (k.u32(), k.u32(), node.grid[0]);
            let kind = kv_type(&name);
            let cache = k.cache([keys, values], kv_heads, head_dim, capacity, kind);
            let len = kv_heads * head_dim;
            let (from_k, from_v) = (k.buf(from_k, len), k.buf(from_v, len));
            k.compute(Op::KvAppend(KvAppend { k: from_k, v: from_v, cache })).map(drop)
        }
        "attention" => {
            let (q, keys, values) = (k.address(), k.address(), k.address());
            let (out, _partial, _counters) = (k.address(), k.address(), k.address());
            let (group, kv_heads, head_dim, capacity) = (k.u32(), k.u32(), k.u32(), k.u32());
            let (_splits, scale) = (k.u32(), k.f32());
            let cache = k.cache([keys, values], kv_heads, head_dim, capacity, kv_type(&name));
            let heads = group * kv_heads;
            let (q, out) = (k.buf(q, heads * head_dim), k.buf(out, heads * head_dim));
            let partial = k.inner(1);
            let op = Attention { q, cache, out, partial, heads, scale };
            k.compute(Op::Attention(op)).map(drop)
        }
        "embed" => {
            let (table, out, rows, columns, scale) =
                (k.address(), k.address(), k.u32(), k.u32(), k.f32());
            let table = k.matrix(table, weights, rows, columns, RowOrder::Natural)?;
            let out = k.buf(out, columns);
            k.compute(Op::Embed(Embed { table, out, scale })).map(drop)
        }
        "matvec" | "o_proj" | "down" => {
            let (x, w, bias, residual) = (k.address(), k.address(), k.address(), k.address());
            let (y, rows, columns) = (k.address(), k.u32(), k.u32());
            let weight = k.matrix(w, weights, rows, columns, RowOrder::Natural)?;
            let (x, bias) = (k.buf(x, columns), k.optional(bias, rows)?);
            if residual == 0 {
                let out = k.buf(y, rows);
                return k.compute(Op::MatVec(MatVec { x, weight, bias, out })).map(drop);
            }
            if residual != y {
                return Err(code::LAUNCH_FAILED);
            }
            let (product, out) = (k.inner(rows), k.buf(y, rows));
            let mat = MatVec { x, weight, bias, out: product };
            let add = Add { out, x: product, len: rows };
            k.compute(Op::Project(Project { mat, add, which: Projection::Down })).map(drop)
        }
        "qkv" => k.qkv(&formats),
        "gate_up" => {
            let (mut norm, dim) = k.norm()?;
            let (wg, wu, bg, bu) = (k.address(), k.address(), k.address(), k.address());
            let (out, rows, columns) = (k.address(), k.u32(), k.u32());
            let x = norm.x;
            norm.x = k.sized(x, columns);
            norm.gain = k.vector(dim, columns)?;
            norm.out = k.inner(columns);
            let (gate, up) = (k.inner(rows), k.inner(rows));
            let gate = k.product(wg, bg, weights, (rows, columns), norm.out, gate)?;
            let up = k.product(wu, bu, weights, (rows, columns), norm.out, up)?;
            let out = k.buf(out, rows);
            let act = SwiGlu { gate: gate.out, up: up.out, out, len: rows };
            k.compute(Op::GateUp(GateUp { norm, gate, up, act })).map(drop)
        }
        "lm_head" => {
            let (mut norm, gain) = k.norm()?;
            let (w, bias, logits, _candidates) =
                (k.address(), k.address(), k.address(), k.address());
            let (_counters, forced, ring, rows, columns) =
                (k.address(), k.address(), k.address(), k.u32(), k.u32());
            let step_address = node.args[0];
            if !active {
                return advance(k.s, step_address, forced, ring, None);
            }
            let x = norm.x;
            norm.x = k.sized(x, columns);
            norm.gain = k.vector(gain, columns)?;
            norm.out = k.inner(columns);
            let logits = k.buf(logits, rows);
            let head = k.product(w, bias, weights, (rows, columns), norm.out, logits)?;
            let argmax = Argmax { logits, vocab: rows, candidates: k.inner(1) };
            let (state, s) = k.compute_choice(Op::LmHead(LmHead { norm, head, argmax }), logits)?;
            advance(s, step_address, forced, ring, Some(state))
        }
        "argmax" => {
            let (logits, _candidates, _counters) = (k.address(), k.address(), k.address());
            let (forced, ring, vocab) = (k.address(), k.address(), k.u32());
            let step_address = node.args[0];
            if !active {
                return advance(k.s, step_address, forced, ring, None);
            }
            let (logits, candidates) = (k.buf(logits, vocab), k.inner(1));
            let op = Op::Argmax(Argmax { logits, vocab, candidates });
            let (state, s) = k.compute_choice(op, logits)?;
            advance(s, step_address, forced, ring, Some(state))
        }
        _ => Err(code::NOT_FOUND),
    }
}

/// The op and the weight formats that a kernel's name says.
fn split(name: &str) -> Option<(&str, Vec<QuantFormat>)> {
    const OPS: [&str; 14] = [
        "rms_norm",
        "add",
        "swiglu",
        "rope",
        "kv_append",
        "attention",
        "argmax",
        "embed",
        "matvec",
        "o_proj",
        "down",
        "qkv",
        "gate_up",
        "lm_head",
    ];
    let op = OPS.into_iter().find(|op| {
        name.strip_prefix(op).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
    })?;
    let mut rest = &name[op.len()..];
    let mut formats = Vec::new();
    while let Some(after) = rest.strip_prefix('_') {
        // `q4_k`, not `q4`: the longest suffix that fits.
        let fits = |f: &QuantFormat| {
            let rest = after.strip_prefix(f.suffix());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
        };
        let format = QuantFormat::ALL.into_iter().filter(fits).max_by_key(|f| f.suffix().len())?;
        formats.push(format);
        rest = &after[format.suffix().len()..];
    }
    Some((op, formats))
}

fn kv_type(name: &str) -> KvType {
    if name.ends_with("f16") { KvType::F16 } else { KvType::F32 }
}

fn read_step(s: &State, address: u64) -> Result<StepState, u32> {
    Ok(bytemuck::pod_read_unaligned(s.read(address, size_of::<StepState>())?))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

impl<'a> Kernel<'a> {
    fn raw(&mut self) -> u64 {
        self.next += 1;
        self.args.get(self.next - 1).copied().unwrap_or(u64::MAX)
    }

    fn address(&mut self) -> u64 {
        self.raw()
    }

    fn u32(&mut self) -> u32 {
        self.raw() as u32
    }

    fn f32(&mut self) -> f32 {
        f32::from_bits(self.raw() as u32)
    }

    /// A buffer on the device.
    fn buf(&mut self, address: u64, elements: u32) -> Buf {
        let buf = self.builder.buffer("on the device", elements);
        self.buffers.push((buf, Some(address)));
        buf
    }

    /// A buffer that the kernel keeps to itself.
    fn inner(&mut self, elements: u32) -> Buf {
        let buf = self.builder.buffer("within the kernel", elements);
        self.buffers.push((buf, None));
        buf
    }

    /// A buffer at the address that [`Self::norm`] put in the place of one.
    fn sized(&mut self, argument: Buf, elements: u32) -> Buf {
        let address = self.args[argument.0 as usize];
        self.buf(address, elements)
    }

    fn vector(&mut self, address: u64, len: u32) -> Result<Vector, u32> {
        let values = floats(self.s.read(address, 4 * len as usize)?);
        self.weights.push(HostWeight::Vector(values));
        Ok(Vector { id: WeightId(self.weights.len() as u32 - 1), len })
    }

    fn optional(&mut self, address: u64, len: u32) -> Result<Option<Vector>, u32> {
        if address == 0 { Ok(None) } else { self.vector(address, len).map(Some) }
    }

    fn matrix(
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

    fn product(
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
    fn norm(&mut self) -> Result<(RmsNorm, u64), u32> {
        let at = self.next as u32;
        let (_x, gain, eps) = (self.address(), self.address(), self.f32());
        let none = Vector { id: WeightId(u32::MAX), len: 0 };
        Ok((RmsNorm { x: Buf(at), gain: none, out: Buf(0), eps }, gain))
    }

    fn pairing(&self, halves: u32) -> Pairing {
        let wrong = self.s.plant == Some(Plant::RopePairs);
        if (halves != 0) != wrong { Pairing::Halves } else { Pairing::Adjacent }
    }

    fn cache(
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

    fn qkv(mut self, formats: &[QuantFormat]) -> Result<(), u32> {
        let k = &mut self;
        let (format, value_format) = match formats {
            [one] => (*one, *one),
            [first, second] => (*first, *second),
            _ => return Err(code::NOT_FOUND),
        };
        let (mut norm, gain) = k.norm()?;
        let matrices = [k.address(), k.address(), k.address()];
        let biases = [k.address(), k.address(), k.address()];
        let (freqs, q, keys, values) = (k.address(), k.address(), k.address(), k.address());
        let (q_rows, kv_rows, columns) = (k.u32(), k.u32(), k.u32());
        let (head_dim, pairs, halves, magnitude) = (k.u32(), k.u32(), k.u32(), k.f32());
        let (capacity, cache_f32) = (k.u32(), k.u32());
        let x = norm.x;
        norm.x = k.sized(x, columns);
        norm.gain = k.vector(gain, columns)?;
        norm.out = k.inner(columns);
        let order = match halves {
            0 => RowOrder::Natural,
            _ => RowOrder::PairHalves { head_dim: head_dim as usize, rotary: 2 * pairs as usize },
        };
        let outs = [k.buf(q, q_rows), k.inner(kv_rows), k.inner(kv_rows)];
        let mut mats = Vec::new();
        for (i, (rows, format, order)) in [
            (q_rows, format, order),
            (kv_rows, format, order),
            (kv_rows, value_format, RowOrder::Natural),
        ]
        .into_iter()
        .enumerate()
        {
            let weight = k.matrix(matrices[i], format, rows, columns, order)?;
            let bias = k.optional(biases[i], rows)?;
            mats.push(MatVec { x: norm.out, weight, bias, out: outs[i] });
        }
        let freqs = k.vector(freqs, pairs)?;
        let pairing = k.pairing(halves);
        let rope = |x, heads| Rope { x, heads, head_dim, freqs, pairing, magnitude };
        let (rope_q, rope_k) =
            (rope(outs[0], q_rows / head_dim), rope(outs[1], kv_rows / head_dim));
        let kind = if cache_f32 != 0 { KvType::F32 } else { KvType::F16 };
        let cache = k.cache([keys, values], kv_rows / head_dim, head_dim, capacity, kind);
        let append = KvAppend { k: outs[1], v: outs[2], cache };
        let [q, k_mat, v]: [MatVec; 3] = mats.try_into().map_err(|_| code::NOT_FOUND)?;
        let op = Qkv { norm, q, k: k_mat, v, rope_q, rope_k, append };
        self.compute(Op::Qkv(Box::new(op))).map(drop)
    }

    /// Runs the reference of `op` and writes what it wrote to the device.
    fn compute(self, op: Op) -> Result<(HostMemory, &'a mut State), u32> {
        let Self { s, step, mut builder, buffers, weights, cache, .. } = self;
        let plant = s.plant;
        builder.record("kernel", op.clone());
        let plan = builder.finish();
        let len = cache.map_or(0, |(c, _)| (c.kv_heads * c.capacity * c.head_dim) as usize);
        let mut memory = HostMemory::new(&plan.workspace(), weights, 1, len);
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
        }
        if let (Some((c, at)), Op::Qkv(_) | Op::KvAppend(_)) = (cache, &op) {
            append(s, &memory, c, at, position, step.position)?;
        }
        Ok((memory, s))
    }

    /// As [`Self::compute`], for what chooses a token.
    fn compute_choice(self, op: Op, logits: Buf) -> Result<(HostState, &'a mut State), u32> {
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
        }
    }
    Ok(())
}

/// Ends the step as the last kernel of a token does; `chosen` is `None` where nothing was computed.
fn advance(
    s: &mut State,
    address: u64,
    forced: u64,
    ring: u64,
    chosen: Option<HostState>,
) -> Result<(), u32> {
    const RING_STATUS: u32 = 0x8000_0000;
    let mut step = read_step(s, address)?;
    let (steps, position) = (step.steps, step.position);
    let finite = s.plant == Some(Plant::NonFiniteIgnored) || chosen.is_some_and(|c| c.finite);
    let capacity = step.capacity + u32::from(s.plant == Some(Plant::CapacityIgnored)) * 4;
    let mut entry = chosen.map_or(0, |c| c.next);
    let mut status = step.status;
    if status == 0 {
        if position >= capacity {
            status = 1;
        } else if step.token >= step.vocab {
            status = 2;
        } else if !finite {
            status = 4;
        } else {
            let mut next = entry;
            if position + 1 < step.capacity && s.plant != Some(Plant::ForcedIgnored) {
                let f = s.read(forced + 4 * u64::from(position + 1), 4)?;
                let f = u32::from_le_bytes([f[0], f[1], f[2], f[3]]);
                next = if f == NOT_FORCED { next } else { f };
            }
            step = StepState { token: next, position: position + 1, steps: steps + 1, ..step };
            step.status = if next < step.vocab { 0 } else { 2 };
        }
    } else if position >= step.capacity {
        status |= 1;
    }
    if status != 0 {
        step.status = status;
        entry = RING_STATUS | status;
    }
    s.write(address, bytemuck::bytes_of(&step))?;
    let behind = u32::from(s.plant == Some(Plant::RingOneStepBehind));
    let slot = ring + 16 * u64::from(steps % RING_SLOTS);
    let clock = s.clock;
    s.write(slot + 8, &clock.to_le_bytes())?;
    s.write(slot, &(u64::from(steps + 1 - behind) << 32 | u64::from(entry)).to_le_bytes())
}
