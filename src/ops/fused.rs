//! Fused ops: each holds the plain ops that it replaces, and its reference runs them in order.

use super::gemv::{self, Geometry, launch_with, norm_args, optional, tiles};
use super::{
    Activation, Add, Arg, Argmax, Buf, Describe, Glu, Gpu, HostMemory, KvAppend, KvType, Launch,
    MatVec, Pairing, RmsNorm, Rope, Traffic, WeightId,
};
use crate::quant::QuantFormat;

/// Norm, query, key and value projections with biases, rotation and cache append.
#[derive(Clone, Debug, PartialEq)]
pub struct Qkv {
    /// Of the residual stream.
    pub norm: RmsNorm,
    /// Query projection.
    pub q: MatVec,
    /// Key projection; its format is that of `q`.
    pub k: MatVec,
    /// Value projection.
    pub v: MatVec,
    /// Rotation of the queries.
    pub rope_q: Rope,
    /// Rotation of the keys.
    pub rope_k: Rope,
    /// Append of keys and values.
    pub append: KvAppend,
}

impl Qkv {
    /// Formats of (query and key, value) that have a common kernel beside the pairs of equals:
    /// those of the mixtures that files are published in. Any other mixture keeps its plain steps.
    pub const MIXED: [(QuantFormat, QuantFormat); 9] = [
        (QuantFormat::Q2K, QuantFormat::Q3K),
        (QuantFormat::Q2K, QuantFormat::Q4K),
        (QuantFormat::Q3K, QuantFormat::Q4K),
        (QuantFormat::Q3K, QuantFormat::Q5K),
        (QuantFormat::Q4K, QuantFormat::Q6K),
        (QuantFormat::Q5K, QuantFormat::Q6K),
        (QuantFormat::Q5_0, QuantFormat::Q8_0),
        (QuantFormat::Iq4Nl, QuantFormat::Q5K),
        (QuantFormat::Iq4Xs, QuantFormat::Q5K),
    ];

    /// Whether one kernel serves these formats of (query, key, value).
    pub fn has_kernel(q: QuantFormat, k: QuantFormat, v: QuantFormat) -> bool {
        q == k && (q == v || Self::MIXED.contains(&(q, v)))
    }

    pub(super) fn parts(&self) -> [&dyn Describe; 7] {
        [&self.norm, &self.q, &self.k, &self.v, &self.rope_q, &self.rope_k, &self.append]
    }
}

/// Weights that any of `parts` reads, each once.
fn weights_of(parts: &[&dyn Describe]) -> Vec<WeightId> {
    let mut ids: Vec<_> = parts.iter().flat_map(|p| p.weights()).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Traffic of a fusion: weights and cache of every part, activations of the ends only.
fn traffic_of(parts: &[&dyn Describe], position: u32, activations: u64) -> Traffic {
    let sum: Traffic = parts.iter().map(|p| p.traffic(position)).sum();
    Traffic { activations, ..sum }
}

fn qkv_shape(mats: [&MatVec; 3]) -> String {
    let [q, k, v] = mats.map(|m| &m.weight);
    format!("[{}] → [{}+{}+{}] {}/{}", q.columns, q.rows, k.rows, v.rows, q.format, v.format)
}

impl Describe for Qkv {
    fn name(&self) -> &'static str {
        "qkv"
    }

    fn shape(&self) -> String {
        qkv_shape([&self.q, &self.k, &self.v])
    }

    fn reads(&self) -> Vec<Buf> {
        vec![self.norm.x]
    }

    fn writes(&self) -> Vec<Buf> {
        vec![self.q.out]
    }

    fn weights(&self) -> Vec<WeightId> {
        weights_of(&self.parts())
    }

    fn traffic(&self, position: u32) -> Traffic {
        let io = 4 * u64::from(self.q.weight.columns + self.q.weight.rows);
        traffic_of(&self.parts(), position, io)
    }

    fn launch(&self, gpu: &Gpu) -> Launch {
        let cache = &self.append.cache;
        let after = AfterQkv {
            at: Arg::Step,
            freqs: Arg::Weight(self.rope_q.freqs.id),
            keys: Arg::Keys(cache.layer),
            values: Arg::Values(cache.layer),
            head_dim: cache.head_dim,
            pairs: self.rope_q.freqs.len,
            pairing: self.rope_q.pairing,
            magnitude: self.rope_q.magnitude,
            capacity: cache.capacity,
            kind: cache.kind,
        };
        qkv_launch(gpu, &self.norm, [&self.q, &self.k, &self.v], after)
    }

    fn reference(&self, mem: &mut HostMemory) {
        self.parts().iter().for_each(|op| op.reference(mem));
    }
}

