//! What a GPU must show of trust, in one command, with a prebuilt binary:
//!
//! ```text
//! gpu_trust --test-threads=1 --nocapture
//! ```
//!
//! Red zones, steps that must write nothing, a thousand sessions, long runs, one hash, and defects
//! planted in kernels. Each test prints its figures, or `skipped: no CUDA device` where none answers.
//! `scripts/sanitize.sh` runs the ignored ones, each in a process of its own, under compute-sanitizer.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests.

mod endurance_runs;
mod few_tokens;
mod format_models;
mod planted_ptx_edits;
mod small_model;

use decode_graph::arch::{PlanOptions, record};
use decode_graph::checkpoint::{Checkpoint, SyntheticSpec};
use decode_graph::cuda::bind::{KernelSource, gpu_of};
use decode_graph::cuda::driver::{Context, Device};
use decode_graph::cuda::{CudaEngine, CudaOptions, kernels};
use decode_graph::error::{Error, Result};
use decode_graph::ops::{KvType, Sampling};
use decode_graph::plan::{DecodePlan, fuse};
use decode_graph::quant::QuantFormat;
use decode_graph::reference;
use decode_graph::session::{BackendChoice, DebugLevel, Mode, SessionOptions};
use endurance_runs::{
    DEVICE_DRIFT, HOST_DRIFT, build_and_destroy, memory_held_elsewhere, one_hash, soak,
    steps_that_write_nothing,
};
use planted_ptx_edits::{
    GRID_OF_THE_FIRST_POSITION, NO_BARRIER, NO_BARRIER_IN_A_NORM, NO_WAIT, Planted,
    STORE_BEHIND_A_BUFFER, STORE_BEHIND_THE_CACHE,
};
use small_model::SmallModel;
use std::ops::ControlFlow;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A context of the first device, which keeps it in use between sessions, and the compute capability.
fn device() -> Option<(Context, (u32, u32))> {
    let found = Device::get(0).and_then(Context::new).and_then(|context| {
        let compute = gpu_of(&context)?.compute;
        Ok((context, compute))
    });
    match found {
        Ok(found) => Some(found),
        Err(Error::NoDevice(why)) => {
            eprintln!("skipped: no CUDA device ({why})");
            None
        }
        Err(other) => panic!("{other}"),
    }
}

/// Two layers of 256, so that every format has whole blocks; 4 heads of 64 over 2.
fn model(format: QuantFormat) -> Checkpoint {
    let bytes = SmallModel::new("llama", format).widen(4).bytes();
    Checkpoint::from_gguf("small.gguf".as_ref(), bytes).unwrap()
}

fn synthetic(spec: &str) -> Checkpoint {
    Checkpoint::synthetic(&SyntheticSpec::parse(spec).unwrap()).unwrap()
}

fn plan(checkpoint: &Checkpoint, capacity: u32, fused: bool) -> DecodePlan {
    let plain = record(checkpoint, PlanOptions { capacity, kv: KvType::F16 }).unwrap();
    if fused { fuse::fuse(&plain) } else { plain }
}

/// Sessions of a kernel a step, or of the persistent kernel.
fn cuda(capacity: u32, persistent: bool) -> SessionOptions {
    let backend = BackendChoice::Cuda;
    SessionOptions { backend, capacity, persistent, ..SessionOptions::default() }
}

/// Runs from position 0 to the end of the cache.
fn fill(engine: &mut CudaEngine, capacity: u32) -> Result<Vec<u32>> {
    engine.seek(0)?;
    engine.force(0, &[1, 2, 3])?;
    let mut tokens = Vec::new();
    engine.run(capacity + 3, &mut |c| {
        tokens.push(c.token);
        ControlFlow::Continue(())
    })?;
    Ok(tokens)
}

/// A way to issue a plan: fused or plain, and in the persistent kernel or not.
type Way = (bool, Mode, bool);

const KERNELS: [Way; 3] =
    [(true, Mode::Graph, false), (true, Mode::Eager, false), (false, Mode::Graph, false)];
const PERSISTENT: [Way; 2] = [(true, Mode::Graph, true), (true, Mode::Eager, true)];

