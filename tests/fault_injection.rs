//! Sessions over a fake driver: without a fault they compute what the CPU reference computes; with
//! any call failing in any way they say which call it was, wait for nothing, leave no stream
//! capturing and no memory behind, and the next session works where a real driver would let it.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod fake_driver;
mod format_models;
mod golden_models;
mod small_model;

use decode_graph::arch::{PlanOptions, record};
use decode_graph::checkpoint::Checkpoint;
use decode_graph::cuda::driver::{Class, Device, classify};
use decode_graph::cuda::{CudaEngine, CudaOptions};
use decode_graph::error::{Defect, Error, Result};
use decode_graph::ops::{KvType, Sampling};
use decode_graph::quant::QuantFormat;
use decode_graph::session::{BackendChoice, DebugLevel, DecodeSession, Mode, SessionOptions};
use fake_driver::{Fake, Fault, Live};
use small_model::SmallModel;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// What a session computed.
#[derive(Clone, Debug, PartialEq)]
struct Seen {
    tokens: Vec<u32>,
    logits: Vec<u32>,
    keys: Vec<u32>,
    values: Vec<u32>,
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn options(backend: BackendChoice, mode: Mode, debug: DebugLevel) -> SessionOptions {
    let (capacity, kv, persistent) = (24, Some(KvType::F16), false);
    SessionOptions { backend, mode, debug, capacity, kv, persistent, ..SessionOptions::default() }
}

/// A whole life: made, a prompt decoded, sought to a depth, decoded on, looked into, dropped.
fn life(checkpoint: &Checkpoint, options: &SessionOptions) -> Result<Seen> {
    let mut session = DecodeSession::new(checkpoint, options, &mut |_, _| {})?;
    session.debug_to(Box::new(std::io::sink()));
    let mut tokens = Vec::new();
    let mut sink = |c: decode_graph::session::Chosen| {
        tokens.push(c.token);
        ControlFlow::Continue(())
    };
    session.decode(&[5, 9, 2], 3, &mut sink)?;
    session.seek(7, 3)?;
    session.decode(&[1], 4, &mut sink)?;
    let logits = bits(&session.logits()?);
    let (keys, values) = session.cache(1)?;
    session.stamps(2)?;
    session.outputs(1, 1)?;
    session.overhead(1, 2)?;
    Ok(Seen { tokens, logits, keys: bits(&keys), values: bits(&values) })
}

fn small() -> Checkpoint {
    SmallModel::new("llama", QuantFormat::Q8_0).open(tempfile::tempdir().unwrap().path())
}

/// The ways to give a device its work.
const WAYS: [(Mode, DebugLevel); 3] = [
    (Mode::Graph, DebugLevel::Off),
    (Mode::Eager, DebugLevel::Off),
    (Mode::Eager, DebugLevel::Compare),
];

fn on_device((mode, debug): (Mode, DebugLevel)) -> SessionOptions {
    options(BackendChoice::Cuda, mode, debug)
}

/// Calls whose failure changes no result: what a drop gives back, and answers that are only told.
const MAY_FAIL: [&str; 15] = [
    "cuDevicePrimaryCtxRelease_v2",
    "cuMemFree_v2",
    "cuMemFreeHost",
    "cuStreamDestroy_v2",
    "cuEventDestroy_v2",
    "cuModuleUnload",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    // In a drop; elsewhere it is told.
    "cuStreamSynchronize",
    // Clocks and bus, which a report leaves out.
    "cuDeviceGetAttribute",
    // Names and parameters of captured nodes, which older drivers do not tell.
    "cuGraphKernelNodeGetParams_v2",
    "cuFuncGetName",
    "cuGetErrorName",
    "cuGetErrorString",
    // cust makes its context current without a look at the result; ours comes after.
    "cuCtxSetCurrent",
];

/// Calls that `cust` makes after ours: it reads the code into an enum, which has no unknown ones.
fn reads_into_an_enum(call: &str) -> bool {
    ["cuInit", "cuDeviceGet", "cuDeviceTotal", "cuDevicePrimary", "cuCtxSet"]
        .iter()
        .any(|prefix| call.starts_with(prefix))
}

/// Checks what is promised of a session in which `call` returned `code`.
fn judge(
    fake: &Fake,
    row: &str,
    fault: Fault,
    call: &str,
    code: u32,
    outcome: Result<Seen>,
    expected: &Seen,
) {
    let fatal = classify(code) == Class::Fatal;
    match outcome {
        Ok(seen) => {
            assert!(MAY_FAIL.contains(&call), "{row}: not told");
            assert!(seen == *expected, "{row}: another result");
        }
        Err(error) => {
            let said = error.to_string();
            match &error {
                Error::NoDevice(why) => {
                    assert!(code == 100 || call == "cuInit", "{row}: {said}");
                    assert!(!why.is_empty(), "{row}");
                }
                Error::OutOfMemory { what, .. } => {
                    assert!(code == 2 && !what.is_empty(), "{row}: {said}");
                }
                Error::Driver { call: told, code: c, fatal: f, at, .. } => {
                    // A drop looks at no result: what a lost context says next is told.
                    let named = *told == call || fatal && MAY_FAIL.contains(&call);
                    // cust knows no code that is newer than it, and says 999 for it. It asks after us.
                    let first = matches!(fault, Fault::Nth { nth: 0, .. });
                    let blurred = !first && *c == 999 && reads_into_an_enum(call);
                    assert!(code != 2, "{row}: memory that runs out is not told as such: {said}");
                    assert!(named && (*c == code || blurred), "{row}: {said}");
                    assert!(*f == fatal || blurred, "{row}: {said}");
                    assert!(!at.is_empty(), "{row}: {said}");
                }
                _ => panic!("{row}: another kind of error: {said}"),
            }
        }
    }
    assert!(!fake.is_capturing(), "{row}: a stream is left capturing");
    assert_eq!(fake.endless_waits(), 0, "{row}: waits for what does not come");
}

/// One session with a fault, and one after it.
fn inject(
    fake: &Fake,
    checkpoint: &Checkpoint,
    options: &SessionOptions,
    fault: Fault,
    (call, code, after): (&str, u32, bool),
    expected: &Seen,
) {
    let row = format!("{:?} {:?}, {fault:?} ({call})", options.mode, options.debug);
    fake.restart();
    fake.inject(fault);
    let outcome = catch_unwind(AssertUnwindSafe(|| life(checkpoint, options)));
    let outcome = outcome.unwrap_or_else(|_| panic!("{row}: a panic"));
    let call = match fault {
        // Modules are loaded in any order: what was hit is known afterwards.
        Fault::At { index, .. } => fake.take_log()[index],
        _ => call,
    };
    let row = format!("{row}, hit {call}");
    judge(fake, &row, fault, call, code, outcome, expected);
    if !after {
        return;
    }
    fake.calm();
    let again = life(checkpoint, options);
    if classify(code) == Class::Fatal {
        // A real driver gives the same code for the rest of the process.
        assert!(again.is_err(), "{row}: a session in a lost context");
        fake.restart();
        assert!(life(checkpoint, options).unwrap() == *expected, "{row}: a new process");
        return;
    }
    // What a failed free leaves behind is the driver's.
    if !MAY_FAIL.contains(&call) {
        assert_eq!(fake.live(), Live::default(), "{row}: something is left");
    }
    assert!(again.unwrap() == *expected, "{row}: the session after it");
}

fn calls_of(fake: &Fake, checkpoint: &Checkpoint, options: &SessionOptions) -> Vec<&'static str> {
    fake.restart();
    life(checkpoint, options).unwrap();
    fake.take_log()
}

