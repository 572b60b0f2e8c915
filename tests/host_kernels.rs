//! The kernels' own sources, compiled for the host and compared with the CPU references: the plain
//! element-wise ops. Needs `g++`, as the crate's dependencies do.
//!
//! Shows what a kernel computes and that its threads wait where they must; shows nothing of memory
//! orders, of blocks that run at the same time, or of what only the device's compiler does.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod host_shim;

use decode_graph::cuda::step_state::{NOT_FORCED, RING_SLOTS, StepState};
use decode_graph::ops::{
    Activation, Add, Argmax, Buf, CacheRef, Glu, HostMemory, HostState, HostWeight, KvAppend,
    KvType, Op, Pairing, RmsNorm, Rope, Vector, WeightId,
};
use decode_graph::plan::{CacheSpec, PlanBuilder};
use host_shim::Kernels;
use std::path::Path;

fn compile(change: impl Fn(&str, String) -> String) -> Kernels {
    Kernels::new(change)
}

/// Runs a kernel; parameters are addresses of buffers, or values.
fn run(kernels: &Kernels, name: &str, grid: u32, block: u32, parameters: &mut [u64]) {
    let code = kernels.run(name, (grid, block, 0, false), parameters);
    assert_eq!(code, Some(0), "{name}: threads wait for one another in vain");
}

fn at<T>(value: &mut T) -> u64 {
    std::ptr::from_mut(value) as u64
}

fn list<T>(values: &mut [T]) -> u64 {
    values.as_mut_ptr() as u64
}

fn word(value: u32) -> u64 {
    u64::from(value)
}

fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn nmse(x: &[f32], reference: &[f32]) -> f64 {
    let square = |v: f32| f64::from(v) * f64::from(v);
    let noise: f64 = x.iter().zip(reference).map(|(x, r)| square(x - r)).sum();
    noise / reference.iter().map(|r| square(*r)).sum::<f64>()
}

const POSITION: u32 = 5;

fn step() -> StepState {
    StepState { token: 1, position: POSITION, capacity: 8, vocab: 1 << 20, ..StepState::default() }
}

/// Runs the reference of what `op` makes of buffers with these contents.
fn reference(
    buffers: &[&[f32]],
    weights: &[Vec<f32>],
    cache: Option<CacheRef>,
    op: impl Fn(&[Buf]) -> Op,
) -> (HostMemory, Vec<Buf>) {
    let spec = CacheSpec { layers: 1, kv_heads: 1, head_dim: 2, capacity: 8, kind: KvType::F32 };
    let mut builder = PlanBuilder::new("an op", spec, 1 << 20);
    let bufs: Vec<Buf> = buffers.iter().map(|b| builder.buffer("b", b.len() as u32)).collect();
    let op = op(&bufs);
    builder.record("op", op.clone());
    let layout = builder.finish().workspace();
    let weights = weights.iter().cloned().map(HostWeight::Vector).collect();
    let elements = cache.map_or(0, |c| (c.kv_heads * c.capacity * c.head_dim) as usize);
    let mut memory = layout.host_memory(weights, 1, elements);
    for (buf, data) in bufs.iter().zip(buffers) {
        memory.buf_mut(*buf).copy_from_slice(data);
    }
    memory.state = HostState { position: POSITION, ..HostState::default() };
    op.describe().reference(&mut memory);
    (memory, bufs)
}

fn vector(len: usize) -> Vector {
    Vector { id: WeightId(0), len: len as u32 }
}

/// How far the norm's kernel is from its reference, for a length that is no multiple of the block.
fn error_of_rms_norm(kernels: &Kernels) -> f64 {
    let n = 2500;
    let (mut x, mut gain, mut out) = (noise(1, n), noise(2, n), vec![f32::NAN; n]);
    let (dim, eps, mut state) = (n as u32, 1e-5f32, step());
    let (memory, bufs) = reference(&[&x, &out], &[gain.clone()], None, |b| {
        Op::RmsNorm(RmsNorm { x: b[0], gain: vector(n), out: b[1], rows: 1, eps: 1e-5 })
    });
    let mut parameters = [
        at(&mut state),
        list(&mut x),
        list(&mut gain),
        list(&mut out),
        word(dim),
        word(eps.to_bits()),
    ];
    run(kernels, "rms_norm", 1, 1024, &mut parameters);
    nmse(&out, memory.buf(bufs[1]))
}

#[test]
fn element_wise_kernels_compute_what_their_references_compute() {
    let kernels = compile(|_, source| source);
    let error = error_of_rms_norm(&kernels);
    assert!(error < 1e-12, "rms_norm: {error:e}");

    let n = 1000usize;
    let (mut a, mut b, len) = (noise(3, n), noise(4, n), n as u32);
    let (memory, bufs) =
        reference(&[&a, &b], &[], None, |b| Op::Add(Add { out: b[0], x: b[1], len: n as u32 }));
    let mut state = step();
    run(&kernels, "add", 4, 256, &mut [at(&mut state), list(&mut a), list(&mut b), word(len)]);
    assert!(a == memory.buf(bufs[0]), "add");

    let mut out = vec![f32::NAN; n];
    let (memory, bufs) = reference(&[&a, &b, &out], &[], None, |b| {
        Op::Glu(Glu {
            gate: b[0],
            up: b[1],
            out: b[2],
            len: n as u32,
            activation: Activation::Silu,
        })
    });
    let mut parameters = [at(&mut state), list(&mut a), list(&mut b), list(&mut out), word(len)];
    run(&kernels, "swiglu", 4, 256, &mut parameters);
    let error = nmse(&out, memory.buf(bufs[2]));
    assert!(error < 1e-12, "swiglu: {error:e}");

    // 3 heads of 40 of which 24 rotate: neither is a multiple of a warp.
    for pairing in [Pairing::Adjacent, Pairing::Halves] {
        let (mut x, mut freqs) = (noise(5, 120), noise(6, 12));
        let rotated = |b: &[Buf]| {
            let freqs = vector(12);
            Op::Rope(Rope { x: b[0], heads: 3, head_dim: 40, freqs, pairing, magnitude: 1.25 })
        };
        let (memory, bufs) = reference(&[&x], &[freqs.clone()], None, rotated);
        let (dim, pairs, magnitude) = (40u32, 12u32, 1.25f32);
        let halves = u32::from(pairing == Pairing::Halves);
        let mut parameters = [
            at(&mut state),
            list(&mut x),
            list(&mut freqs),
            word(dim),
            word(pairs),
            word(halves),
            word(magnitude.to_bits()),
        ];
        run(&kernels, "rope", 3, 32, &mut parameters);
        let error = nmse(&x, memory.buf(bufs[0]));
        assert!(error < 1e-12, "rope {pairing:?}: {error:e}");
    }
}

