//! Every launch that an op can ask for finds a kernel that takes exactly its arguments: checked
//! against the committed PTX, without a GPU.

use decode_graph::cuda::kernels::{ParamType, entry_parameters, modules, ptx};
use decode_graph::ops::fused::{
    GateUp, HeadRope, LmHead, NormAdd, NormQkv, Project, Projection, Qkv,
};
use decode_graph::ops::*;
use decode_graph::quant::{QuantFormat, RowOrder};
use std::collections::BTreeSet;

/// Modules with kernels that are no op of a plan.
const NO_OPS: &[&str] = &["persistent", "probe", "stamp"];

fn matrix(format: QuantFormat) -> Matrix {
    Matrix { id: WeightId(0), format, rows: 512, columns: 512, order: RowOrder::Natural }
}

fn vector(len: u32) -> Vector {
    Vector { id: WeightId(1), len }
}

fn cache(kind: KvType) -> CacheRef {
    CacheRef { layer: 0, kv_heads: 4, head_dim: 64, capacity: 1024, kind }
}

fn norm() -> RmsNorm {
    RmsNorm { x: Buf(0), gain: vector(512), out: Buf(1), rows: 1, eps: 1e-5 }
}

fn glu(activation: Activation) -> Glu {
    Glu { gate: Buf(2), up: Buf(3), out: Buf(4), len: 512, activation }
}

fn matvec(format: QuantFormat, bias: bool) -> MatVec {
    MatVec { x: Buf(1), weight: matrix(format), bias: bias.then(|| vector(512)), out: Buf(2) }
}

fn rope(pairing: Pairing) -> Rope {
    Rope { x: Buf(2), heads: 8, head_dim: 64, freqs: vector(32), pairing, magnitude: 1.0 }
}

fn append(kind: KvType) -> KvAppend {
    KvAppend { k: Buf(3), v: Buf(4), cache: cache(kind) }
}

fn argmax() -> Argmax {
    Argmax { logits: Buf(2), vocab: 512, candidates: Buf(5) }
}

fn sampling() -> Sampling {
    Sampling { temperature: 1.0, top_k: 40, top_p: 0.95, min_p: 0.05, seed: 1 }
}

fn qkv(qk: QuantFormat, v: QuantFormat, pairing: Pairing, kind: KvType, bias: bool) -> Op {
    Op::Qkv(Box::new(Qkv {
        norm: norm(),
        q: matvec(qk, bias),
        k: matvec(qk, bias),
        v: matvec(v, bias),
        rope_q: rope(pairing),
        rope_k: rope(pairing),
        append: append(kind),
    }))
}