/// What the kernel of [`Qkv`] does with the products.
struct AfterQkv {
    /// The step state whose position is written.
    at: Arg,
    freqs: Arg,
    keys: Arg,
    values: Arg,
    head_dim: u32,
    pairs: u32,
    pairing: Pairing,
    magnitude: f32,
    capacity: u32,
    kind: KvType,
}

fn qkv_launch(gpu: &Gpu, norm: &RmsNorm, mats: [&MatVec; 3], after: AfterQkv) -> Launch {
    let [q, k, v] = mats.map(|m| &m.weight);
    let (fq, fv) = (q.format, v.format);
    let total = tiles(q.rows) + tiles(k.rows) + tiles(v.rows);
    let geometry = Geometry::new(gpu, &[fq, fv], q.columns, total);
    let name =
        if fq == fv { fq.suffix().to_owned() } else { format!("{}_{}", fq.suffix(), fv.suffix()) };
    let module = if fq == fv { format!("gemv_{name}") } else { format!("qkv_{name}") };
    let mut args = vec![Arg::Step, Arg::Buf(norm.x)];
    args.extend(norm_args(norm));
    args.extend([q, k, v].map(|w| Arg::Weight(w.id)));
    args.extend(mats.map(|m| optional(m.bias)));
    args.extend([
        after.freqs,
        Arg::Buf(mats[0].out),
        after.keys,
        after.values,
        Arg::U32(q.rows),
        Arg::U32(k.rows),
        Arg::U32(q.columns),
        Arg::U32(after.head_dim),
        Arg::U32(after.pairs),
        Arg::U32(u32::from(after.pairing == Pairing::Halves)),
        Arg::F32(after.magnitude),
        Arg::U32(after.capacity),
        Arg::U32(u32::from(after.kind == KvType::F32)),
        after.at,
    ]);
    launch_with(gpu, module, format!("qkv_{name}"), geometry, args)
}

/// Norm, query, key and value projections with biases: where something stands between them and the
/// rotation.
#[derive(Clone, Debug, PartialEq)]
pub struct NormQkv {
    /// Of the residual stream.
    pub norm: RmsNorm,
    /// Query projection; an even number of rows.
    pub q: MatVec,
    /// Key projection, of the format of `q`; an even number of rows.
    pub k: MatVec,
    /// Value projection, of as many rows as `k`.
    pub v: MatVec,
}

impl NormQkv {
    pub(super) fn parts(&self) -> [&dyn Describe; 4] {
        [&self.norm, &self.q, &self.k, &self.v]
    }
}

impl Describe for NormQkv {
    fn name(&self) -> &'static str {
        "qkv"
    }

    fn shape(&self) -> String {
        qkv_shape([&self.q, &self.k, &self.v])
    }

    fn reads(&self) -> Vec<Buf> {
        vec![self.norm.x]
    }

    fn writes(&self) -> Vec<Buf> {
        vec![self.q.out, self.k.out, self.v.out]
    }

    fn weights(&self) -> Vec<WeightId> {
        weights_of(&self.parts())
    }

    fn traffic(&self, position: u32) -> Traffic {
        let (q, k) = (&self.q.weight, &self.k.weight);
        traffic_of(&self.parts(), position, 4 * u64::from(q.columns + q.rows + 2 * k.rows))
    }

    fn launch(&self, gpu: &Gpu) -> Launch {
        // Nothing rotates, and a cache of one head and one position is a vector.
        let after = AfterQkv {
            at: Arg::Zeros,
            freqs: Arg::Null,
            keys: Arg::Buf(self.k.out),
            values: Arg::Buf(self.v.out),
            head_dim: self.k.weight.rows,
            pairs: 0,
            pairing: Pairing::Adjacent,
            magnitude: 1.0,
            capacity: 1,
            kind: KvType::F32,
        };
        qkv_launch(gpu, &self.norm, [&self.q, &self.k, &self.v], after)
    }

    fn reference(&self, mem: &mut HostMemory) {
        self.parts().iter().for_each(|op| op.reference(mem));
    }
}

/// Norms of the query and key heads, their rotation and the cache append: what comes after the
/// projections where an architecture normalises heads.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadRope {
    /// Of the query heads.
    pub q_norm: RmsNorm,
    /// Of the key heads.
    pub k_norm: RmsNorm,
    /// Rotation of the queries.
    pub rope_q: Rope,
    /// Rotation of the keys.
    pub rope_k: Rope,
    /// Append of keys and values.
    pub append: KvAppend,
}

impl HeadRope {
    pub(super) fn parts(&self) -> [&dyn Describe; 5] {
        [&self.q_norm, &self.k_norm, &self.rope_q, &self.rope_k, &self.append]
    }
}

