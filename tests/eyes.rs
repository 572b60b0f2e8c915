//! What looks into a graph tells the truth about it: the driver's graph beside the plan, and the clock
//! between its steps. On the fake driver, whose every kernel takes a microsecond.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod fake_driver;
mod small_model;

use decode_graph::arch::{PlanOptions, record};
use decode_graph::bench::profile::Profile;
use decode_graph::checkpoint::Checkpoint;
use decode_graph::cuda::{CudaEngine, CudaOptions};
use decode_graph::error::Result;
use decode_graph::ops::{Gpu, KvType};
use decode_graph::plan::{DecodePlan, fuse};
use decode_graph::quant::QuantFormat;
use decode_graph::session::{BackendChoice, DecodeSession, Mode, SessionOptions};
use decode_graph::verify::{Departure, first_departure};
use fake_driver::{Fake, Plant};
use small_model::{Key, SmallModel};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

fn model() -> Checkpoint {
    let mut m = SmallModel::new("llama", QuantFormat::Q8_0);
    // No multiple of a tile's 16 rows.
    m.change("token_embd.weight", |t| t.shape[1] = 90);
    m.set("llama.vocab_size", Key::U32(90));
    m.open(tempfile::tempdir().unwrap().path())
}

fn plan(model: &Checkpoint) -> DecodePlan {
    fuse::fuse(&record(model, PlanOptions { capacity: 64, kv: KvType::F16 }).unwrap())
}

fn engine(model: &Checkpoint) -> Result<CudaEngine> {
    let options = CudaOptions { persistent: false, ..CudaOptions::default() };
    CudaEngine::new(model, &plan(model), options, &mut |_, _| {})
}

fn session(model: &Checkpoint, trace: bool) -> DecodeSession {
    let options = SessionOptions {
        backend: BackendChoice::Cuda,
        capacity: 64,
        trace,
        persistent: false,
        ..SessionOptions::default()
    };
    DecodeSession::new(model, &options, &mut |_, _| {}).unwrap()
}

#[test]
fn the_drivers_graph_is_listed_node_by_node_beside_the_plan() {
    let _fake = Fake::new();
    let model = model();
    let plan = plan(&model);
    let captured = engine(&model).unwrap().captured().unwrap().unwrap();
    assert_eq!(captured.nodes.len(), plan.steps.len());
    for (node, step) in captured.nodes.iter().zip(&plan.steps) {
        let launch = step.op.describe().launch(&Gpu::H200);
        assert_eq!(node.label, step.label);
        assert_eq!(node.kernel.as_ref(), Some(&launch.kernel));
        assert_eq!((node.block[0], node.shared_bytes), (launch.block, launch.shared_bytes));
    }
    assert_eq!(captured.nodes[0].programmatic, None);
    assert!(captured.nodes[1..].iter().all(|n| n.programmatic == Some(true)));
    let text = captured.to_string();
    assert_eq!(text.lines().count(), plan.steps.len() + 2);
    let n = plan.steps.len();
    let last = format!(
        "# the plan, as the driver holds it: {n} nodes in order, {n} of them named, {} edges, {} \
         programmatic",
        n - 1,
        n - 1
    );
    assert_eq!(text.lines().last(), Some(last.as_str()));
}

#[test]
fn a_graph_that_is_not_the_plan_ends_with_8_and_names_the_first_step_that_differs() {
    let model = model();
    for (plant, says) in [
        (Plant::DroppedNode, "11 nodes for 12 steps; L01.qkv: kernel attention_f16"),
        (
            Plant::OtherStream,
            "11 nodes for 12 steps; L00.o_proj: kernel gate_up_q8_0, planned o_proj_q8_0",
        ),
        (Plant::SwappedNodes, "L00.qkv: kernel attention_f16, planned qkv_q8_0"),
    ] {
        let fake = Fake::new();
        fake.plant(Some(plant));
        let error = engine(&model).err().unwrap();
        assert_eq!(error.exit_code(), 8, "{plant:?}: {error}");
        let text = error.to_string();
        assert!(text.contains(says), "{plant:?}: {text}");
    }
}

