//! What the kernels compute: the CPU reference of the op that a kernel is named after, on the memory
//! that its parameters point at. A new kernel gets an arm in [`run`].

use super::compute::Kernel;
use super::plants::Plant;
use super::state::{Node, State, code};
use super::step::{advance, read_step};
use decode_graph::ops::fused::{
    GateUp, HeadRope, LmHead, NormAdd, NormQkv, Project, Projection, Qkv,
};
use decode_graph::ops::{
    Activation, Add, Argmax, Attention, Embed, ExpertGateUp, ExpertMatVec, ExpertSum, Glu,
    KvAppend, KvType, MatVec, Op, RmsNorm, Rope, Sample, Sampling, Softcap, TopK,
};
use decode_graph::plan::{CacheSpec, PlanBuilder};
use decode_graph::quant::{QuantFormat, RowOrder};
use half::f16;

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
    if let Some(kind) = name.strip_prefix("fill_cache_") {
        return fill_cache(s, &node.args, kind == "f16");
    }
    if let Some(runner) = s.runner.clone() {
        let mut slots: Vec<u64> = node.args.iter().map(|a| s.on_host(*a)).collect();
        // Its program holds addresses too.
        let program = match name.as_str() {
            "decode_step" => s.program_on_host(node.args[1], node.args[4] as usize)?,
            _ => Vec::new(),
        };
        if !program.is_empty() {
            slots[1] = program.as_ptr() as u64;
        }
        let launch = (node.grid[0], node.block[0], node.shared_bytes, node.cooperative);
        match runner(&name, launch, &slots) {
            Some(0) => return Ok(()),
            Some(_) => return Err(code::LAUNCH_FAILED),
            None => {}
        }
    }
    let mut step = read_step(s, node.args[0])?;
    if name == "stamp" {
        let [_, stamps, slot, slots, rows, behind] = node.args[..] else {
            return Err(code::LAUNCH_FAILED);
        };
        let row = u64::from(step.steps).wrapping_sub(behind) % rows;
        let clock = s.clock;
        return s.write(stamps + 8 * (row * slots + slot), &clock.to_le_bytes());
    }
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
    let chooses = matches!(op, "argmax" | "lm_head" | "sample");
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
            let rows = node.grid[0];
            let (x, out) = (k.buf(x, rows * dim), k.buf(out, rows * dim));
            let gain = k.vector(gain, dim)?;
            k.compute(Op::RmsNorm(RmsNorm { x, gain, out, rows, eps })).map(drop)
        }
        "norm_add" => {
            let (x, gain, out, dim, eps) =
                (k.address(), k.address(), k.address(), k.u32(), k.f32());
            let (x, out, normed) = (k.buf(x, dim), k.buf(out, dim), k.inner(dim));
            let gain = k.vector(gain, dim)?;
            let norm = RmsNorm { x, gain, out: normed, rows: 1, eps };
            let add = Add { out, x: normed, len: dim };
            k.compute(Op::NormAdd(NormAdd { norm, add })).map(drop)
        }
        "softcap" => {
            let (x, len, cap) = (k.address(), k.u32(), k.f32());
            let x = k.buf(x, len);
            k.compute(Op::Softcap(Softcap { x, len, cap })).map(drop)
        }
        "top_k" => {
            let (logits, route, experts, used) = (k.address(), k.address(), k.u32(), k.u32());
            let (logits, route) = (k.buf(logits, experts), k.buf(route, 2 * used));
            k.compute(Op::TopK(TopK { logits, route, experts, used })).map(drop)
        }
        "expert_matvec" => k.expert_matvec(weights, node.grid[0]),
        "expert_gate_up" => k.expert_gate_up(weights, node.grid[0]),
        "expert_sum" => {
            let (out, x, route) = (k.address(), k.address(), k.address());
            let (used, len) = (k.u32(), k.u32());
            let (out, x, route) = (k.buf(out, len), k.buf(x, used * len), k.buf(route, 2 * used));
            k.compute(Op::ExpertSum(ExpertSum { out, x, route, used, len })).map(drop)
        }
        "head_rope" => k.head_rope(node.grid[0], kv_type(&name)),
        "add" => {
            let (out, x, len) = (k.address(), k.address(), k.u32());
            let (out, x) = (k.buf(out, len), k.buf(x, len));
            k.compute(Op::Add(Add { out, x, len })).map(drop)
        }
        "swiglu" | "geglu" => {
            let (gate, up, out, len) = (k.address(), k.address(), k.address(), k.u32());
            let (gate, up, out) = (k.buf(gate, len), k.buf(up, len), k.buf(out, len));
            let activation = if op == "geglu" { Activation::GeluTanh } else { Activation::Silu };
            k.compute(Op::Glu(Glu { gate, up, out, len, activation })).map(drop)
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
            let (_splits, scale, window, softcap) = (k.u32(), k.f32(), k.u32(), k.f32());
            let cache = k.cache([keys, values], kv_heads, head_dim, capacity, kv_type(&name));
            let heads = group * kv_heads;
            let (q, out) = (k.buf(q, heads * head_dim), k.buf(out, heads * head_dim));
            let partial = k.inner(1);
            let window = (window != 0).then_some(window);
            let softcap = (softcap != 0.0).then_some(softcap);
            if k.s.plant == Some(Plant::GridFromPosition) && graph {
                let position = k.step.position;
                k.step.position = *k.s.memories.position.get_or_insert(position);
            }
            let op = Attention { q, cache, out, partial, heads, scale, softcap, window };
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
            let (out, rows, columns, is_gelu) = (k.address(), k.u32(), k.u32(), k.u32());
            let x = norm.x;
            norm.x = k.sized(x, columns);
            norm.gain = k.vector(dim, columns)?;
            norm.out = k.inner(columns);
            let (gate, up) = (k.inner(rows), k.inner(rows));
            let gate = k.product(wg, bg, weights, (rows, columns), norm.out, gate)?;
            let up = k.product(wu, bu, weights, (rows, columns), norm.out, up)?;
            let out = k.buf(out, rows);
            let activation = if is_gelu != 0 { Activation::GeluTanh } else { Activation::Silu };
            let act = Glu { gate: gate.out, up: up.out, out, len: rows, activation };
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
        "sample" => {
            let (logits, forced, ring, vocab) = (k.address(), k.address(), k.address(), k.u32());
            let step_address = node.args[0];
            if !active {
                return advance(k.s, step_address, forced, ring, None);
            }
            let fraction = |bits: u32| (f64::from(bits) / f64::from(1u32 << 31)) as f32;
            let sampling = Sampling {
                temperature: temperature(k.f32()),
                top_k: k.u32(),
                top_p: fraction(k.u32()),
                min_p: fraction(k.u32()),
                seed: u64::from(k.u32()) | u64::from(k.u32()) << 32,
            };
            let logits = k.buf(logits, vocab);
            let (memory, s) = k.compute(Op::Sample(Sample { logits, vocab, sampling }))?;
            advance(s, step_address, forced, ring, Some(memory.state))
        }
        _ => Err(code::NOT_FOUND),
    }
}

