//! The kernels' own sources, compiled for the host and compared with the CPU references: the plain
//! element-wise ops. Needs `g++`, as the crate's dependencies do.
//!
//! Shows what a kernel computes and that its threads wait where they must; shows nothing of memory
//! orders, of blocks that run at the same time, or of what only the device's compiler does.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]
#![allow(unsafe_code, reason = "calls a library that was just compiled")]

use decode_graph::cuda::step_state::{NOT_FORCED, RING_SLOTS, StepState};
use decode_graph::ops::{
    Activation, Add, Argmax, Buf, CacheRef, Glu, HostMemory, HostState, HostWeight, KvAppend,
    KvType, Op, Pairing, RmsNorm, Rope, Vector, WeightId,
};
use decode_graph::plan::{CacheSpec, PlanBuilder};
use libloading::{Library, Symbol};
use std::ffi::c_void;
use std::path::Path;
use std::process::Command;

/// Replaces the inline PTX of a source by what it does on one thread of a host. PTX that is not known
/// here stays, and does not compile.
fn without_ptx(source: &str) -> String {
    const KNOWN: [(&str, &str); 3] = [
        ("fence.acq_rel.gpu", ""),
        ("%%globaltimer", "t = shim::clock()"),
        ("cvt.rn.f16.f32", "at->bits = shim::half(v)"),
    ];
    let mut out = String::new();
    let mut rest = source;
    while let Some(at) = rest.find("asm volatile(") {
        let end = at + rest[at..].find(");").unwrap();
        let known = KNOWN.iter().find(|(ptx, _)| rest[at..end].contains(ptx));
        out.push_str(&rest[..at]);
        out.push_str(known.map_or(&rest[at..=end], |(_, host)| host));
        rest = &rest[end + 1..];
    }
    out + rest
}

/// Compiles `elementwise.cu` after `change` was made to each source.
fn compile(change: impl Fn(String) -> String) -> Library {
    let folder = tempfile::tempdir().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for name in ["common.cuh", "elementwise.cu"] {
        let source = std::fs::read_to_string(root.join("ptx").join(name)).unwrap();
        std::fs::write(folder.path().join(name), change(without_ptx(&source))).unwrap();
    }
    let library = folder.path().join("kernels.so");
    let output = Command::new("g++")
        .args(["-std=c++17", "-O1", "-w", "-shared", "-fPIC"])
        .args(["-ffp-contract=off", "-fno-strict-aliasing", "-fno-gnu-unique", "-I"])
        .arg(folder.path())
        .arg(root.join("tests/host_shim/elementwise.cpp"))
        .arg("-o")
        .arg(&library)
        .output()
        .expect("g++ compiles the kernels for the host: install it");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // SAFETY: made just now from the sources of this repository.
    unsafe { Library::new(&library) }.unwrap()
}

/// Runs a kernel; `parameters` point at buffers, or at values.
fn run(kernels: &Library, name: &str, grid: u32, block: u32, parameters: &mut [*mut c_void]) {
    type Run = unsafe extern "C" fn(u32, u32, *mut *mut c_void) -> i32;
    let symbol = format!("run_{name}");
    // SAFETY: `elementwise.cpp` defines it with this type.
    let run: Symbol<'_, Run> = unsafe { kernels.get(symbol.as_bytes()) }.unwrap();
    // SAFETY: as many parameters, of the kernel's types, as each test gives.
    let code = unsafe { run(grid, block, parameters.as_mut_ptr()) };
    assert_eq!(code, 0, "{name}: threads wait for one another in vain");
}

fn at<T>(value: &mut T) -> *mut c_void {
    std::ptr::from_mut(value).cast()
}

