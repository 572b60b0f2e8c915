//! Whole plans computed by the kernels' own code without a GPU: a session over the fake driver, whose
//! kernels are the sources compiled for the host, each step compared with the CPU reference.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod fake_driver;
mod format_models;
mod golden_models;
mod host_shim;
mod small_model;

use decode_graph::arch::{PlanOptions, record};
use decode_graph::checkpoint::Checkpoint;
use decode_graph::cuda::eager::Comparison;
use decode_graph::cuda::{CudaEngine, CudaOptions};
use decode_graph::ops::{Gpu, KvType, Sampling};
use decode_graph::plan::{DecodePlan, fuse};
use decode_graph::quant::QuantFormat;
use decode_graph::session::{DebugLevel, Mode};
use fake_driver::Fake;
use host_shim::{Kernels, module_of};
use small_model::SmallModel;
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::{Arc, LazyLock};

/// The kernels as they are.
static KERNELS: LazyLock<Arc<Kernels>> = LazyLock::new(|| Arc::new(Kernels::new(|_, text| text)));

/// A driver of a device of compute capability 8.0 that has `kernels` for the modules that begin with
/// `part`, and those that are as they are for the others.
fn device_with(kernels: &Arc<Kernels>, part: &'static str) -> Fake {
    let fake = Fake::new();
    fake.set_compute((8, 0));
    let kernels = kernels.clone();
    fake.run_kernels_by(Some(Arc::new(move |name, launch, slots| {
        let theirs = module_of(name).is_some_and(|module| module.starts_with(part));
        let kernels = if theirs { &kernels } else { &*KERNELS };
        kernels.run(name, launch, slots)
    })));
    fake
}

fn device(kernels: &Arc<Kernels>) -> Fake {
    device_with(kernels, "")
}

/// Two layers of 256, so that every format has whole blocks; `heads` query heads over half as many.
fn model(format: QuantFormat, heads: u32) -> Checkpoint {
    let bytes = SmallModel::new("llama", format).widen(heads).bytes();
    Checkpoint::from_gguf("small.gguf".as_ref(), bytes).unwrap()
}

fn plan(checkpoint: &Checkpoint, capacity: u32, kv: KvType, fused: bool) -> DecodePlan {
    let plain = record(checkpoint, PlanOptions { capacity, kv }).unwrap();
    if fused { fuse::fuse(&plain) } else { plain }
}

fn kernels_of(plan: &DecodePlan) -> BTreeSet<String> {
    let gpu = Gpu { sms: 4, compute: (8, 0), ..Gpu::H200 };
    plan.steps.iter().map(|s| s.op.describe().launch(&gpu).kernel).collect()
}

/// How far each step is from the reference, over `steps` tokens from position `depth` on.
fn compared(checkpoint: &Checkpoint, plan: &DecodePlan, depth: u32, steps: u32) -> Vec<Comparison> {
    let options = CudaOptions {
        mode: Mode::Eager,
        debug: DebugLevel::Compare,
        persistent: false,
        ..CudaOptions::default()
    };
    let mut engine = CudaEngine::new(checkpoint, plan, options, &mut |_, _| {}).unwrap();
    engine.debug_to(Box::new(std::io::sink()));
    engine.seek(depth).unwrap();
    engine.fill_cache(depth, 3).unwrap();
    engine.force(depth, &[7]).unwrap();
    // A step that reports itself ends the run; what was compared before it counts.
    let _ = engine.run(steps, &mut |_| ControlFlow::Continue(()));
    engine.comparisons().to_vec()
}

/// The bounds of the same comparison on a GPU.
fn is_wrong(c: &Comparison) -> bool {
    let bound = if matches!(c.what.as_str(), "keys" | "values") { 1e-6 } else { 1e-7 };
    c.what != "token" && (c.nmse.is_nan() || c.nmse > bound)
}

/// Checks every step of a plan; the kernels that ran are added to `seen`.
fn check(
    row: &str,
    checkpoint: &Checkpoint,
    plan: &DecodePlan,
    (depth, steps): (u32, u32),
    seen: &mut BTreeSet<String>,
) {
    let kernels = kernels_of(plan);
    KERNELS.prepare(kernels.iter().map(String::as_str));
    let all = compared(checkpoint, plan, depth, steps);
    assert!(all.len() >= steps as usize * plan.steps.len(), "{row}: something of each step");
    let wrong = all.iter().find(|c| is_wrong(c));
    assert!(wrong.is_none(), "{row}: {wrong:?}");
    seen.extend(kernels);
}

#[test]
fn the_kernels_of_every_format_compute_what_their_references_compute() {
    let _device = device(&KERNELS);
    let mut seen = BTreeSet::new();
    for format in QuantFormat::ALL {
        let checkpoint = model(format, 4);
        for fused in [true, false] {
            let plan = plan(&checkpoint, 8, KvType::F16, fused);
            check(&format!("{format}, fused {fused}"), &checkpoint, &plan, (0, 2), &mut seen);
        }
    }
    println!("{} kernels of {} formats", seen.len(), QuantFormat::ALL.len());
    assert!(seen.len() >= 7 * QuantFormat::ALL.len());
}