/// Every format in these ways, between red zones, to the last position of the cache.
fn every_format_between_red_zones(ways: &[Way], capacity: u32) -> usize {
    let mut runs = 0;
    for format in QuantFormat::ALL {
        let checkpoint = model(format);
        for &(fused, mode, persistent) in ways {
            let plan = plan(&checkpoint, capacity, fused);
            let options =
                CudaOptions { mode, persistent, red_zones: true, ..CudaOptions::default() };
            let row = format!("{format}, fused {fused}, {mode:?}, persistent {persistent}");
            let mut engine = CudaEngine::new(&checkpoint, &plan, options, &mut |_, _| {})
                .unwrap_or_else(|e| panic!("{row}: {e}"));
            for byte in [0xFF, 0x7E] {
                engine.poison(byte).unwrap();
                let tokens = fill(&mut engine, capacity).unwrap_or_else(|e| panic!("{row}: {e}"));
                assert_eq!(tokens.len(), capacity as usize, "{row}");
                engine.check_red_zones().unwrap_or_else(|e| panic!("{row}: {e}"));
            }
            runs += 1;
        }
    }
    runs
}

#[test]
fn no_kernel_of_any_format_writes_outside_its_buffers() {
    let Some(_device) = device() else { return };
    let start = Instant::now();
    let runs = every_format_between_red_zones(&KERNELS, 40);
    println!("trust | red zones | {runs} sessions, no byte changed, in {:?}", start.elapsed());
}

#[test]
fn the_persistent_kernel_writes_nothing_outside_its_buffers() {
    let Some(_device) = device() else { return };
    let runs = every_format_between_red_zones(&PERSISTENT, 40);
    println!("trust | red zones, persistent | {runs} sessions, no byte changed");
}

/// Position and token out of range in plans of two formats.
fn out_of_range(ways: &[(bool, bool)]) {
    let Some((context, _)) = device() else { return };
    for format in [QuantFormat::Q4K, QuantFormat::F16] {
        let checkpoint = model(format);
        for (fused, persistent) in ways {
            let plan = plan(&checkpoint, 24, *fused);
            steps_that_write_nothing(&context, &checkpoint, &plan, *persistent).unwrap();
        }
    }
    println!("trust | steps that write nothing, {ways:?} | cache and zones unchanged");
}

#[test]
fn steps_beyond_the_capacity_or_the_vocabulary_write_nothing() {
    out_of_range(&[(true, false), (false, false)]);
}

#[test]
fn such_steps_of_the_persistent_kernel_write_nothing() {
    out_of_range(&[(true, true)]);
}

fn a_thousand_sessions(persistent: bool) {
    let Some((context, _)) = device() else { return };
    let free = || context.memory().unwrap().0;
    let (model, options) = (model(QuantFormat::Q8_0), cuda(64, persistent));
    let (_, few) = build_and_destroy(&model, &options, 10, &free).unwrap();
    assert!(
        few < Duration::from_secs(5),
        "10 sessions take {few:?}: does the driver keep what it compiles (CUDA_CACHE_DISABLE, \
         CUDA_CACHE_PATH, ~/.nv/ComputeCache)?"
    );
    let (drift, time) = build_and_destroy(&model, &options, 1000, &free).unwrap();
    let (device, host) = (drift.device(), drift.host());
    println!(
        "trust | 1000 sessions, persistent {persistent} | drift {device} B of the device, \
         {host} B resident, {time:?}"
    );
    assert!(device <= DEVICE_DRIFT, "{device} bytes");
}

#[test]
fn a_thousand_sessions_leave_no_memory_behind() {
    a_thousand_sessions(false);
}

#[test]
fn a_thousand_sessions_of_the_persistent_kernel_leave_no_memory_behind() {
    a_thousand_sessions(true);
}