#[test]
fn a_stamped_graph_chooses_the_same_tokens_and_tells_when_each_step_ended() {
    let _fake = Fake::new();
    let model = model();
    let run = |trace| {
        let (mut session, mut tokens) = (session(&model, trace), Vec::new());
        session
            .decode(&[5, 9], 40, &mut |c| {
                tokens.push(c.token);
                ControlFlow::Continue(())
            })
            .unwrap();
        (tokens, session.stamps(3).unwrap(), session.plan().steps.len())
    };
    let (plain, none, _) = run(false);
    assert!(none.is_empty());
    let (stamped, stamps, steps) = run(true);
    assert_eq!(stamped, plain);
    assert_eq!(stamps.len(), 3 * (steps + 1), "a token more than the ring of rows holds none");
    // Between two stamps stand a step and the second stamp; between tokens the stamp alone.
    for (i, pair) in stamps.windows(2).enumerate() {
        let next_token = (i + 1) % (steps + 1) == 0;
        assert_eq!(pair[1] - pair[0], if next_token { 1000 } else { 2000 }, "stamp {i}");
    }
}

#[test]
fn a_profile_takes_the_stamps_off_and_sums_up_to_the_plain_replay() {
    let _fake = Fake::new();
    let model = model();
    let mut session = session(&model, true);
    let mut profile = Profile::take(&mut session, 1, 4, 20).unwrap();
    let steps = session.plan().steps.len() as f64;
    assert!((profile.token_us - (2.0 * steps + 1.0)).abs() < 1e-9, "{}", profile.token_us);
    // On this driver a step is a microsecond, and nothing lies between two tokens.
    profile.reconcile(steps, None);
    assert!((profile.stamp_us - 1.0).abs() < 1e-9, "{}", profile.stamp_us);
    assert!(profile.steps.iter().all(|s| (s.time_us - 1.0).abs() < 1e-9));
    assert!((profile.sum_us() - steps).abs() < 1e-9);
    let names: Vec<_> = profile.steps.iter().map(|s| s.kernel.as_str()).collect();
    assert_eq!((names[0], names[names.len() - 1]), ("embed_q8_0", "lm_head_q8_0"));
    assert!(profile.steps.iter().all(|s| s.cycles.is_none()));
}

#[test]
fn host_time_is_what_is_not_spent_waiting_for_a_token() {
    let fake = Fake::new();
    let mut session = session(&model(), false);
    fake.plant(Some(Plant::LateToken));
    let tokens = 2;
    let measured = |_| {
        let start = Instant::now();
        let overhead = session.overhead(1, tokens).unwrap().unwrap();
        // Both are launched ahead; each of the two runs waits for the last one's entry.
        assert!(start.elapsed() >= 2 * Plant::LATE, "{:?}", start.elapsed());
        overhead.host_us * f64::from(tokens)
    };
    // Of several, as a machine that does other things too makes a host slow at times.
    let host_us = (0..5).map(measured).fold(f64::INFINITY, f64::min);
    assert!(host_us > 0.0 && host_us < Plant::LATE.as_secs_f64() * 0.5e6, "{host_us} us");

    // A launch that takes its time is the host's.
    fake.plant(None);
    fake.run_kernels_by(Some(Arc::new(|name, _, _| {
        if name.starts_with("lm_head") {
            std::thread::sleep(Plant::LATE / 10);
        }
        None
    })));
    let overhead = session.overhead(1, tokens).unwrap().unwrap();
    assert!(overhead.host_us >= Plant::LATE.as_secs_f64() * 1e5, "{overhead:?}");
}

#[test]
fn the_relaunch_gap_lies_between_the_ends_of_two_graphs_and_leaves_the_session_as_it_was() {
    let fake = Fake::new();
    let model = model();
    let mut session = session(&model, false);
    let (live, stats) = (fake.live(), session.stats());
    session.seek(5, 1).unwrap();
    let overhead = session.overhead(3, 20).unwrap().unwrap();
    // On this driver nothing lies between two tokens but the stamp at the begin: a microsecond.
    assert_eq!((overhead.tokens, overhead.relaunch_us), (20, Some(1.0)));
    assert_eq!(session.overhead(3, 1).unwrap().unwrap().relaunch_us, None, "there is one token");
    assert_eq!((fake.live(), session.position()), (live, 5));
    assert_eq!(session.stats(), stats, "it is no run");
    assert!(session.decode(&[], 1, &mut |_| ControlFlow::Continue(())).is_err(), "no input");
    let mut tokens = [Vec::new(), Vec::new()];
    for (of, mut session) in tokens.iter_mut().zip([session, self::session(&model, false)]) {
        session.seek(5, 1).unwrap();
        let mut sink = |c: decode_graph::session::Chosen| {
            of.push(c.token);
            ControlFlow::Continue(())
        };
        session.decode(&[3], 8, &mut sink).unwrap();
    }
    assert_eq!(tokens[0], tokens[1]);

    let options = SessionOptions { capacity: 8, persistent: false, ..SessionOptions::default() };
    let made = |backend, mode| {
        let options = SessionOptions { backend, mode, ..options.clone() };
        DecodeSession::new(&model, &options, &mut |_, _| {}).unwrap()
    };
    let mut eager = made(BackendChoice::Cuda, Mode::Eager);
    let of_eager = eager.overhead(1, 4).unwrap().unwrap();
    assert!(of_eager.host_us > 0.0 && of_eager.relaunch_us.is_none());
    assert_eq!(made(BackendChoice::Cpu, Mode::Graph).overhead(1, 4).unwrap(), None);
    for (token, tokens) in [(1, 0), (1, 9), (90, 1)] {
        assert_eq!(eager.overhead(token, tokens).unwrap_err().exit_code(), 2);
    }
}