#[test]
fn attention_computes_what_its_reference_computes_on_both_sides_of_every_split() {
    let device = device(&KERNELS);
    device.set_multiprocessors(16);
    let mut seen = BTreeSet::new();
    for (heads, kv) in
        [(8, KvType::F16), (4, KvType::F16), (2, KvType::F16), (4, KvType::F32), (2, KvType::F32)]
    {
        let checkpoint = model(QuantFormat::F16, heads);
        let plan = plan(&checkpoint, 1200, kv, true);
        for depth in [1, 127, 128, 255, 256, 511, 1100] {
            let row = format!("{heads} heads, {}, depth {depth}", kv.name());
            check(&row, &checkpoint, &plan, (depth, 1), &mut seen);
        }
    }
    assert!(seen.contains("attention_f16") && seen.contains("attention_f32"));
}

#[test]
fn the_kernels_of_every_architecture_compute_what_their_references_compute() {
    let _device = device(&KERNELS);
    let mut seen = BTreeSet::new();
    for (name, golden, checkpoint) in golden_models::all() {
        let capacity = golden.capacity() as u32;
        for fused in [true, false] {
            let plan = plan(&checkpoint, capacity, KvType::F16, fused);
            for depth in [0, capacity - 1] {
                let row = format!("{name}, fused {fused}, depth {depth}");
                check(&row, &checkpoint, &plan, (depth, 1), &mut seen);
            }
        }
    }
    println!("{} kernels", seen.len());
    let only_here = ["head_rope_f16", "top_k", "expert_sum", "expert_gate_up_f16", "softcap"];
    for kernel in only_here.into_iter().chain(["geglu", "norm_add"]) {
        assert!(seen.contains(kernel), "{kernel} is in no plan: {seen:?}");
    }
}

#[test]
#[ignore = "minutes: 41 modules are compiled"]
fn every_kernel_with_weights_computes_what_its_reference_computes_in_every_format_and_mixture() {
    let _device = device(&KERNELS);
    let mut seen = BTreeSet::new();
    for (arch, formats, checkpoint) in format_models::all() {
        let plan = plan(&checkpoint, 8, KvType::F16, true);
        check(&format!("{arch} {formats}"), &checkpoint, &plan, (0, 2), &mut seen);
    }
    println!("{} kernels", seen.len());
    let of = |op: &str| seen.iter().filter(|kernel| kernel.starts_with(op)).count();
    let formats = QuantFormat::ALL.len();
    assert_eq!(of("qkv_"), formats + decode_graph::ops::fused::Qkv::MIXED.len());
    assert_eq!((of("gate_up_"), of("expert_gate_up_")), (formats, formats));
}

#[test]
fn a_draw_is_the_one_that_the_reference_makes_of_the_same_logits() {
    let _device = device(&KERNELS);
    let checkpoint = model(QuantFormat::F16, 4);
    let all = Sampling { temperature: 2.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 1 };
    for sampling in [
        all,
        Sampling { top_k: 3, seed: 2, ..all },
        Sampling { top_p: 0.9, seed: 3 << 40, ..all },
        Sampling { min_p: 0.3, seed: 4, ..all },
        Sampling { temperature: 0.7, top_k: 40, top_p: 0.95, min_p: 0.05, seed: 5 },
    ] {
        let options = PlanOptions { capacity: 8, kv: KvType::F16 };
        let plan = fuse::fuse(&record(&checkpoint, options).unwrap().sampled(sampling));
        KERNELS.prepare(kernels_of(&plan).iter().map(String::as_str));
        let options = CudaOptions { persistent: false, ..CudaOptions::default() };
        let mut engine = CudaEngine::new(&checkpoint, &plan, options, &mut |_, _| {}).unwrap();
        engine.seek(0).unwrap();
        engine.force(0, &[1]).unwrap();
        for position in 0..6 {
            let mut chosen = None;
            let mut sink = |c: decode_graph::session::Chosen| {
                chosen = Some(c.token);
                ControlFlow::Continue(())
            };
            engine.run(1, &mut sink).unwrap();
            let logits = engine.logits().unwrap();
            assert_eq!(chosen, sampling.choose(&logits, position), "{sampling:?} {position}");
        }
    }
}

// ------------------------------------------------------------------------------ planted defects

