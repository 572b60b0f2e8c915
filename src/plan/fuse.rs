//! Fusion: rules that replace a run of plain steps by one fused step. One rule a function.
//!
//! A rule looks at the steps from an index on and answers with the fused op and how many steps it
//! replaces, or not at all: then the plain steps stay, which every backend runs as well.

use super::{DecodePlan, Step, WeightSpec};
use crate::ops::fused::{GateUp, HeadRope, LmHead, NormAdd, NormQkv, Project, Projection, Qkv};
use crate::ops::{Buf, ExpertGateUp, ExpertMatVec, MatVec, Op, Pairing, RmsNorm, Rope};
use crate::quant::RowOrder;

/// A fused op and the number of steps that it replaces.
type Fused = Option<(Op, usize)>;

/// The rules, tried in order at every step.
const RULES: [fn(&[Step]) -> Fused; 8] =
    [qkv, norm_qkv, head_rope, norm_add, gate_up, expert_gate_up, project, lm_head];

/// Applies every rule wherever it fits.
pub fn fuse(plan: &DecodePlan) -> DecodePlan {
    let mut steps = Vec::new();
    let mut i = 0;
    while i < plan.steps.len() {
        let rest = &plan.steps[i..];
        match RULES.iter().find_map(|rule| rule(rest)) {
            Some((op, n)) if !escapes(plan, i, n, &op) => {
                let name = op.describe().name().to_owned();
                let label = match rest[0].layer {
                    Some(l) => format!("L{l:02}.{name}"),
                    None => name,
                };
                steps.push(Step { label, layer: rest[0].layer, op });
                i += n;
            }
            _ => {
                steps.push(rest[0].clone());
                i += 1;
            }
        }
    }
    let mut fused = DecodePlan { steps, ..plan.clone() };
    pair_rows(&mut fused);
    fused
}

/// Lays query and key rows so that the partners of a rotation are neighbours in a tile: what the
/// epilogue of the fused kernel expects. Plain products keep the order of the file.
fn pair_rows(plan: &mut DecodePlan) {
    for step in &mut plan.steps {
        let Op::Qkv(op) = &mut step.op else { continue };
        if op.rope_q.pairing == Pairing::Adjacent {
            continue;
        }
        let (head_dim, rotary) = (op.rope_q.head_dim as usize, op.rope_q.rotary() as usize);
        let paired = RowOrder::PairHalves { head_dim, rotary };
        for m in [&mut op.q.weight, &mut op.k.weight] {
            m.order = paired;
            if let Some(WeightSpec::Matrix { order, .. }) = plan.weights.get_mut(m.id.0 as usize) {
                *order = paired;
            }
        }
    }
}

/// Whether a buffer that the fused op keeps to itself is read by a step outside the run.
fn escapes(plan: &DecodePlan, from: usize, n: usize, op: &Op) -> bool {
    let kept = op.describe();
    let visible: Vec<Buf> = kept.reads().into_iter().chain(kept.writes()).collect();
    let inside: Vec<Buf> = op.buffers().into_iter().filter(|b| !visible.contains(b)).collect();
    let outside = plan.steps[..from].iter().chain(&plan.steps[from + n..]);
    outside.flat_map(|s| s.op.describe().reads()).any(|b| inside.contains(&b))
}

/// `rms_norm, matvec q, matvec k, matvec v, rope q, rope k, kv_append` → [`Qkv`].
fn qkv(steps: &[Step]) -> Fused {
    let [s0, s1, s2, s3, s4, s5, s6, ..] = steps else { return None };
    let (
        Op::RmsNorm(norm),
        Op::MatVec(q),
        Op::MatVec(k),
        Op::MatVec(v),
        Op::Rope(rope_q),
        Op::Rope(rope_k),
        Op::KvAppend(append),
    ) = (&s0.op, &s1.op, &s2.op, &s3.op, &s4.op, &s5.op, &s6.op)
    else {
        return None;
    };
    let chained = rope_q.x == q.out && rope_k.x == k.out && append.k == k.out && append.v == v.out;
    // The epilogue rotates neighbours of a tile, so a tile must not straddle two heads.
    let whole_tiles = rope_q.head_dim.is_multiple_of(16);
    let fits = one_kernel(norm, [q, k, v]) && chained && one_rotation(rope_q, rope_k);
    (fits && whole_tiles).then(|| {
        let op = Qkv {
            norm: norm.clone(),
            q: q.clone(),
            k: k.clone(),
            v: v.clone(),
            rope_q: rope_q.clone(),
            rope_k: rope_k.clone(),
            append: append.clone(),
        };
        (Op::Qkv(Box::new(op)), 7)
    })
}

/// Whether one kernel computes these products of (query, key, value) after the norm.
fn one_kernel(norm: &RmsNorm, mats: [&MatVec; 3]) -> bool {
    let [q, k, v] = mats.map(|m| &m.weight);
    mats.iter().all(|m| m.x == norm.out)
        && Qkv::has_kernel(q.format, k.format, v.format)
        && k.rows == v.rows
}