/// 61 fills of 4,200 positions: 256,200 tokens.
fn long_run(persistent: bool) {
    let Some((context, _)) = device() else { return };
    let free = || context.memory().unwrap().0;
    // Drawn, so that the tokens do not run in a circle.
    let drawn = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 7 };
    let sampling = (!persistent).then_some(drawn);
    let options = SessionOptions { sampling, red_zones: true, ..cuda(4200, persistent) };
    let soak = soak(&synthetic("tiny:q4_k_m"), &options, 61, &free).unwrap();
    let (device, host) = (soak.drift.device(), soak.drift.host());
    println!(
        "trust | soak, persistent {persistent} | {} tokens in 61 fills, {} distinct, hash {:016x} \
         each, drift {device} B of the device, {host} B resident, {:?}",
        soak.tokens, soak.distinct, soak.hash, soak.time
    );
    assert!(soak.tokens >= 250_000 && (persistent || soak.distinct > 100));
    assert!(device <= DEVICE_DRIFT && host <= HOST_DRIFT, "{device} and {host} bytes");
}

#[test]
fn a_quarter_of_a_million_tokens_leave_the_same_bits_each_fill_and_no_memory_behind() {
    long_run(false);
}

#[test]
fn a_quarter_of_a_million_tokens_of_the_persistent_kernel_do_too() {
    long_run(true);
}

fn a_hundred_runs(persistent: bool) {
    let Some(_device) = device() else { return };
    for (name, checkpoint) in
        [("tiny:q4_k_m", synthetic("tiny:q4_k_m")), ("q8_0", model(QuantFormat::Q8_0))]
    {
        let hash = one_hash(&checkpoint, &cuda(256, persistent), 100).unwrap();
        println!(
            "trust | 100 runs, graph and eager, persistent {persistent} | {name}: {hash:016x} each"
        );
    }
}

#[test]
fn a_hundred_runs_have_one_hash() {
    a_hundred_runs(false);
}

#[test]
fn a_hundred_runs_of_the_persistent_kernel_have_one_hash() {
    a_hundred_runs(true);
}

#[test]
fn memory_that_others_hold_is_told_and_used_when_they_give_it_back() {
    let Some((context, _)) = device() else { return };
    // Pages of the device are 2 MiB: the model is larger than what is left by far.
    let model = synthetic("smollm2-135m:q8_0");
    memory_held_elsewhere(&context, &model, &cuda(64, false), 64 << 20).unwrap();
    println!("trust | memory held elsewhere | refused by part, then used");
}

fn hash_of_runs() -> String {
    let hash = one_hash(&model(QuantFormat::Q8_0), &cuda(256, false), 100).unwrap();
    format!("computed {hash:016x}")
}

#[test]
#[ignore = "a process of two_processes_on_one_device_compute_what_one_does"]
fn prints_what_it_computes() {
    println!("{}", hash_of_runs());
}

#[test]
fn two_processes_on_one_device_compute_what_one_does() {
    let Some(_device) = device() else { return };
    let expected = hash_of_runs();
    let start = || {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "--ignored", "--nocapture", "prints_what_it_computes"]);
        child.stdout(Stdio::piped()).spawn().unwrap()
    };
    for child in [start(), start()] {
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains(&expected), "{expected}, not {said}");
    }
    println!("trust | two processes at a time | {expected} each");
}

// ------------------------------------------------------------------------------ twins of kernels

/// Logits after twelve given tokens.
fn after_given_tokens(
    checkpoint: &Checkpoint,
    kernels: KernelSource<'_>,
    (persistent, debug): (bool, DebugLevel),
) -> Vec<f32> {
    let mode = if debug == DebugLevel::Off { Mode::Graph } else { Mode::Eager };
    let options = CudaOptions { mode, debug, persistent, ..CudaOptions::default() };
    let plan = plan(checkpoint, 12, true);
    let mut engine =
        CudaEngine::with_kernels(checkpoint, &plan, options, kernels, &mut |_, _| {}).unwrap();
    engine.debug_to(Box::new(std::io::sink()));
    engine.seek(0).unwrap();
    let tokens: Vec<u32> = (0..12).map(|i| i * 37 % plan.vocab).collect();
    engine.force(0, &tokens).unwrap();
    assert_eq!(engine.run(12, &mut |_| ControlFlow::Continue(())).unwrap(), 12);
    engine.logits().unwrap()
}

/// Σ(a − b)² / Σb².
fn nmse(a: &[f32], b: &[f32]) -> f64 {
    let square = |v: f32| f64::from(v) * f64::from(v);
    let noise: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    noise / b.iter().map(|b| square(*b)).sum::<f64>()
}