/// First and last call of each entry point, and how many.
fn by_name(log: &[&'static str]) -> BTreeMap<&'static str, usize> {
    log.iter().fold(BTreeMap::new(), |mut all, call| {
        *all.entry(*call).or_default() += 1;
        all
    })
}

#[test]
fn a_session_over_the_fake_driver_computes_what_the_reference_computes_and_leaves_nothing() {
    let fake = Fake::new();
    for (arch, format) in [
        ("llama", QuantFormat::F32),
        ("llama", QuantFormat::Q8_0),
        ("llama", QuantFormat::Q4_0),
        ("qwen2", QuantFormat::Q5_1),
        ("qwen2", QuantFormat::F16),
    ] {
        let checkpoint = SmallModel::new(arch, format).open(tempfile::tempdir().unwrap().path());
        let cpu = options(BackendChoice::Cpu, Mode::Graph, DebugLevel::Off);
        for fused in [true, false] {
            let expected = life(&checkpoint, &SessionOptions { fused, ..cpu.clone() }).unwrap();
            for (mode, debug) in [
                (Mode::Graph, DebugLevel::Off),
                (Mode::Eager, DebugLevel::Off),
                (Mode::Eager, DebugLevel::Compare),
            ] {
                let cuda = options(BackendChoice::Cuda, mode, debug);
                let found = life(&checkpoint, &SessionOptions { fused, ..cuda }).unwrap();
                assert!(found == expected, "{arch} {format} {mode:?} {debug:?} fused {fused}");
                assert_eq!(fake.live(), Live::default());
            }
        }
    }
}

#[test]
fn a_session_over_the_fake_driver_draws_what_the_reference_draws() {
    let fake = Fake::new();
    let checkpoint = small();
    let hot = Sampling { temperature: 0.7, top_k: 40, top_p: 0.95, min_p: 0.05, seed: 7 };
    let mut seen = Vec::new();
    for seed in [7, 1 << 40] {
        let sampling = Some(Sampling { seed, ..hot });
        let on = |options| life(&checkpoint, &SessionOptions { sampling, ..options }).unwrap();
        let expected = on(options(BackendChoice::Cpu, Mode::Graph, DebugLevel::Off));
        for way in WAYS {
            assert!(on(on_device(way)) == expected, "{way:?}, seed {seed}");
        }
        seen.push(expected.tokens);
    }
    assert_ne!(seen[0], seen[1], "seeds that differ in their high half");
    assert_eq!(fake.live(), Live::default());
}

/// The bits of the logits after every one of `ids`.
fn logits(checkpoint: &Checkpoint, ids: &[u32], options: &SessionOptions) -> Vec<Vec<u32>> {
    let mut session = DecodeSession::new(checkpoint, options, &mut |_, _| {}).unwrap();
    let mut after = |token: &u32| {
        session.feed(*token).unwrap();
        bits(&session.logits().unwrap())
    };
    ids.iter().map(&mut after).collect()
}

#[test]
fn every_architecture_over_the_fake_driver_is_the_reference_in_every_bit_graph_and_eager() {
    let fake = Fake::new();
    for (name, golden, checkpoint) in golden_models::all() {
        let (ids, capacity) = (&golden.forced.ids, golden.capacity() as u32);
        for (fused, kv) in [(true, KvType::F16), (false, KvType::F16), (true, KvType::F32)] {
            let options = SessionOptions {
                capacity,
                fused,
                kv: Some(kv),
                persistent: false,
                ..SessionOptions::default()
            };
            let on = |backend, mode| {
                logits(&checkpoint, ids, &SessionOptions { backend, mode, ..options.clone() })
            };
            let expected = on(BackendChoice::Cpu, Mode::Graph);
            for mode in [Mode::Graph, Mode::Eager] {
                let found = on(BackendChoice::Cuda, mode);
                assert!(found == expected, "{name} {mode:?} fused {fused} {}", kv.name());
                assert_eq!(fake.live(), Live::default());
            }
        }
    }
}

#[test]
fn every_format_and_mixture_in_every_kernel_over_the_fake_driver_is_the_reference() {
    let _fake = Fake::new();
    for (arch, formats, checkpoint) in format_models::all() {
        let on = |backend| {
            let options = options(backend, Mode::Graph, DebugLevel::Off);
            logits(&checkpoint, &[5, 9, 2], &options)
        };
        assert!(on(BackendChoice::Cuda) == on(BackendChoice::Cpu), "{arch} {formats}");
    }
}

#[test]
fn every_single_call_may_fail_and_is_named() {
    let fake = Fake::new();
    let checkpoint = small();
    let expected = life(&checkpoint, &on_device(WAYS[0])).unwrap();
    let (mut rows, mut refused) = (0, 0);
    let stamped = SessionOptions { trace: true, ..on_device(WAYS[0]) };
    for options in WAYS.map(on_device).into_iter().chain([stamped]) {
        let log = calls_of(&fake, &checkpoint, &options);
        // All calls of a graph's life; of the others, those that it does not make.
        let known = if options == on_device(WAYS[0]) { 0 } else { 3 };
        let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
        for (index, call) in log.into_iter().enumerate() {
            let n = seen.entry(call).or_default();
            *n += 1;
            if known > 0 && *n > known {
                continue;
            }
            // Memory that runs out at any allocation, of the device and of the host.
            let allocates = call.contains("Alloc");
            refused += usize::from(allocates);
            let codes = [(1, true), (719, index % 8 == 0), (2, true)];
            for (code, after) in &codes[..if allocates { 3 } else { 2 }] {
                let fault = Fault::At { index, code: *code };
                inject(&fake, &checkpoint, &options, fault, (call, *code, *after), &expected);
                rows += 1;
            }
        }
    }
    println!("{rows} sessions with a failing call, {refused} of them without memory");
    assert!(rows > 500 && refused > 20, "only {rows}, {refused}");
}

#[test]
fn every_entry_point_may_return_every_code() {
    const RECOVERABLE: [u32; 14] =
        [2, 34, 100, 101, 201, 209, 218, 221, 222, 302, 400, 500, 801, 807];
    const CAPTURE: [u32; 9] = [900, 901, 902, 903, 904, 905, 906, 907, 908];
    const FATAL: [u32; 16] =
        [46, 214, 220, 700, 701, 702, 710, 714, 715, 716, 717, 718, 719, 810, 999, 12_345];
    let fake = Fake::new();
    let checkpoint = small();
    let options = on_device(WAYS[0]);
    let expected = life(&checkpoint, &options).unwrap();
    let names = by_name(&calls_of(&fake, &checkpoint, &options));
    assert!(names.len() >= 35, "{names:?}");
    let mut rows = 0;
    for (call, count) in names {
        for code in RECOVERABLE.into_iter().chain(CAPTURE).chain(FATAL) {
            // Such a call would be undefined behaviour in the test itself.
            if reads_into_an_enum(call) && [46, 221, 222, 810, 807, 12_345].contains(&code) {
                continue;
            }
            let last = count - 1;
            let both = last > 0 && [2, 100, 901, 999].contains(&code);
            for nth in if both { vec![0, last] } else { vec![0] } {
                let fault = Fault::Nth { call, nth, code };
                let after = [2, 901, 999].contains(&code);
                inject(&fake, &checkpoint, &options, fault, (call, code, after), &expected);
                rows += 1;
            }
        }
    }
    println!("{rows} sessions");
}

#[test]
fn a_fault_of_a_running_kernel_is_told_at_its_token_and_ends_every_later_call_at_once() {
    let fake = Fake::new();
    let checkpoint = small();
    for way in &WAYS[..2] {
        let steps = if way.0 == Mode::Graph { 1 } else { 11 };
        for code in [700, 710, 714, 715, 716, 717, 718, 719, 214, 999, 12_345] {
            fake.restart();
            let mut session =
                DecodeSession::new(&checkpoint, &on_device(*way), &mut |_, _| {}).unwrap();
            fake.inject(Fault::Later { nth: 2 * steps, code });
            let mut tokens = 0;
            let error = session
                .decode(&[5], 9, &mut |_| {
                    tokens += 1;
                    ControlFlow::Continue(())
                })
                .unwrap_err();
            assert!(
                matches!(error, Error::Driver { code: c, fatal: true, .. } if c == code),
                "{error}"
            );
            assert!(tokens <= 2, "{tokens} tokens after a fault in the third");
            let start = Instant::now();
            let later = session.feed(1).unwrap_err().to_string();
            assert!(later.contains("lost before"), "{later}");
            assert!(session.logits().is_err());
            let _ = session.reset();
            assert!(session.feed(1).is_err());
            drop(session);
            assert!(start.elapsed() < Duration::from_millis(100), "{:?}", start.elapsed());
        }
    }
}

#[test]
fn a_device_that_never_ends_is_given_up_and_nothing_waits_for_it() {
    let fake = Fake::new();
    let checkpoint = small();
    let plan = record(&checkpoint, PlanOptions { capacity: 24, kv: KvType::F16 }).unwrap();
    for mode in [Mode::Graph, Mode::Eager] {
        fake.restart();
        let options = CudaOptions { mode, persistent: false, ..CudaOptions::default() };
        let mut engine = CudaEngine::new(&checkpoint, &plan, options, &mut |_, _| {}).unwrap();
        engine.give_up_after(Duration::from_millis(150));
        engine.seek(0).unwrap();
        engine.force(0, &[5]).unwrap();
        let each = if mode == Mode::Graph { 1 } else { plan.steps.len() };
        fake.inject(Fault::Hang { nth: 3 * each });
        let (start, mut tokens) = (Instant::now(), 0);
        let error = engine
            .run(9, &mut |_| {
                tokens += 1;
                ControlFlow::Continue(())
            })
            .unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
        assert_eq!(tokens, 3, "what came before is kept");
        let said = error.to_string();
        assert!(said.contains("position 3: no token within 0.15 seconds"), "{said}");
        assert_eq!(error.exit_code(), 7);
        assert!(engine.logits().is_err());
        drop(engine);
        assert_eq!(fake.endless_waits(), 0, "a drop waits");
    }
}

#[test]
fn memory_that_does_not_suffice_is_told_by_part_before_anything_is_allocated() {
    let fake = Fake::new();
    let checkpoint = small();
    fake.set_memory(64 << 20);
    let error = life(&checkpoint, &on_device(WAYS[0])).unwrap_err();
    assert_eq!(error.exit_code(), 6);
    assert!(error.to_string().contains("KV cache"), "{error}");
    assert!(!fake.take_log().contains(&"cuMemAlloc_v2"));
    assert_eq!(fake.live(), Live::default());
}

#[test]
fn a_file_that_is_cut_or_rewritten_while_it_is_uploaded_is_an_error_and_leaves_nothing() {
    let fake = Fake::new();
    let folder = tempfile::tempdir().unwrap();
    let model = SmallModel::new("llama", QuantFormat::Q8_0);
    let end = model.bytes().len() as u64 - 100;
    for cut in [true, false] {
        let checkpoint = model.open(folder.path());
        let file = std::fs::OpenOptions::new().write(true).open(checkpoint.path()).unwrap();
        let mut change = |uploaded: u64, _: u64| match (uploaded, cut) {
            (0, true) => file.set_len(end).unwrap(),
            (0, false) => {
                file.set_modified(std::time::SystemTime::now() + Duration::from_secs(5)).unwrap();
            }
            _ => {}
        };
        let session = DecodeSession::new(&checkpoint, &on_device(WAYS[0]), &mut change);
        match session.map(drop).unwrap_err() {
            Error::InvalidModel { at, offset: Some(offset), defect: Defect::Truncated, .. }
                if cut =>
            {
                assert!(at.starts_with("tensor ") && offset == end, "{at} at {offset}");
            }
            error => assert!(!cut && error.to_string().contains("rewritten"), "{error}"),
        }
        assert!(fake.take_log().contains(&"cuMemAlloc_v2"), "it was about to be uploaded");
        assert_eq!((fake.live(), fake.is_capturing()), (Live::default(), false));
    }
    assert!(life(&model.open(folder.path()), &on_device(WAYS[0])).is_ok());
}

#[test]
fn a_machine_without_a_usable_device_is_told_as_such() {
    let fake = Fake::new();
    let checkpoint = small();
    fake.set_devices(0);
    assert_eq!(life(&checkpoint, &on_device(WAYS[0])).unwrap_err().exit_code(), 5);
    fake.restart();
    fake.set_compute((6, 1));
    let error = life(&checkpoint, &on_device(WAYS[0])).unwrap_err();
    assert_eq!(error.exit_code(), 4);
    assert!(error.to_string().contains("compute capability 6.1"), "{error}");
    assert_eq!(fake.live(), Live::default());
    fake.restart();
    let wrong = SessionOptions { device: 1, ..on_device(WAYS[0]) };
    let error = life(&checkpoint, &wrong).unwrap_err().to_string();
    assert!(error.contains("device 1 was asked for"), "{error}");
}

#[test]
fn the_captured_graph_is_the_plan_and_the_read_ceiling_gives_everything_back() {
    let fake = Fake::new();
    let checkpoint = small();
    let plan = record(&checkpoint, PlanOptions { capacity: 24, kv: KvType::F32 }).unwrap();
    let options = CudaOptions { persistent: false, ..CudaOptions::default() };
    let engine = CudaEngine::new(&checkpoint, &plan, options, &mut |_, _| {}).unwrap();
    let census = engine.census().unwrap();
    let steps = plan.steps.len();
    assert_eq!((census.nodes, census.named, census.edges), (steps, steps, steps - 1));
    assert!(census.programmatic.is_some_and(|n| n > steps / 2), "{census:?}");
    let dot = tempfile::tempdir().unwrap();
    engine.graph().unwrap().write_dot(&dot.path().join("graph.dot")).unwrap();
    drop(engine);
    fake.set_memory(300 << 20);
    let kernels = decode_graph::cuda::kernels::ptx;
    let ceiling = decode_graph::cuda::ceiling::measure(Device::get(0).unwrap(), &kernels).unwrap();
    assert!(ceiling.bytes_per_second > 0.0 && ceiling.buffer_bytes == 75 << 20, "{ceiling:?}");
    fake.inject(Fault::Later { nth: fake.launches() + 3, code: 700 });
    let error = decode_graph::cuda::ceiling::measure(Device::get(0).unwrap(), &kernels);
    assert_eq!(error.unwrap_err().exit_code(), 7);
    fake.restart();
    assert_eq!(fake.live(), Live::default());
}

#[test]
fn two_hundred_sessions_leave_nothing_behind() {
    let fake = Fake::new();
    let checkpoint = small();
    let options = on_device(WAYS[0]);
    for _ in 0..200 {
        let mut session = DecodeSession::new(&checkpoint, &options, &mut |_, _| {}).unwrap();
        session.feed(3).unwrap();
        fake.take_log();
        assert_eq!(session.stats().captures, 1);
        assert_eq!(session.stats().allocations_after_freeze, 0);
    }
    assert_eq!(fake.live(), Live::default());
}