/// The temperature of which `scale` is log₂e / T, to the last bit where there is one.
fn temperature(scale: f32) -> f32 {
    let near = std::f32::consts::LOG2_E / scale;
    let exact = |t: &f32| std::f32::consts::LOG2_E / t == scale;
    [near, near.next_down(), near.next_up()].into_iter().find(exact).unwrap_or(near)
}

/// The op and the weight formats that a kernel's name says.
fn split(name: &str) -> Option<(&str, Vec<QuantFormat>)> {
    const OPS: [&str; 23] = [
        "expert_gate_up",
        "norm_add",
        "softcap",
        "top_k",
        "expert_matvec",
        "expert_sum",
        "head_rope",
        "geglu",
        "rms_norm",
        "add",
        "swiglu",
        "rope",
        "kv_append",
        "attention",
        "argmax",
        "sample",
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

impl Kernel<'_> {
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
        let (capacity, cache_f32, at) = (k.u32(), k.u32(), k.address());
        let x = norm.x;
        norm.x = k.sized(x, columns);
        norm.gain = k.vector(gain, columns)?;
        norm.out = k.inner(columns);
        if freqs == 0 {
            // Nothing rotates, and the caches are vectors: of one position, which is 0.
            let plain = (pairs, halves, capacity, cache_f32) == (0, 0, 1, 1) && head_dim % 2 == 0;
            if !plain || k.s.read(at, 32)?.iter().any(|b| *b != 0) {
                return Err(code::LAUNCH_FAILED);
            }
            let [key, value] = [keys, values].map(|address| k.buf(address, kv_rows));
            let outs = [k.buf(q, q_rows), key, value];
            let mut mats = Vec::new();
            for (i, format) in [format, format, value_format].into_iter().enumerate() {
                let size = (if i == 0 { q_rows } else { kv_rows }, columns);
                mats.push(k.product(matrices[i], biases[i], format, size, norm.out, outs[i])?);
            }
            let [q, k_mat, v]: [MatVec; 3] = mats.try_into().map_err(|_| code::NOT_FOUND)?;
            let op = NormQkv { norm, q, k: k_mat, v };
            return self.compute(Op::NormQkv(Box::new(op))).map(drop);
        }
        if at != k.args[0] {
            return Err(code::LAUNCH_FAILED);
        }
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
}

impl Kernel<'_> {
    fn head_rope(mut self, grid: u32, kind: KvType) -> Result<(), u32> {
        let k = &mut self;
        let from = [k.address(), k.address(), k.address()];
        let (gains, eps) = ([k.address(), k.address()], k.f32());
        let (freqs, out, keys, values) = (k.address(), k.address(), k.address(), k.address());
        let (heads, head_dim, pairs, halves) = (k.u32(), k.u32(), k.u32(), k.u32());
        let (magnitude, capacity, kv_heads) = (k.f32(), k.u32(), grid - heads);
        let cache = k.cache([keys, values], kv_heads, head_dim, capacity, kind);
        let kv_rows = kv_heads * head_dim;
        let [q, key] = [k.buf(from[0], heads * head_dim), k.buf(from[1], kv_rows)];
        let v = k.buf(from[2], kv_rows);
        let (out, normed) = (k.buf(out, heads * head_dim), k.inner(kv_rows));
        let [q_gain, k_gain] = [k.vector(gains[0], head_dim)?, k.vector(gains[1], head_dim)?];
        let (freqs, pairing) = (k.vector(freqs, pairs)?, k.pairing(halves));
        let norm = |x, gain, out, rows| RmsNorm { x, gain, out, rows, eps };
        let rope = |x, heads| Rope { x, heads, head_dim, freqs, pairing, magnitude };
        let op = HeadRope {
            q_norm: norm(q, q_gain, out, heads),
            k_norm: norm(key, k_gain, normed, kv_heads),
            rope_q: rope(out, heads),
            rope_k: rope(normed, kv_heads),
            append: KvAppend { k: normed, v, cache },
        };
        self.compute(Op::HeadRope(Box::new(op))).map(drop)
    }

    /// Experts up to the last that `route` chooses: only what is chosen must be there.
    fn experts(&self, route: u64, used: u32) -> Result<u32, u32> {
        let chosen = self.s.read(route, 4 * used as usize)?.as_chunks::<4>().0;
        let last = chosen.iter().map(|e| f32::from_le_bytes(*e) as u32).max();
        Ok(last.ok_or(code::LAUNCH_FAILED)? + 1)
    }

    fn expert_gate_up(mut self, format: QuantFormat, grid: u32) -> Result<(), u32> {
        let k = &mut self;
        let (x, route, matrices, out) =
            (k.address(), k.address(), [k.address(), k.address()], k.address());
        let (rows, columns, each, is_gelu) = (k.u32(), k.u32(), k.u32(), k.u32());
        let used = grid / each;
        let (experts, len) = (k.experts(route, used)?, used * rows);
        let (x, route, own_input) = (k.buf(x, columns), k.buf(route, 2 * used), false);
        let mut product = |w| {
            let weight = k.matrix(w, format, experts * rows, columns, RowOrder::Natural)?;
            let out = k.inner(len);
            Ok::<_, u32>(ExpertMatVec { x, own_input, route, weight, experts, used, out })
        };
        let (gate, up) = (product(matrices[0])?, product(matrices[1])?);
        let activation = if is_gelu != 0 { Activation::GeluTanh } else { Activation::Silu };
        let act = Glu { gate: gate.out, up: up.out, out: k.buf(out, len), len, activation };
        self.compute(Op::ExpertGateUp(Box::new(ExpertGateUp { gate, up, act }))).map(drop)
    }

    fn expert_matvec(mut self, format: QuantFormat, grid: u32) -> Result<(), u32> {
        let k = &mut self;
        let (x, route, w, out) = (k.address(), k.address(), k.address(), k.address());
        let (rows, columns, stride, each) = (k.u32(), k.u32(), k.u32(), k.u32());
        let used = grid / each;
        let experts = k.experts(route, used)?;
        let weight = k.matrix(w, format, experts * rows, columns, RowOrder::Natural)?;
        let own_input = stride != 0;
        let x = k.buf(x, if own_input { used * columns } else { columns });
        let (route, out) = (k.buf(route, 2 * used), k.buf(out, used * rows));
        let op = ExpertMatVec { x, own_input, route, weight, experts, used, out };
        self.compute(Op::ExpertMatVec(op)).map(drop)
    }
}

/// Seeded rows of `[heads, capacity, head_dim]`, by the formula that stands over
/// `src/engine/seeded.rs`.
fn fill_cache(s: &mut State, args: &[u64], halves: bool) -> Result<(), u32> {
    let &[cache, stream, heads, head_dim, capacity, positions] = args else {
        return Err(code::LAUNCH_FAILED);
    };
    let mix = |x: u64| {
        let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    };
    for (head, position) in (0..heads).flat_map(|h| (0..positions).map(move |p| (h, p))) {
        let row = mix(mix(stream.wrapping_add(head)).wrapping_add(position));
        let value = |i: u64| {
            let uniform = (mix(row.wrapping_add(i)) >> 40) as f32 / 16_777_216.0;
            f16::from_f32((uniform - 0.5) * 3.464_101_6)
        };
        let bytes: Vec<u8> = match halves {
            true => (0..head_dim).flat_map(|i| value(i).to_le_bytes()).collect(),
            false => (0..head_dim).flat_map(|i| value(i).to_f32().to_le_bytes()).collect(),
        };
        let element = if halves { 2 } else { 4 };
        s.write(cache + (head * capacity + position) * head_dim * element, &bytes)?;
    }
    Ok(())
}