/// The sources with the `nth` of `what` in `file` replaced; `None` where there are fewer.
fn planted(file: &str, what: &str, with: &str, nth: usize) -> Option<Arc<Kernels>> {
    let text =
        std::fs::read_to_string(format!("{}/ptx/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    if text.matches(what).count() <= nth {
        return None;
    }
    Some(Arc::new(Kernels::new(|name, text| {
        if name != file {
            return text;
        }
        let at = text.match_indices(what).nth(nth).unwrap().0;
        format!("{}{with}{}", &text[..at], &text[at + what.len()..])
    })))
}

/// Multiprocessors, and the position of the first token.
type Place = (i32, u32);

/// Whether the comparison of steps finds anything wrong in a model of Q8_0 at any of these places,
/// with `kernels` for the modules that begin with `part`.
/// Two tokens: threads take turns in one order, then in the other.
fn is_caught(kernels: &Arc<Kernels>, part: &'static str, places: &[Place]) -> bool {
    let device = device_with(kernels, part);
    let checkpoint = model(QuantFormat::Q8_0, 4);
    let plan = plan(&checkpoint, 1200, KvType::F16, true);
    let names = kernels_of(&plan);
    let (own, others): (Vec<_>, Vec<_>) = names
        .iter()
        .map(String::as_str)
        .partition(|name| module_of(name).is_some_and(|m| m.starts_with(part)));
    kernels.prepare(own);
    KERNELS.prepare(others);
    places.iter().any(|(multiprocessors, depth)| {
        device.set_multiprocessors(*multiprocessors);
        let all = compared(&checkpoint, &plan, *depth, 2);
        // A step that gave up ends the comparison early.
        all.len() < 2 * plan.steps.len() || all.iter().any(is_wrong)
    })
}

/// Which of `what` in `file`, counted from 0, may be replaced by `with` and nothing is wrong; of
/// `only`, or of all.
fn not_caught(
    (file, what, with): (&'static str, &str, &str),
    only: Option<&[usize]>,
    places: &[Place],
) -> Vec<usize> {
    let part = file.split(['.', '_']).next().unwrap_or_default();
    let mut missed = Vec::new();
    let mut n = 0;
    while let Some(kernels) = planted(file, what, with, n) {
        if only.is_none_or(|only| only.contains(&n)) {
            let caught = is_caught(&kernels, part, places);
            println!("{file}: {what} number {n} {}", if caught { "caught" } else { "NOT caught" });
            missed.extend((!caught).then_some(n));
        }
        n += 1;
    }
    assert!(n > 0, "{file} has no {what}");
    missed
}

const NONE: [usize; 0] = [];
/// Many tiles a block, one part of the context; a context in parts; a context beyond short ones.
const FEW: Place = (2, 0);
const SPLIT: Place = (16, 300);
const LONG: Place = (16, 1100);
/// Its first barrier is the ring's, which code for 8.0 has not.
const PRODUCT_BARRIER: (&str, &str, &str) = ("gemv.cuh", "__syncthreads()", "(void)0");
const PRODUCT_LANE: (&str, &str, &str) = ("gemv.cuh", "__shfl_xor_sync", "wrong_lane");
const SHORT_BARRIER: (&str, &str, &str) = ("attention_head.cuh", "__syncthreads()", "(void)0");
const SHORT_LANE: (&str, &str, &str) = ("attention_head.cuh", "__shfl_xor_sync", "wrong_lane");
const LONG_BARRIER: (&str, &str, &str) = ("attention.cu", "__syncthreads()", "(void)0");
const LONG_LANE: (&str, &str, &str) = ("attention.cu", "__shfl_xor_sync", "wrong_lane");
const LONG_WAIT: (&str, &str, &str) = ("attention.cu", "wait_groups<UNITS - 1>()", "(void)0");

#[test]
fn without_a_defect_nothing_is_caught() {
    assert!(!is_caught(&KERNELS, "", &[FEW, SPLIT, LONG]));
}

#[test]
fn a_missing_barrier_and_a_wrong_lane_of_a_product_are_caught() {
    assert_eq!(not_caught(PRODUCT_BARRIER, Some(&[1, 2]), &[FEW]), NONE);
    assert_eq!(not_caught(PRODUCT_LANE, Some(&[1]), &[FEW]), NONE);
}

#[test]
fn a_missing_barrier_and_a_missing_wait_of_attention_are_caught() {
    assert_eq!(not_caught(SHORT_BARRIER, Some(&[1]), &[FEW]), NONE);
    assert_eq!(not_caught(LONG_WAIT, Some(&[0]), &[LONG]), NONE);
}

#[test]
#[ignore = "minutes: every barrier and every exchange of products and attention in turn"]
fn which_barriers_and_exchanges_are_not_missed() {
    for (defect, places) in [
        (PRODUCT_BARRIER, &[FEW][..]),
        (PRODUCT_LANE, &[FEW]),
        (SHORT_BARRIER, &[FEW, SPLIT]),
        (SHORT_LANE, &[FEW]),
        (LONG_BARRIER, &[LONG]),
        (LONG_LANE, &[LONG]),
        (LONG_WAIT, &[LONG]),
    ] {
        println!("{defect:?}: not caught {:?}", not_caught(defect, None, places));
    }
}