fn list<T>(values: &mut [T]) -> *mut c_void {
    values.as_mut_ptr().cast()
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
fn error_of_rms_norm(kernels: &Library) -> f64 {
    let n = 2500;
    let (mut x, mut gain, mut out) = (noise(1, n), noise(2, n), vec![f32::NAN; n]);
    let (mut dim, mut eps, mut state) = (n as u32, 1e-5f32, step());
    let (memory, bufs) = reference(&[&x, &out], &[gain.clone()], None, |b| {
        Op::RmsNorm(RmsNorm { x: b[0], gain: vector(n), out: b[1], rows: 1, eps: 1e-5 })
    });
    let mut parameters =
        [at(&mut state), list(&mut x), list(&mut gain), list(&mut out), at(&mut dim), at(&mut eps)];
    run(kernels, "rms_norm", 1, 1024, &mut parameters);
    nmse(&out, memory.buf(bufs[1]))
}

#[test]
fn element_wise_kernels_compute_what_their_references_compute() {
    let kernels = compile(|source| source);
    let error = error_of_rms_norm(&kernels);
    assert!(error < 1e-12, "rms_norm: {error:e}");

    let n = 1000usize;
    let (mut a, mut b, mut len) = (noise(3, n), noise(4, n), n as u32);
    let (memory, bufs) =
        reference(&[&a, &b], &[], None, |b| Op::Add(Add { out: b[0], x: b[1], len: n as u32 }));
    let mut state = step();
    run(&kernels, "add", 4, 256, &mut [at(&mut state), list(&mut a), list(&mut b), at(&mut len)]);
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
    let mut parameters = [at(&mut state), list(&mut a), list(&mut b), list(&mut out), at(&mut len)];
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
        let (mut dim, mut pairs, mut magnitude) = (40u32, 12u32, 1.25f32);
        let mut halves = u32::from(pairing == Pairing::Halves);
        let mut parameters = [
            at(&mut state),
            list(&mut x),
            list(&mut freqs),
            at(&mut dim),
            at(&mut pairs),
            at(&mut halves),
            at(&mut magnitude),
        ];
        run(&kernels, "rope", 3, 32, &mut parameters);
        let error = nmse(&x, memory.buf(bufs[0]));
        assert!(error < 1e-12, "rope {pairing:?}: {error:e}");
    }
}

#[test]
fn rows_are_appended_to_the_cache_where_the_reference_appends_them() {
    let kernels = compile(|source| source);
    let (mut k, mut v) = (noise(7, 80), noise(8, 80));
    let (mut dim, mut capacity, mut state) = (40u32, 8u32, step());
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
            at(&mut dim),
            at(&mut capacity),
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
fn argmax(kernels: &Library, logits: &mut [f32], state: StepState) -> (StepState, u64) {
    let mut state = state;
    let (mut candidates, mut counters) = (vec![0.0f32; 2 * 8], vec![0u32; 4]);
    let (mut forced, mut ring) = (vec![NOT_FORCED; 8], vec![0u64; 2 * RING_SLOTS as usize]);
    let mut vocab = logits.len() as u32;
    let mut parameters = [
        at(&mut state),
        list(logits),
        list(&mut candidates),
        list(&mut counters),
        list(&mut forced),
        list(&mut ring),
        at(&mut vocab),
    ];
    run(kernels, "argmax", 8, 256, &mut parameters);
    assert_eq!(counters, [0; 4], "the counters are zero after the kernel");
    (state, ring[2 * (step().steps % RING_SLOTS) as usize])
}

#[test]
fn the_chosen_token_and_the_advanced_step_are_those_of_the_reference() {
    let kernels = compile(|source| source);
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
        compile(|source| source.replace(BARRIER, "    if (lane == 0) sums[warp] = v;\n"));
    let error = error_of_rms_norm(&unsynchronised);
    assert!(error > 1e-6, "a missing barrier: {error:e}");
    const LANE: &str = "v += __shfl_xor_sync(~0u, v, o);";
    let crossed = compile(|source| source.replace(LANE, "v += __shfl_xor_sync(~0u, v, o / 2);"));
    let error = error_of_rms_norm(&crossed);
    assert!(error > 1e-6, "a wrong lane: {error:e}");
    let source =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("ptx/common.cuh"));
    let source = source.unwrap();
    assert!(source.contains(BARRIER) && source.contains(LANE), "what is planted is there");
}
