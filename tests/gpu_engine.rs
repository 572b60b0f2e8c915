//! The engine on a real device: every op against the CPU reference, fused against plain, graph
//! against eager, capacity, and what a token costs the host.
//!
//! Each test prints `skipped: no CUDA device` and passes where none answers.

#![allow(clippy::unwrap_used)]

mod small_model;

use decode_graph::arch::{PlanOptions, record};
use decode_graph::checkpoint::{Checkpoint, SyntheticSpec};
use decode_graph::cuda::{CudaEngine, CudaOptions};
use decode_graph::error::{Error, Result};
use decode_graph::ops::{KvType, Sampling};
use decode_graph::plan::{DecodePlan, fuse};
use decode_graph::quant::QuantFormat;
use decode_graph::session::{
    BackendChoice, Chosen, DebugLevel, DecodeSession, Finish, Mode, SessionOptions,
};
use decode_graph::verify::first_departure;
use small_model::SmallModel;
use std::ops::ControlFlow;

const CAPACITY: u32 = 96;

/// Two layers of 256, so that every format has whole blocks; 4 heads of 64 over 2.
fn model(format: QuantFormat) -> Checkpoint {
    model_with_heads(format, 4)
}

/// The same with `heads` query heads over half as many.
fn model_with_heads(format: QuantFormat, heads: u32) -> Checkpoint {
    SmallModel::new("llama", format).widen(heads).open(tempfile::tempdir().unwrap().path())
}

fn plan(checkpoint: &Checkpoint, fused: bool) -> DecodePlan {
    let options = PlanOptions { capacity: CAPACITY, kv: KvType::F16 };
    let plain = record(checkpoint, options).unwrap();
    if fused { fuse::fuse(&plain) } else { plain }
}

/// Whether plans are issued as one kernel where they can be: in `gpu_persistent.rs`, which has the
/// same tests.
fn persistent() -> bool {
    module_path!().starts_with("gpu_persistent")
}

/// `None` where there is no device.
fn engine(
    checkpoint: &Checkpoint,
    plan: &DecodePlan,
    mode: Mode,
    debug: DebugLevel,
) -> Option<CudaEngine> {
    let options = CudaOptions { mode, debug, persistent: persistent(), ..CudaOptions::default() };
    match CudaEngine::new(checkpoint, plan, options, &mut |_, _| {}) {
        Ok(engine) => Some(engine),
        Err(Error::NoDevice(why)) => {
            eprintln!("skipped: no CUDA device ({why})");
            None
        }
        Err(other) => panic!("{other}"),
    }
}

fn tokens(engine: &mut CudaEngine, steps: u32) -> Result<Vec<Chosen>> {
    let mut all = Vec::new();
    engine.run(steps, &mut |c| {
        all.push(c);
        ControlFlow::Continue(())
    })?;
    Ok(all)
}