/// Every op, in every format, cache type, pairing and with and without bias.
fn every_op() -> Vec<Op> {
    let kinds = [KvType::F16, KvType::F32];
    let pairings = [Pairing::Adjacent, Pairing::Halves];
    let mut ops = vec![
        Op::RmsNorm(norm()),
        Op::Add(Add { out: Buf(0), x: Buf(1), len: 512 }),
        Op::Glu(glu(Activation::Silu)),
        Op::Glu(glu(Activation::GeluTanh)),
        Op::Softcap(Softcap { x: Buf(2), len: 512, cap: 30.0 }),
        Op::TopK(TopK { logits: Buf(0), route: Buf(1), experts: 8, used: 2 }),
        Op::ExpertSum(ExpertSum { out: Buf(0), x: Buf(1), route: Buf(2), used: 2, len: 512 }),
        Op::Argmax(argmax()),
        Op::NormAdd(NormAdd { norm: norm(), add: Add { out: Buf(3), x: Buf(1), len: 512 } }),
        Op::Sample(Sample { logits: Buf(2), vocab: 512, sampling: sampling() }),
    ];
    ops.extend(pairings.map(|p| Op::Rope(rope(p))));
    for kind in kinds {
        ops.push(Op::KvAppend(append(kind)));
        ops.push(Op::HeadRope(Box::new(HeadRope {
            q_norm: norm(),
            k_norm: norm(),
            rope_q: rope(Pairing::Halves),
            rope_k: rope(Pairing::Halves),
            append: append(kind),
        })));
        ops.push(Op::Attention(Attention {
            q: Buf(0),
            cache: cache(kind),
            out: Buf(1),
            partial: Buf(2),
            heads: 8,
            scale: 0.125,
            softcap: Some(50.0),
            window: Some(4096),
        }));
    }
    for format in QuantFormat::ALL {
        ops.push(Op::Embed(Embed { table: matrix(format), out: Buf(0), scale: 1.0 }));
        let weight = matrix(format);
        let (x, own_input, route, out) = (Buf(0), false, Buf(1), Buf(2));
        let expert = ExpertMatVec { x, own_input, route, weight, experts: 8, used: 2, out };
        let (gate, up, act) = (expert.clone(), expert.clone(), glu(Activation::Silu));
        ops.push(Op::ExpertMatVec(expert));
        ops.push(Op::ExpertGateUp(Box::new(ExpertGateUp { gate, up, act })));
        for bias in [false, true] {
            let mat = matvec(format, bias);
            let add = Add { out: Buf(0), x: mat.out, len: 512 };
            ops.push(Op::MatVec(mat.clone()));
            for which in [Projection::Output, Projection::Down] {
                ops.push(Op::Project(Project { mat: mat.clone(), add: add.clone(), which }));
            }
            for activation in [Activation::Silu, Activation::GeluTanh] {
                let (gate, up) = (mat.clone(), mat.clone());
                ops.push(Op::GateUp(GateUp { norm: norm(), gate, up, act: glu(activation) }));
            }
            ops.push(Op::LmHead(LmHead { norm: norm(), head: mat, argmax: argmax() }));
        }
    }
    let equal = QuantFormat::ALL.map(|f| (f, f));
    for (qk, v) in equal.into_iter().chain(Qkv::MIXED) {
        for (pairing, kind) in pairings.into_iter().zip(kinds) {
            ops.push(qkv(qk, v, pairing, kind, kind == KvType::F32));
        }
        let [q, k, v] = [qk, qk, v].map(|f| matvec(f, false));
        ops.push(Op::NormQkv(Box::new(NormQkv { norm: norm(), q, k, v })));
    }
    ops
}

fn passed(arg: &Arg) -> ParamType {
    match arg {
        Arg::U32(_) => ParamType::U32,
        Arg::F32(_) => ParamType::F32,
        Arg::Buf(_)
        | Arg::Weight(_)
        | Arg::Null
        | Arg::Step
        | Arg::Forced
        | Arg::Ring
        | Arg::Keys(_)
        | Arg::Values(_)
        | Arg::Zeros
        | Arg::Counters
        | Arg::Program
        | Arg::Trace => ParamType::U64,
    }
}

#[test]
fn every_launch_passes_what_its_kernel_takes() {
    let mut checked = 0;
    for op in every_op() {
        let launch = op.describe().launch(&Gpu::H200);
        let (module, kernel) = (&launch.module, &launch.kernel);
        for compute in [(8, 0), (9, 0)] {
            let text = ptx(module, compute).unwrap_or_else(|| panic!("no module {module}"));
            let takes = entry_parameters(text, kernel)
                .unwrap_or_else(|| panic!("{module} has no kernel {kernel}"));
            let passes: Vec<_> = launch.args.iter().map(passed).collect();
            assert_eq!(passes, takes, "{module}: {kernel}");
        }
        checked += 1;
    }
    assert!(checked >= 100, "only {checked} launches checked");
}

#[test]
fn every_kernel_serves_an_op() {
    let launched: BTreeSet<_> = every_op()
        .iter()
        .map(|op| op.describe().launch(&Gpu::H200))
        .map(|l| (l.module, l.kernel))
        .collect();
    for module in modules().filter(|m| !NO_OPS.contains(m)) {
        for entry in ptx(module, (9, 0)).unwrap().split(".visible .entry ").skip(1) {
            let kernel = entry.split('(').next().unwrap().trim().to_owned();
            assert!(
                launched.contains(&(module.to_owned(), kernel.clone())),
                "{module}: nothing launches {kernel}"
            );
        }
    }
}