#[test]
fn the_code_for_8_0_is_the_twin_of_the_code_for_9_0() {
    let Some((_context, compute)) = device() else { return };
    let (older, newest) = (|m: &str, _| kernels::ptx(m, (8, 0)), &kernels::ptx);
    let mut worst = (0.0, QuantFormat::F32);
    for format in QuantFormat::ALL {
        let checkpoint = model(format);
        // One by one: the code for 8.0 does not wait for its predecessor by itself.
        let way = (false, DebugLevel::Print);
        let [a, b] = [&older as KernelSource<'_>, newest]
            .map(|kernels| after_given_tokens(&checkpoint, kernels, way));
        let error = nmse(&a, &b);
        assert!(error <= 1e-9, "{format}: {error:e}");
        worst = if error >= worst.0 { (error, format) } else { worst };
    }
    println!("trust | twins, 8.0 and {compute:?} | NMSE of logits at most {worst:?}");
}

#[test]
fn the_persistent_kernel_is_the_twin_of_the_chain_of_kernels() {
    let Some(_device) = device() else { return };
    let mut worst = (0.0, QuantFormat::F32);
    for format in QuantFormat::ALL {
        let checkpoint = model(format);
        let [a, b] = [true, false].map(|persistent| {
            after_given_tokens(&checkpoint, &kernels::ptx, (persistent, DebugLevel::Off))
        });
        let error = nmse(&a, &b);
        worst = if error >= worst.0 { (error, format) } else { worst };
    }
    println!("trust | twins, persistent and chain | NMSE of logits at most {worst:?}");
    assert!(worst.0 <= 1e-7, "{worst:?}");
}

// ------------------------------------------------------------------------------ planted defects

/// Tokens and the bits of the last logits of 24 positions, replayed or synchronised after each step.
fn tokens_and_logits(kernels: KernelSource<'_>, debug: DebugLevel) -> Result<(Vec<u32>, Vec<u32>)> {
    let checkpoint = model(QuantFormat::Q8_0);
    let mode = if debug == DebugLevel::Off { Mode::Graph } else { Mode::Eager };
    let options = CudaOptions { mode, debug, persistent: false, ..CudaOptions::default() };
    let plan = plan(&checkpoint, 24, true);
    let mut engine =
        CudaEngine::with_kernels(&checkpoint, &plan, options, kernels, &mut |_, _| {})?;
    engine.give_up_after(Duration::from_secs(10));
    engine.debug_to(Box::new(std::io::sink()));
    engine.poison(0x7E)?;
    let tokens = fill(&mut engine, 24)?;
    let logits = engine.logits()?.into_iter().map(f32::to_bits).collect();
    Ok((tokens, logits))
}

/// Whether a replay differs from the same kernels one by one, each waited for.
fn replay_differs(kernels: KernelSource<'_>) -> bool {
    let one_by_one = tokens_and_logits(kernels, DebugLevel::Print).unwrap();
    (0..20).any(|_| tokens_and_logits(kernels, DebugLevel::Off).ok().as_ref() != Some(&one_by_one))
}

/// The op that the comparison of each step with the reference finds wrong first, in a model whose
/// rows are long enough that several warps of a block work on one.
fn first_wrong_step(kernels: KernelSource<'_>, fused: bool) -> Option<String> {
    let checkpoint = synthetic("smollm2-135m:q8_0");
    let (mode, debug, persistent) = (Mode::Eager, DebugLevel::Compare, false);
    let options = CudaOptions { mode, debug, persistent, ..CudaOptions::default() };
    let plan = plan(&checkpoint, 24, fused);
    let mut engine =
        CudaEngine::with_kernels(&checkpoint, &plan, options, kernels, &mut |_, _| {}).unwrap();
    engine.give_up_after(Duration::from_secs(10));
    engine.debug_to(Box::new(std::io::sink()));
    engine.seek(0).unwrap();
    engine.force(0, &[1, 2, 3]).unwrap();
    // A step that reports itself ends the run; what was compared before it counts.
    let _ = engine.run(4, &mut |_| ControlFlow::Continue(()));
    let wrong = |c: &&decode_graph::cuda::eager::Comparison| {
        let bound = if matches!(c.what.as_str(), "keys" | "values") { 1e-6 } else { 1e-7 };
        c.what != "token" && (c.nmse.is_nan() || c.nmse > bound)
    };
    engine.comparisons().iter().find(wrong).map(|c| c.op.to_owned())
}

/// What a run of the plain plan between red zones, to the end of the cache, finds written.
fn red_zone_changed(kernels: KernelSource<'_>) -> Option<String> {
    let checkpoint = model(QuantFormat::Q8_0);
    let plan = plan(&checkpoint, 24, false);
    let options = CudaOptions { red_zones: true, persistent: false, ..CudaOptions::default() };
    let mut engine =
        CudaEngine::with_kernels(&checkpoint, &plan, options, kernels, &mut |_, _| {}).unwrap();
    // What it computes is of no interest: the zones are looked at in any case.
    let _ = fill(&mut engine, 24);
    engine.check_red_zones().err().map(|e| e.to_string())
}

/// Squared error of the logits at a depth, relative to the reference; infinite if they are not finite.
fn error_at_depth(kernels: KernelSource<'_>) -> f64 {
    const DEPTH: u32 = 1500;
    let checkpoint = model(QuantFormat::F32);
    let plan = plan(&checkpoint, 1600, true);
    let options = CudaOptions { persistent: false, ..CudaOptions::default() };
    let mut engine =
        CudaEngine::with_kernels(&checkpoint, &plan, options, kernels, &mut |_, _| {}).unwrap();
    engine.seek(DEPTH).unwrap();
    engine.fill_cache(DEPTH, 7).unwrap();
    let mut memory = reference::load(&checkpoint, &plan, &mut |_, _| {}).unwrap();
    for layer in 0..plan.cache.layers {
        let (keys, values) = engine.cache(layer).unwrap();
        let (to_keys, to_values) = memory.cache_mut(layer);
        to_keys.copy_from_slice(&keys);
        to_values.copy_from_slice(&values);
    }
    (memory.state.token, memory.state.position) = (11, DEPTH);
    reference::interpret(&plan, &mut memory).unwrap();
    engine.poison(0x7E).unwrap();
    engine.force(DEPTH, &[11]).unwrap();
    if engine.run(1, &mut |_| ControlFlow::Continue(())).is_err() {
        return f64::INFINITY;
    }
    nmse(&engine.logits().unwrap(), memory.buf(plan.logits))
}

/// Shows that `check` is silent with the kernels as they are, and speaks up with the defect.
fn caught<T: std::fmt::Debug>(
    planted: Planted,
    check: impl Fn(KernelSource<'_>) -> T,
    speaks: impl Fn(&T) -> bool,
) {
    let Some((_context, compute)) = device() else { return };
    if planted.text(compute).1 == 0 {
        eprintln!("skipped: {planted:?} has no place in the code for {compute:?}");
        return;
    }
    let said = check(&kernels::ptx);
    assert!(!speaks(&said), "speaks up without a defect: {said:?}");
    let said = check(&planted.source(compute));
    assert!(speaks(&said), "{planted:?} is not caught: {said:?}");
    println!(
        "trust | planted {:?} in {} {} | {said:?}",
        planted.defect, planted.module, planted.entry
    );
}

#[test]
fn a_missing_wait_for_the_predecessor_is_caught_by_replay_against_eager() {
    caught(NO_WAIT, replay_differs, |differs| *differs);
}

#[test]
fn a_missing_barrier_in_a_product_is_caught_by_the_comparison_of_steps() {
    caught(NO_BARRIER, |k| first_wrong_step(k, true), |op| op.as_deref() == Some("down"));
}

#[test]
fn a_missing_barrier_in_a_norm_is_caught_by_the_comparison_of_steps() {
    caught(
        NO_BARRIER_IN_A_NORM,
        |k| first_wrong_step(k, false),
        |op| op.as_deref() == Some("rms_norm"),
    );
}

#[test]
fn a_store_behind_a_buffer_is_caught_by_its_red_zone() {
    let behind = |said: &Option<String>| said.as_deref().is_some_and(|s| s.contains("workspace"));
    caught(STORE_BEHIND_A_BUFFER, red_zone_changed, behind);
}

#[test]
fn a_store_behind_the_cache_is_caught_by_its_red_zone() {
    let behind = |said: &Option<String>| said.as_deref().is_some_and(|s| s.contains("KV cache"));
    caught(STORE_BEHIND_THE_CACHE, red_zone_changed, behind);
}

#[test]
fn a_grid_made_for_the_first_position_is_caught_at_depth() {
    caught(GRID_OF_THE_FIRST_POSITION, error_at_depth, |error| *error > 1e-7);
}

// ------------------------------------------------------------------- runs for compute-sanitizer

/// For each way a module with a test a format, that the tools run side by side.
macro_rules! few_tokens {
    (@way $way:ident: $($name:ident ($format:ident, $values:ident))*) => {
        mod $way {
            use super::*;
            $(
                #[test]
                #[ignore = "for compute-sanitizer: scripts/sanitize.sh"]
                fn $name() {
                    let Some(_device) = device() else { return };
                    few_tokens::$way((QuantFormat::$format, QuantFormat::$values));
                }
            )*
        }
    };
    (formats: $($one:ident $format:ident)* ; mixtures: $($two:ident ($a:ident, $b:ident))*) => {
        few_tokens!(@way chain: $($one ($format, $format))* $($two ($a, $b))*);
        few_tokens!(@way persistent: $($one ($format, $format))* $($two ($a, $b))*);
        few_tokens!(@way experts_and_norms: $($one ($format, $format))*);
        const FEW_TOKENS: &[(&str, format_models::Formats)] = &[
            $((stringify!($one), (QuantFormat::$format, QuantFormat::$format)),)*
            $((stringify!($two), (QuantFormat::$a, QuantFormat::$b)),)*
        ];
    };
}

few_tokens! {
    formats:
        f32 F32 f16 F16 bf16 Bf16
        q4_0 Q4_0 q4_1 Q4_1 q5_0 Q5_0 q5_1 Q5_1 q8_0 Q8_0
        q2_k Q2K q3_k Q3K q4_k Q4K q5_k Q5K q6_k Q6K
        iq4_nl Iq4Nl iq4_xs Iq4Xs mxfp4 Mxfp4;
    mixtures:
        q2_k_q3_k (Q2K, Q3K) q2_k_q4_k (Q2K, Q4K) q3_k_q4_k (Q3K, Q4K) q3_k_q5_k (Q3K, Q5K)
        q4_k_q6_k (Q4K, Q6K) q5_k_q6_k (Q5K, Q6K) q5_0_q8_0 (Q5_0, Q8_0)
        iq4_nl_q5_k (Iq4Nl, Q5K) iq4_xs_q5_k (Iq4Xs, Q5K)
}

/// What has nothing to do with the weights' format.
mod any_format {
    use super::*;

    #[test]
    #[ignore = "for compute-sanitizer: scripts/sanitize.sh"]
    fn at_depth() {
        let Some(_device) = device() else { return };
        few_tokens::at_depth(false);
    }

    #[test]
    #[ignore = "for compute-sanitizer: scripts/sanitize.sh"]
    fn at_depth_persistent() {
        let Some(_device) = device() else { return };
        few_tokens::at_depth(true);
    }

    #[test]
    #[ignore = "for compute-sanitizer: scripts/sanitize.sh"]
    fn drawn() {
        let Some(_device) = device() else { return };
        few_tokens::drawn();
    }
}

#[test]
fn compute_sanitizer_gets_every_format_and_every_mixture() {
    let named = |(a, b): format_models::Formats| match (a.suffix(), b.suffix()) {
        (a, b) if a == b => a.to_owned(),
        (a, b) => format!("{a}_{b}"),
    };
    let all: Vec<_> = format_models::formats().map(|f| (named(f), f)).collect();
    let listed: Vec<_> = FEW_TOKENS.iter().map(|(name, f)| ((*name).to_owned(), *f)).collect();
    assert_eq!(listed, all);
}