/// `rms_norm, matvec q, matvec k, matvec v` → [`NormQkv`].
fn norm_qkv(steps: &[Step]) -> Fused {
    let [s0, s1, s2, s3, ..] = steps else { return None };
    let (Op::RmsNorm(norm), Op::MatVec(q), Op::MatVec(k), Op::MatVec(v)) =
        (&s0.op, &s1.op, &s2.op, &s3.op)
    else {
        return None;
    };
    // A thread of the epilogue has two rows.
    let pairs = q.weight.rows.is_multiple_of(2) && k.weight.rows.is_multiple_of(2);
    (one_kernel(norm, [q, k, v]) && pairs).then(|| {
        let [q, k, v] = [q, k, v].map(MatVec::clone);
        (Op::NormQkv(Box::new(NormQkv { norm: norm.clone(), q, k, v })), 4)
    })
}

/// Whether queries and keys rotate alike.
fn one_rotation(q: &Rope, k: &Rope) -> bool {
    q.freqs == k.freqs && q.pairing == k.pairing && q.magnitude == k.magnitude
}

/// `rms_norm q, rms_norm k, rope q, rope k, kv_append` → [`HeadRope`].
fn head_rope(steps: &[Step]) -> Fused {
    let [s0, s1, s2, s3, s4, ..] = steps else { return None };
    let (
        Op::RmsNorm(q_norm),
        Op::RmsNorm(k_norm),
        Op::Rope(rope_q),
        Op::Rope(rope_k),
        Op::KvAppend(append),
    ) = (&s0.op, &s1.op, &s2.op, &s3.op, &s4.op)
    else {
        return None;
    };
    let chained = rope_q.x == q_norm.out && rope_k.x == k_norm.out && append.k == k_norm.out;
    let heads = (q_norm.rows, q_norm.dim()) == (rope_q.heads, rope_q.head_dim)
        && (k_norm.rows, k_norm.dim()) == (rope_k.heads, rope_k.head_dim)
        && q_norm.eps == k_norm.eps;
    (chained && heads && one_rotation(rope_q, rope_k)).then(|| {
        let op = HeadRope {
            q_norm: q_norm.clone(),
            k_norm: k_norm.clone(),
            rope_q: rope_q.clone(),
            rope_k: rope_k.clone(),
            append: append.clone(),
        };
        (Op::HeadRope(Box::new(op)), 5)
    })
}

/// `rms_norm, add` → [`NormAdd`].
fn norm_add(steps: &[Step]) -> Fused {
    let [s0, s1, ..] = steps else { return None };
    let (Op::RmsNorm(norm), Op::Add(add)) = (&s0.op, &s1.op) else { return None };
    (norm.rows == 1 && add.x == norm.out)
        .then(|| (Op::NormAdd(NormAdd { norm: norm.clone(), add: add.clone() }), 2))
}

/// `rms_norm, matvec gate, matvec up, swiglu or geglu` → [`GateUp`].
fn gate_up(steps: &[Step]) -> Fused {
    let [s0, s1, s2, s3, ..] = steps else { return None };
    let (Op::RmsNorm(norm), Op::MatVec(gate), Op::MatVec(up), Op::Glu(act)) =
        (&s0.op, &s1.op, &s2.op, &s3.op)
    else {
        return None;
    };
    let chained = gate.x == norm.out
        && up.x == norm.out
        && act.gate == gate.out
        && act.up == up.out
        && gate.weight.format == up.weight.format
        && gate.weight.rows == up.weight.rows;
    chained.then(|| {
        let (norm, gate) = (norm.clone(), gate.clone());
        (Op::GateUp(GateUp { norm, gate, up: up.clone(), act: act.clone() }), 4)
    })
}

/// `expert_matvec gate, expert_matvec up, swiglu or geglu` → [`ExpertGateUp`].
fn expert_gate_up(steps: &[Step]) -> Fused {
    let [s0, s1, s2, ..] = steps else { return None };
    let (Op::ExpertMatVec(gate), Op::ExpertMatVec(up), Op::Glu(act)) = (&s0.op, &s1.op, &s2.op)
    else {
        return None;
    };
    let experts = |m: &ExpertMatVec| (m.x, m.own_input, m.route, m.experts, m.used);
    let shape = |m: &ExpertMatVec| (m.weight.format, m.weight.rows, m.weight.columns);
    let alike = experts(gate) == experts(up) && shape(gate) == shape(up) && !gate.own_input;
    (alike && act.gate == gate.out && act.up == up.out).then(|| {
        let (gate, up) = (gate.clone(), up.clone());
        (Op::ExpertGateUp(Box::new(ExpertGateUp { gate, up, act: act.clone() })), 3)
    })
}

/// `matvec, add` → [`Project`].
fn project(steps: &[Step]) -> Fused {
    let [s0, s1, ..] = steps else { return None };
    let (Op::MatVec(mat), Op::Add(add)) = (&s0.op, &s1.op) else { return None };
    let which = if s0.label.ends_with("down") { Projection::Down } else { Projection::Output };
    (add.x == mat.out)
        .then(|| (Op::Project(Project { mat: mat.clone(), add: add.clone(), which }), 2))
}

/// `rms_norm, matvec, argmax` → [`LmHead`].
fn lm_head(steps: &[Step]) -> Fused {
    let [s0, s1, s2, ..] = steps else { return None };
    let (Op::RmsNorm(norm), Op::MatVec(head), Op::Argmax(argmax)) = (&s0.op, &s1.op, &s2.op) else {
        return None;
    };
    (head.x == norm.out && argmax.logits == head.out).then(|| {
        let (norm, head) = (norm.clone(), head.clone());
        (Op::LmHead(LmHead { norm, head, argmax: argmax.clone() }), 3)
    })
}