fn start(engine: &mut CudaEngine, inputs: &[u32]) {
    engine.seek(0).unwrap();
    engine.force(0, inputs).unwrap();
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn nmse(x: &[f32], reference: &[f32]) -> f64 {
    let square = |v: f32| f64::from(v) * f64::from(v);
    let noise: f64 = x.iter().zip(reference).map(|(x, r)| square(x - r)).sum();
    noise / reference.iter().map(|r| square(*r)).sum::<f64>()
}

#[test]
fn every_op_of_every_format_agrees_with_the_reference_plain_and_fused() {
    for format in QuantFormat::ALL {
        let checkpoint = model(format);
        for fused in [false, true] {
            let plan = plan(&checkpoint, fused);
            let Some(mut e) = engine(&checkpoint, &plan, Mode::Eager, DebugLevel::Compare) else {
                return;
            };
            start(&mut e, &[7, 3, 90, 11]);
            tokens(&mut e, 6).unwrap();
            assert!(e.comparisons().len() >= 6 * plan.steps.len(), "something of each step");
            for c in e.comparisons().iter().filter(|c| c.what != "token") {
                let bound = if matches!(c.what.as_str(), "keys" | "values") { 1e-6 } else { 1e-7 };
                assert!(c.nmse <= bound, "{format} fused {fused}: {c:?}");
            }
        }
    }
}

#[test]
fn fused_and_plain_plans_give_the_same_logits_within_rounding() {
    for format in QuantFormat::ALL {
        let checkpoint = model(format);
        let mut all = Vec::new();
        for fused in [false, true] {
            let plan = plan(&checkpoint, fused);
            let Some(mut e) = engine(&checkpoint, &plan, Mode::Graph, DebugLevel::Off) else {
                return;
            };
            let inputs: Vec<u32> = (0..16).map(|i| i * 5 % 96).collect();
            start(&mut e, &inputs);
            tokens(&mut e, 16).unwrap();
            all.push(e.logits().unwrap());
        }
        let error = nmse(&all[1], &all[0]);
        assert!(error < 1e-5, "{format}: {error:e}");
    }
}

#[test]
fn a_replayed_graph_is_eager_bit_for_bit_over_64_tokens_in_tokens_logits_and_cache() {
    for format in QuantFormat::ALL {
        let checkpoint = model(format);
        let plan = plan(&checkpoint, true);
        let mut seen = Vec::new();
        for mode in [Mode::Graph, Mode::Eager] {
            let Some(mut e) = engine(&checkpoint, &plan, mode, DebugLevel::Off) else { return };
            start(&mut e, &[1, 2, 3]);
            let chosen: Vec<_> =
                tokens(&mut e, 64).unwrap().iter().map(|c| (c.position, c.token)).collect();
            let logits = bits(&e.logits().unwrap());
            let caches: Vec<_> = (0..plan.cache.layers)
                .map(|l| e.cache(l).map(|(k, v)| (bits(&k), bits(&v))).unwrap())
                .collect();
            seen.push((chosen, logits, caches));
        }
        assert!(seen[0] == seen[1], "{format}");
    }
}

#[test]
fn a_model_with_every_matrix_in_another_format_agrees_and_replays_like_the_rest() {
    let mut small = SmallModel::new("llama", QuantFormat::F32);
    let matrices = small.tensors.iter_mut().filter(|t| t.shape.len() > 1);
    let formats = QuantFormat::ALL.into_iter().cycle();
    matrices.zip(formats).for_each(|(t, format)| t.format = format);
    let checkpoint = small.widen(4).open(tempfile::tempdir().unwrap().path());
    let plan = plan(&checkpoint, true);
    let mut seen = Vec::new();
    for (mode, debug) in [
        (Mode::Graph, DebugLevel::Off),
        (Mode::Eager, DebugLevel::Off),
        (Mode::Eager, DebugLevel::Compare),
    ] {
        let Some(mut e) = engine(&checkpoint, &plan, mode, debug) else { return };
        start(&mut e, &[1, 2, 3]);
        let chosen: Vec<_> = tokens(&mut e, 16).unwrap().iter().map(|c| c.token).collect();
        seen.push((chosen, bits(&e.logits().unwrap())));
        for c in e.comparisons().iter().filter(|c| c.what != "token") {
            let bound = if matches!(c.what.as_str(), "keys" | "values") { 1e-6 } else { 1e-7 };
            assert!(c.nmse <= bound, "{c:?}");
        }
    }
    assert!(seen[0] == seen[1] && seen[1] == seen[2]);
}

#[test]
fn a_poisoned_workspace_changes_nothing() {
    let checkpoint = model(QuantFormat::Q4K);
    for fused in [false, true] {
        let plan = plan(&checkpoint, fused);
        let Some(mut e) = engine(&checkpoint, &plan, Mode::Graph, DebugLevel::Off) else { return };
        let mut seen = Vec::new();
        for byte in [0xFF, 0x00, 0x7F] {
            e.poison(byte).unwrap();
            start(&mut e, &[5, 6, 7]);
            let tokens: Vec<_> = tokens(&mut e, 20).unwrap().iter().map(|c| c.token).collect();
            seen.push((tokens, bits(&e.logits().unwrap())));
        }
        assert!(seen[0] == seen[1] && seen[0] == seen[2], "fused {fused}");
    }
}

#[test]
fn one_capture_no_allocation_after_it_and_at_most_3_driver_calls_a_token() {
    let checkpoint = model(QuantFormat::Q8_0);
    let plan = plan(&checkpoint, true);
    let Some(mut e) = engine(&checkpoint, &plan, Mode::Graph, DebugLevel::Off) else { return };
    let census = e.census().unwrap();
    let nodes = if persistent() { 1 } else { plan.steps.len() };
    assert_eq!((census.nodes, census.edges), (nodes, nodes - 1));
    start(&mut e, &[1]);
    let before = e.stats();
    let steps = 90;
    tokens(&mut e, steps).unwrap();
    let after = e.stats();
    assert_eq!(after.captures, 1);
    assert_eq!(after.allocations_after_freeze, 0);
    let calls = after.driver_calls - before.driver_calls;
    assert!(calls <= 3 * u64::from(steps), "{calls} driver calls for {steps} tokens");
}

#[test]
fn after_a_stop_nothing_of_what_ran_ahead_is_left() {
    let checkpoint = model(QuantFormat::Q4_0);
    let plan = plan(&checkpoint, true);
    let Some(mut e) = engine(&checkpoint, &plan, Mode::Graph, DebugLevel::Off) else { return };
    start(&mut e, &[1, 2]);
    let whole: Vec<_> = tokens(&mut e, 40).unwrap().iter().map(|c| c.token).collect();
    start(&mut e, &[1, 2]);
    let straight = tokens(&mut e, 10).unwrap();
    let logits = bits(&e.logits().unwrap());
    start(&mut e, &[1, 2]);
    let mut pieces = Vec::new();
    while pieces.len() < 40 {
        let wanted = 40 - pieces.len() as u32;
        let mut left = 10;
        let kept = e.run(wanted, &mut |c| {
            pieces.push(c.token);
            left -= 1;
            if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!(kept.unwrap(), 10);
        if pieces.len() == 10 {
            assert_eq!(
                bits(&e.logits().unwrap()),
                logits,
                "logits are of the last step that counts"
            );
        }
    }
    assert_eq!(pieces, whole);
    assert_eq!(straight.len(), 10);
}

/// `None` where there is no device.
fn session(checkpoint: &Checkpoint, backend: BackendChoice) -> Option<DecodeSession> {
    session_of(checkpoint, backend, CAPACITY, KvType::F16)
}

fn session_of(
    checkpoint: &Checkpoint,
    backend: BackendChoice,
    capacity: u32,
    kv: KvType,
) -> Option<DecodeSession> {
    let options = SessionOptions {
        backend,
        capacity,
        kv: Some(kv),
        persistent: persistent(),
        ..SessionOptions::default()
    };
    match DecodeSession::new(checkpoint, &options, &mut |_, _| {}) {
        Ok(session) => Some(session),
        Err(Error::NoDevice(why)) => {
            eprintln!("skipped: no CUDA device ({why})");
            None
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn every_position_up_to_the_capacity_agrees_with_the_reference() {
    for format in [QuantFormat::F32, QuantFormat::Q4K, QuantFormat::Q8_0] {
        let checkpoint = model(format);
        let Some(mut gpu) = session(&checkpoint, BackendChoice::Cuda) else { return };
        let mut cpu = session(&checkpoint, BackendChoice::Cpu).unwrap();
        for position in 0..CAPACITY {
            let token = position * 37 % 96;
            gpu.feed(token).unwrap();
            cpu.feed(token).unwrap();
            let error = nmse(&gpu.logits().unwrap(), &cpu.logits().unwrap());
            assert!(error < 1e-4, "{format} position {position}: {error:e}");
        }
    }
}

#[test]
fn attention_agrees_with_the_reference_on_both_sides_of_every_way_to_split_the_context() {
    // Depths at which a block takes another chunk, a head another part, and the parts another way;
    // heads of 32, 64 and 128, groups of 2.
    const DEPTHS: [u32; 16] =
        [0, 1, 126, 127, 128, 254, 255, 256, 383, 511, 512, 1023, 1024, 2047, 2900, 2998];
    for (heads, kv) in
        [(8, KvType::F16), (4, KvType::F16), (2, KvType::F16), (4, KvType::F32), (2, KvType::F32)]
    {
        let checkpoint = model_with_heads(QuantFormat::F32, heads);
        let Some(mut gpu) = session_of(&checkpoint, BackendChoice::Cuda, 3000, kv) else { return };
        let mut cpu = session_of(&checkpoint, BackendChoice::Cpu, 3000, kv).unwrap();
        for depth in DEPTHS {
            for s in [&mut gpu, &mut cpu] {
                s.seek(depth, 7).unwrap();
                s.feed(11).unwrap();
                s.feed(12).unwrap();
            }
            let error = nmse(&gpu.logits().unwrap(), &cpu.logits().unwrap());
            assert!(error < 1e-7, "{heads} heads, {}, depth {depth}: {error:e}", kv.name());
        }
    }
}

#[test]
fn at_capacity_nothing_is_written_and_the_next_run_works() {
    let checkpoint = model(QuantFormat::Q5_1);
    let Some(mut s) = session(&checkpoint, BackendChoice::Cuda) else { return };
    let mut first = Vec::new();
    let mut keep = |c: Chosen| {
        first.push(c.token);
        ControlFlow::Continue(())
    };
    assert_eq!(s.decode(&[4, 5], CAPACITY + 10, &mut keep).unwrap(), Finish::Capacity);
    assert_eq!(first.len(), CAPACITY as usize);
    let cache = s.cache(1).unwrap();
    assert!(s.feed(3).is_err());
    assert_eq!(s.cache(1).unwrap(), cache);
    s.reset().unwrap();
    let mut again = Vec::new();
    let mut keep = |c: Chosen| {
        again.push(c.token);
        ControlFlow::Continue(())
    };
    assert_eq!(s.decode(&[4, 5], 30, &mut keep).unwrap(), Finish::Done);
    assert_eq!(again[..], first[..31]);

    // The device's own check, beneath the session's.
    let plan = plan(&checkpoint, true);
    let Some(mut e) = engine(&checkpoint, &plan, Mode::Graph, DebugLevel::Off) else { return };
    start(&mut e, &[4, 5]);
    assert_eq!(tokens(&mut e, CAPACITY + 20).unwrap().len(), CAPACITY as usize);
    start(&mut e, &[4, 5]);
    let tokens: Vec<_> = tokens(&mut e, 31).unwrap().iter().map(|c| c.token).collect();
    assert_eq!(tokens[..], first[..31]);
}

#[test]
fn a_token_outside_the_vocabulary_is_told_and_the_engine_goes_on() {
    let checkpoint = model(QuantFormat::Q6K);
    let plan = plan(&checkpoint, true);
    let Some(mut e) = engine(&checkpoint, &plan, Mode::Graph, DebugLevel::Off) else { return };
    start(&mut e, &[1, 9999]);
    let error = tokens(&mut e, 5).unwrap_err();
    assert!(matches!(error, Error::Decode { position: 1, .. }), "{error}");
    start(&mut e, &[1, 2]);
    assert_eq!(tokens(&mut e, 5).unwrap().len(), 5);
}

#[test]
fn seeded_caches_are_the_same_on_both_backends() {
    let checkpoint = model(QuantFormat::F16);
    let Some(mut gpu) = session(&checkpoint, BackendChoice::Cuda) else { return };
    let mut cpu = session(&checkpoint, BackendChoice::Cpu).unwrap();
    gpu.seek(50, 9).unwrap();
    cpu.seek(50, 9).unwrap();
    for layer in 0..2 {
        assert!(gpu.cache(layer).unwrap() == cpu.cache(layer).unwrap());
    }
}

#[test]
fn the_read_ceiling_is_of_the_order_of_a_gpus_memory() {
    let checkpoint = model(QuantFormat::F16);
    let plan = plan(&checkpoint, true);
    let Some(e) = engine(&checkpoint, &plan, Mode::Graph, DebugLevel::Off) else { return };
    let ceiling = e.measure_ceiling().unwrap();
    eprintln!("{ceiling:?}");
    assert!(ceiling.bytes_per_second > 1e11 && ceiling.bytes_per_second < 2e13);
}

#[test]
fn a_device_draws_what_the_reference_draws_from_the_same_logits() {
    let all = Sampling { temperature: 2.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 1 };
    let samplings = [
        all,
        Sampling { top_k: 3, seed: 2, ..all },
        Sampling { top_p: 0.9, seed: 3 << 40, ..all },
        Sampling { min_p: 0.3, seed: 4, ..all },
        Sampling { temperature: 0.7, top_k: 40, top_p: 0.95, min_p: 0.05, seed: 5 },
    ];
    for (spec, steps) in [("tiny:q8_0", 48), ("smollm2-135m:q4_0", 16)] {
        let checkpoint = Checkpoint::synthetic(&SyntheticSpec::parse(spec).unwrap()).unwrap();
        let options = PlanOptions { capacity: CAPACITY, kv: KvType::F16 };
        let greedy = record(&checkpoint, options).unwrap();
        for sampling in samplings {
            let plan = fuse::fuse(&greedy.clone().sampled(sampling));
            let Some(mut e) = engine(&checkpoint, &plan, Mode::Graph, DebugLevel::Off) else {
                return;
            };
            start(&mut e, &[1]);
            let mut drawn = Vec::new();
            for position in 0..steps {
                let chosen = tokens(&mut e, 1).unwrap()[0].token;
                let logits = e.logits().unwrap();
                assert_eq!(Some(chosen), sampling.choose(&logits, position), "{spec} {sampling:?}");
                drawn.push(chosen);
            }
            // Run ahead of the host, and launch by launch, it draws the same.
            let again = |e: &mut CudaEngine| -> Vec<u32> {
                start(e, &[1]);
                tokens(e, steps).unwrap().iter().map(|c| c.token).collect()
            };
            assert_eq!(again(&mut e), drawn, "{spec} {sampling:?}");
            let mut eager = engine(&checkpoint, &plan, Mode::Eager, DebugLevel::Off).unwrap();
            assert_eq!(again(&mut eager), drawn, "{spec} {sampling:?}");
        }
    }
}

#[test]
fn a_stamped_graph_computes_the_same_bits_and_its_clock_goes_on() {
    const STEPS: u32 = 64;
    let checkpoint = model(QuantFormat::Q4K);
    for fused in [true, false] {
        let plan = plan(&checkpoint, fused);
        if engine(&checkpoint, &plan, Mode::Graph, DebugLevel::Off).is_none() {
            return;
        }
        // Stamps stand between the kernels of a chain.
        let [mut plain, mut stamped] = [false, true].map(|trace| {
            let options = CudaOptions { trace, persistent: false, ..CudaOptions::default() };
            CudaEngine::new(&checkpoint, &plan, options, &mut |_, _| {}).unwrap()
        });
        let run = |engine: &mut CudaEngine| {
            start(engine, &[5]);
            let chosen: Vec<u32> = tokens(engine, STEPS).unwrap().iter().map(|c| c.token).collect();
            (chosen, bits(&engine.logits().unwrap()))
        };
        assert_eq!(run(&mut stamped), run(&mut plain));
        let census = stamped.census().unwrap();
        assert_eq!(census.nodes, 2 * plan.steps.len() + 1);
        assert!(stamped.captured().is_err(), "a stamped graph is not the plan itself");
        let captured = plain.captured().unwrap().unwrap();
        assert_eq!(captured.nodes.len(), plan.steps.len());

        let stamps = stamped.stamps(STEPS).unwrap();
        assert_eq!(stamps.len(), STEPS as usize * (plan.steps.len() + 1));
        assert!(stamps.windows(2).all(|w| w[0] <= w[1]), "the clock goes back");
        let ns = (stamps[stamps.len() - 1] - stamps[0]) / u64::from(STEPS);
        assert!((1_000..10_000_000).contains(&ns), "{ns} ns a token");
    }
}

#[test]
fn no_step_departs_from_the_reference() {
    for format in [QuantFormat::Q4K, QuantFormat::Q8_0] {
        let checkpoint = model(format);
        let session = |backend| {
            let (capacity, kv, persistent) = (CAPACITY, Some(KvType::F16), persistent());
            let options =
                SessionOptions { backend, capacity, kv, persistent, ..SessionOptions::default() };
            DecodeSession::new(&checkpoint, &options, &mut |_, _| {})
        };
        let mut device = match session(BackendChoice::Cuda) {
            Err(Error::NoDevice(_)) => return,
            made => made.unwrap(),
        };
        let mut host = session(BackendChoice::Cpu).unwrap();
        let found = first_departure(&mut device, &mut host, &[5, 9, 2, 7, 11, 3], 1e-4).unwrap();
        assert_eq!(found, None);
    }
}

#[test]
fn what_a_token_costs_beside_its_kernels_is_measured_and_changes_no_result() {
    const TOKENS: u32 = 48;
    let checkpoint = model(QuantFormat::Q4K);
    let session = || session_of(&checkpoint, BackendChoice::Cuda, CAPACITY, KvType::F16);
    let (Some(mut measured), Some(mut other)) = (session(), session()) else { return };
    let overhead = measured.overhead(3, TOKENS).unwrap().unwrap();
    let relaunch = overhead.relaunch_us.unwrap();
    println!("host {:.2} us a token, {relaunch:.2} us between two", overhead.host_us);
    // Wide bounds, of another order than a wait or a clock of another unit would give.
    assert!((0.1..1000.0).contains(&overhead.host_us), "{overhead:?}");
    assert!((0.1..100.0).contains(&relaunch), "{overhead:?}");
    let run = |session: &mut DecodeSession| {
        let mut all = Vec::new();
        session
            .decode(&[3], TOKENS, &mut |c| {
                all.push(c.token);
                ControlFlow::Continue(())
            })
            .unwrap();
        (all, bits(&session.logits().unwrap()))
    };
    assert!(run(&mut measured) == run(&mut other), "another result after measuring");
    // What is taken is not looked at: a model so small finds room in pages that the driver already holds.
    let memory = other.stats().memory.unwrap();
    assert!(memory.weights > 0 && memory.kv > 0 && memory.workspace > 0, "{memory:?}");
}