#[test]
fn the_memory_that_is_taken_is_told_beside_the_sum_of_its_parts() {
    let fake = Fake::new();
    let model = model();
    let session = session(&model, false);
    let memory = session.stats().memory.unwrap();
    // This driver rounds nothing up, and its graphs and code take nothing.
    assert_eq!(memory.taken, fake.live().device_bytes as u64);
    assert_eq!((memory.planned(), memory.excess_percent()), (memory.taken, 0.0));
    let plan = session.plan();
    assert!(memory.kv >= plan.cache.bytes() && memory.workspace > 0 && memory.other > 0);
    let read: u64 = plan.steps.iter().map(|s| s.op.describe().traffic(0).weights).sum();
    assert!(memory.weights >= read, "{memory:?}");
    let cpu = SessionOptions { backend: BackendChoice::Cpu, ..SessionOptions::default() };
    let cpu = DecodeSession::new(&model, &cpu, &mut |_, _| {}).unwrap();
    assert_eq!(cpu.stats().memory, None);
}

/// Where the device departs from the reference by more than `bound`, with `plant` built in.
fn departure(plant: Option<Plant>, bound: f64) -> Option<Departure> {
    let fake = Fake::new();
    let model = model();
    let options = |backend| SessionOptions {
        backend,
        capacity: 64,
        kv: Some(KvType::F16),
        persistent: false,
        ..SessionOptions::default()
    };
    let [mut device, mut reference] = [BackendChoice::Cuda, BackendChoice::Cpu]
        .map(|b| DecodeSession::new(&model, &options(b), &mut |_, _| {}).unwrap());
    fake.plant(plant);
    let tokens = [5, 9, 2, 7, 11];
    let found = first_departure(&mut device, &mut reference, &tokens, bound).unwrap();
    if let Some(d) = &found {
        let most = 2 + device.plan().steps.len().ilog2();
        assert!(d.tries <= most, "{plant:?}: {} steps were compared, {most} are enough", d.tries);
        assert_eq!(device.plan().steps[d.step].label, d.label);
    } else {
        let mut tokens = Vec::new();
        let mut sink = |c: decode_graph::session::Chosen| {
            tokens.push((c.position, c.token));
            ControlFlow::Continue(())
        };
        device.decode(&[3], 2, &mut sink).unwrap();
        reference.decode(&[3], 2, &mut sink).unwrap();
        assert_eq!(tokens[..2], tokens[2..], "both go on where they stood");
    }
    found
}

#[test]
fn the_first_step_that_departs_from_the_reference_is_found_by_bisection() {
    assert_eq!(departure(None, 1e-6), None);
    for (plant, position, label) in [
        (Plant::SubBlockScale, 0, "embed"),
        (Plant::KvOneHeadOff, 0, "L00.qkv"),
        (Plant::KeysForValues, 0, "L00.qkv"),
        // A rotation by 0 has no pairs to mix up.
        (Plant::RopePairs, 1, "L00.qkv"),
        // Each layer takes what the one before it left there, and the first what a try before did.
        (Plant::ReusedActivations, 0, "L00.gate_up"),
        (Plant::LastTile, 0, "lm_head"),
    ] {
        let found = departure(Some(plant), 1e-6).unwrap();
        assert_eq!((found.position, found.label.as_str()), (position, label), "{plant:?}");
        assert!(found.nmse > 1e-6, "{found:?}");
    }
}

#[test]
fn a_wrong_row_of_the_cache_is_found_before_a_logit_shows_it() {
    // Of the logits no more than this is wrong.
    let bound = 0.9;
    let found = departure(Some(Plant::KvOneHeadOff), bound).unwrap();
    assert_eq!((found.position, found.label.as_str()), (0, "L00.qkv"));
    assert!(matches!(found.what.as_str(), "keys" | "values") && found.nmse > bound, "{found:?}");
}