impl Describe for HeadRope {
    fn name(&self) -> &'static str {
        "head_rope"
    }

    fn shape(&self) -> String {
        let (q, c) = (&self.rope_q, &self.append.cache);
        let (heads, kind) = (q.heads, c.kind.name());
        format!("[{heads}+{}, {}] rotary {} {kind}", c.kv_heads, q.head_dim, q.rotary())
    }

    fn reads(&self) -> Vec<Buf> {
        vec![self.q_norm.x, self.k_norm.x, self.append.v]
    }

    fn writes(&self) -> Vec<Buf> {
        vec![self.q_norm.out]
    }

    fn weights(&self) -> Vec<WeightId> {
        weights_of(&self.parts())
    }

    fn traffic(&self, position: u32) -> Traffic {
        let (q, c) = (&self.rope_q, &self.append.cache);
        let io = 8 * u64::from((q.heads + c.kv_heads) * q.head_dim);
        traffic_of(&self.parts(), position, io)
    }

    fn launch(&self, _gpu: &Gpu) -> Launch {
        let (q, c) = (&self.rope_q, &self.append.cache);
        Launch {
            module: "elementwise".into(),
            kernel: format!("head_rope_{}", c.kind.name()),
            grid: q.heads + c.kv_heads,
            block: q.head_dim.next_multiple_of(32),
            cluster: 1,
            shared_bytes: 0,
            programmatic: true,
            args: vec![
                Arg::Step,
                Arg::Buf(self.q_norm.x),
                Arg::Buf(self.k_norm.x),
                Arg::Buf(self.append.v),
                Arg::Weight(self.q_norm.gain.id),
                Arg::Weight(self.k_norm.gain.id),
                Arg::F32(self.q_norm.eps),
                Arg::Weight(q.freqs.id),
                Arg::Buf(self.q_norm.out),
                Arg::Keys(c.layer),
                Arg::Values(c.layer),
                Arg::U32(q.heads),
                Arg::U32(q.head_dim),
                Arg::U32(q.freqs.len),
                Arg::U32(u32::from(q.pairing == Pairing::Halves)),
                Arg::F32(q.magnitude),
                Arg::U32(c.capacity),
            ],
        }
    }

    fn reference(&self, mem: &mut HostMemory) {
        self.parts().iter().for_each(|op| op.reference(mem));
    }
}

/// Norm of what a block adds to the residual stream, and the sum.
#[derive(Clone, Debug, PartialEq)]
pub struct NormAdd {
    /// Of a projection.
    pub norm: RmsNorm,
    /// The sum.
    pub add: Add,
}

impl Describe for NormAdd {
    fn name(&self) -> &'static str {
        "norm_add"
    }

    fn shape(&self) -> String {
        self.add.shape()
    }

    fn reads(&self) -> Vec<Buf> {
        vec![self.norm.x, self.add.out]
    }

    fn writes(&self) -> Vec<Buf> {
        vec![self.add.out]
    }

    fn weights(&self) -> Vec<WeightId> {
        self.norm.weights()
    }

    fn traffic(&self, position: u32) -> Traffic {
        traffic_of(&[&self.norm, &self.add], position, 12 * u64::from(self.add.len))
    }

    fn launch(&self, gpu: &Gpu) -> Launch {
        let mut launch = self.norm.launch(gpu);
        launch.kernel = "norm_add".into();
        // The same arguments; the output is added to.
        if let Some(out) = launch.args.iter_mut().find(|a| **a == Arg::Buf(self.norm.out)) {
            *out = Arg::Buf(self.add.out);
        }
        launch
    }

    fn reference(&self, mem: &mut HostMemory) {
        self.norm.reference(mem);
        self.add.reference(mem);
    }
}

/// Which projection back to the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Projection {
    /// Attention output.
    Output,
    /// Feed-forward output.
    Down,
}

/// A projection added to the residual stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Project {
    /// The projection.
    pub mat: MatVec,
    /// The sum.
    pub add: Add,
    /// Which one.
    pub which: Projection,
}

impl Describe for Project {
    fn name(&self) -> &'static str {
        match self.which {
            Projection::Output => "o_proj",
            Projection::Down => "down",
        }
    }

    fn shape(&self) -> String {
        self.mat.shape()
    }

    fn reads(&self) -> Vec<Buf> {
        vec![self.mat.x, self.add.out]
    }

    fn writes(&self) -> Vec<Buf> {
        vec![self.add.out]
    }

    fn weights(&self) -> Vec<WeightId> {
        self.mat.weights()
    }

    fn traffic(&self, position: u32) -> Traffic {
        let io = 4 * u64::from(self.mat.weight.columns + 2 * self.mat.weight.rows);
        traffic_of(&[&self.mat, &self.add], position, io)
    }

    fn launch(&self, gpu: &Gpu) -> Launch {
        gemv::launch(gpu, self.name(), Some(self.add.out), &self.mat, self.add.out)
    }

    fn reference(&self, mem: &mut HostMemory) {
        self.mat.reference(mem);
        self.add.reference(mem);
    }
}