#[test]
fn rows_are_appended_to_the_cache_where_the_reference_appends_them() {
    let kernels = compile(|_, source| source);
    let (mut k, mut v) = (noise(7, 80), noise(8, 80));
    let (dim, capacity, mut state) = (40u32, 8u32, step());
    for kind in [KvType::F16, KvType::F32] {
        let cache = CacheRef { layer: 0, kv_heads: 2, head_dim: 40, capacity: 8, kind };
        let (memory, _) = reference(&[&k, &v], &[], Some(cache), |b| {
            Op::KvAppend(KvAppend { k: b[0], v: b[1], cache })
        });
        let words = 2 * 8 * 40;
        let (mut keys, mut values) = (vec![0u32; words], vec![0u32; words]);
        let mut parameters = [
            at(&mut state),
            list(&mut k),
            list(&mut v),
            list(&mut keys),
            list(&mut values),
            word(dim),
            word(capacity),
        ];
        run(&kernels, &format!("kv_append_{}", kind.name()), 2, 64, &mut parameters);
        let f32s = |words: &[u32]| -> Vec<f32> {
            match kind {
                KvType::F32 => words.iter().map(|w| f32::from_bits(*w)).collect(),
                KvType::F16 => {
                    let halves: &[half::f16] = bytemuck::cast_slice(&words[..words.len() / 2]);
                    halves.iter().map(|h| h.to_f32()).collect()
                }
            }
        };
        assert!(f32s(&keys) == memory.cache(0).0 && f32s(&values) == memory.cache(0).1, "{kind:?}");
    }
}

/// Token, position and status after a step over `logits`, and the ring's entry of it.
fn argmax(kernels: &Kernels, logits: &mut [f32], state: StepState) -> (StepState, u64) {
    let mut state = state;
    let (mut candidates, mut counters) = (vec![0.0f32; 2 * 8], vec![0u32; 4]);
    let (mut forced, mut ring) = (vec![NOT_FORCED; 8], vec![0u64; 2 * RING_SLOTS as usize]);
    let vocab = logits.len() as u32;
    let mut parameters = [
        at(&mut state),
        list(logits),
        list(&mut candidates),
        list(&mut counters),
        list(&mut forced),
        list(&mut ring),
        word(vocab),
    ];
    run(kernels, "argmax", 8, 256, &mut parameters);
    assert_eq!(counters, [0; 4], "the counters are zero after the kernel");
    (state, ring[2 * (step().steps % RING_SLOTS) as usize])
}

#[test]
fn the_chosen_token_and_the_advanced_step_are_those_of_the_reference() {
    let kernels = compile(|_, source| source);
    for n in [1, 255, 20_003] {
        let mut logits = noise(n as u64, n);
        // The best logit twice: the lower index counts.
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        logits[n - 1] = best;
        let (memory, _) = reference(&[&logits, &[0.0]], &[], None, |b| {
            Op::Argmax(Argmax { logits: b[0], vocab: n as u32, candidates: b[1] })
        });
        let state = StepState { token: 0, ..step() };
        let (after, entry) = argmax(&kernels, &mut logits, state);
        assert_eq!((after.token, after.position), (memory.state.next, POSITION + 1), "{n}");
        assert_eq!((after.status, after.steps), (0, 1));
        assert_eq!(entry, 1 << 32 | u64::from(memory.state.next));
        logits[n / 2] = f32::NAN;
        let (after, entry) = argmax(&kernels, &mut logits, state);
        assert_eq!((after.status, after.position, entry as u32), (4, POSITION, 0x8000_0004), "{n}");
    }
    let full = StepState { position: 8, ..step() };
    let (after, _) = argmax(&kernels, &mut noise(9, 100), full);
    assert_eq!((after.status, after.position), (1, 8));
}

#[test]
fn a_missing_barrier_and_a_wrong_lane_are_caught() {
    const BARRIER: &str = "    if (lane == 0) sums[warp] = v;\n    __syncthreads();\n";
    let unsynchronised =
        compile(|_, source| source.replace(BARRIER, "    if (lane == 0) sums[warp] = v;\n"));
    let error = error_of_rms_norm(&unsynchronised);
    assert!(error > 1e-6, "a missing barrier: {error:e}");
    const LANE: &str = "v += __shfl_xor_sync(~0u, v, o);";
    let crossed = compile(|_, source| source.replace(LANE, "v += __shfl_xor_sync(~0u, v, o / 2);"));
    let error = error_of_rms_norm(&crossed);
    assert!(error > 1e-6, "a wrong lane: {error:e}");
    let source =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("ptx/common.cuh"));
    let source = source.unwrap();
    assert!(source.contains(BARRIER) && source.contains(LANE), "what is planted is there");
}