/// Norm, gate and up projections and the gated activation.
#[derive(Clone, Debug, PartialEq)]
pub struct GateUp {
    /// Of the residual stream.
    pub norm: RmsNorm,
    /// Gate projection.
    pub gate: MatVec,
    /// Up projection, of the gate's format and shape.
    pub up: MatVec,
    /// Activation.
    pub act: Glu,
}

impl GateUp {
    pub(super) fn parts(&self) -> [&dyn Describe; 4] {
        [&self.norm, &self.gate, &self.up, &self.act]
    }
}

impl Describe for GateUp {
    fn name(&self) -> &'static str {
        "gate_up"
    }

    fn shape(&self) -> String {
        let w = &self.gate.weight;
        format!("[{}] → 2×[{}] {}", w.columns, w.rows, w.format)
    }

    fn reads(&self) -> Vec<Buf> {
        vec![self.norm.x]
    }

    fn writes(&self) -> Vec<Buf> {
        vec![self.act.out]
    }

    fn weights(&self) -> Vec<WeightId> {
        weights_of(&self.parts())
    }

    fn traffic(&self, position: u32) -> Traffic {
        let io = 4 * u64::from(self.gate.weight.columns + self.gate.weight.rows);
        traffic_of(&self.parts(), position, io)
    }

    fn launch(&self, gpu: &Gpu) -> Launch {
        let w = &self.gate.weight;
        let f = w.format.suffix();
        // A work item is a pair of tiles: the same rows of gate and up.
        let geometry = Geometry::paired(gpu, w.format, w.columns, tiles(w.rows));
        let mut args = vec![Arg::Step, Arg::Buf(self.norm.x)];
        args.extend(norm_args(&self.norm));
        args.extend([&self.gate, &self.up].map(|m| Arg::Weight(m.weight.id)));
        args.extend([&self.gate, &self.up].map(|m| optional(m.bias)));
        let is_gelu = u32::from(self.act.activation == Activation::GeluTanh);
        args.extend([Arg::Buf(self.act.out), Arg::U32(w.rows), Arg::U32(w.columns)]);
        args.push(Arg::U32(is_gelu));
        launch_with(gpu, format!("gemv_{f}"), format!("gate_up_{f}"), geometry, args)
    }

    fn reference(&self, mem: &mut HostMemory) {
        self.parts().iter().for_each(|op| op.reference(mem));
    }
}

/// Final norm, output head, choice of the next token and advance of the step state.
#[derive(Clone, Debug, PartialEq)]
pub struct LmHead {
    /// Of the residual stream.
    pub norm: RmsNorm,
    /// Output head.
    pub head: MatVec,
    /// Choice and advance, by the block that finishes last.
    pub argmax: Argmax,
}

impl LmHead {
    pub(super) fn parts(&self) -> [&dyn Describe; 3] {
        [&self.norm, &self.head, &self.argmax]
    }
}

impl Describe for LmHead {
    fn name(&self) -> &'static str {
        "lm_head"
    }

    fn shape(&self) -> String {
        self.head.shape()
    }

    fn reads(&self) -> Vec<Buf> {
        vec![self.norm.x]
    }

    fn writes(&self) -> Vec<Buf> {
        vec![self.head.out, self.argmax.candidates]
    }

    fn weights(&self) -> Vec<WeightId> {
        weights_of(&self.parts())
    }

    fn traffic(&self, position: u32) -> Traffic {
        let io = 4 * u64::from(self.head.weight.columns + self.head.weight.rows);
        traffic_of(&self.parts(), position, io)
    }

    fn launch(&self, gpu: &Gpu) -> Launch {
        let w = &self.head.weight;
        let f = w.format.suffix();
        let geometry = Geometry::new(gpu, &[w.format], w.columns, tiles(w.rows));
        let mut args = vec![Arg::Step, Arg::Buf(self.norm.x)];
        args.extend(norm_args(&self.norm));
        args.extend([
            Arg::Weight(w.id),
            optional(self.head.bias),
            Arg::Buf(self.head.out),
            Arg::Buf(self.argmax.candidates),
            Arg::Counters,
            Arg::Forced,
            Arg::Ring,
            Arg::U32(w.rows),
            Arg::U32(w.columns),
        ]);
        launch_with(gpu, format!("gemv_{f}"), format!("lm_head_{f}"), geometry, args)
    }

    fn reference(&self, mem: &mut HostMemory) {
        self.parts().iter().for_each(|op| op.reference(mem));
    }
}
