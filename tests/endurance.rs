//! The long runs of `gpu_trust.rs` in short over the fake driver, and its runs of few tokens for
//! compute-sanitizer as they are: what they look for is there to be found without a device too.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod endurance_runs;
mod fake_driver;
mod few_tokens;
mod format_models;
mod small_model;

use decode_graph::arch::{PlanOptions, record};
use decode_graph::checkpoint::Checkpoint;
use decode_graph::cuda::driver::{Context, Device};
use decode_graph::ops::{Gpu, KvType};
use decode_graph::plan::fuse;
use decode_graph::plan::program::Program;
use decode_graph::quant::QuantFormat;
use decode_graph::session::{BackendChoice, SessionOptions};
use endurance_runs::{
    DEVICE_DRIFT, HOST_DRIFT, build_and_destroy, memory_held_elsewhere, one_hash, soak,
    steps_that_write_nothing,
};
use fake_driver::{Fake, Live, Plant};
use small_model::SmallModel;

fn model() -> Checkpoint {
    SmallModel::new("llama", QuantFormat::Q8_0).open(tempfile::tempdir().unwrap().path())
}

fn options() -> SessionOptions {
    let (backend, red_zones, persistent) = (BackendChoice::Cuda, true, false);
    SessionOptions { backend, capacity: 24, red_zones, persistent, ..SessionOptions::default() }
}

/// Asks the driver for its free memory, in a context of its own.
fn free() -> impl Fn() -> u64 {
    let context = Context::new(Device::get(0).unwrap()).unwrap();
    move || context.memory().unwrap().0
}

#[test]
fn fill_after_fill_of_one_session_leaves_the_same_bits_and_no_memory_behind() {
    let _fake = Fake::new();
    let soak = soak(&model(), &options(), 40, &free()).unwrap();
    println!("{} tokens, {} distinct, hash {:016x}", soak.tokens, soak.distinct, soak.hash);
    assert_eq!(soak.drift.device(), 0);
    assert!(soak.drift.host() <= HOST_DRIFT, "{} bytes more are resident", soak.drift.host());
}

#[test]
fn sessions_built_and_destroyed_leave_nothing_behind() {
    let fake = Fake::new();
    let model = model();
    let free = free();
    let before = fake.live();
    let (drift, _) = build_and_destroy(&model, &options(), 30, &free).unwrap();
    assert!(drift.device() <= DEVICE_DRIFT);
    assert_eq!(fake.live(), before);
    assert_ne!(before, Live::default(), "the one that asks for the free memory is there");
}

#[test]
fn runs_of_graph_and_eager_have_one_hash() {
    let _fake = Fake::new();
    one_hash(&model(), &options(), 40).unwrap();
}

#[test]
#[should_panic(expected = "the second fill")]
fn a_fill_that_depends_on_the_one_before_is_found() {
    let fake = Fake::new();
    fake.plant(Some(Plant::ReusedActivations));
    let _ = soak(&model(), &options(), 1, &free());
}

#[test]
#[should_panic(expected = "another hash than the first")]
fn a_replay_that_is_not_eager_has_another_hash() {
    let fake = Fake::new();
    fake.plant(Some(Plant::LastLayerSkipped));
    let _ = one_hash(&model(), &options(), 20);
}

#[test]
fn steps_beyond_the_capacity_or_the_vocabulary_write_nothing() {
    let _fake = Fake::new();
    let (model, context) = (model(), Context::new(Device::get(0).unwrap()).unwrap());
    let plain = record(&model, PlanOptions { capacity: 24, kv: KvType::F16 }).unwrap();
    for plan in [fuse::fuse(&plain), plain] {
        steps_that_write_nothing(&context, &model, &plan, false).unwrap();
    }
}

#[test]
#[should_panic(expected = "position 24, token 1")]
fn a_step_computed_at_the_capacity_is_found() {
    let fake = Fake::new();
    let (model, context) = (model(), Context::new(Device::get(0).unwrap()).unwrap());
    let plain = record(&model, PlanOptions { capacity: 24, kv: KvType::F16 }).unwrap();
    fake.plant(Some(Plant::CapacityIgnored));
    let _ = steps_that_write_nothing(&context, &model, &plain, false);
}

#[test]
fn memory_that_others_hold_is_told_and_used_when_they_give_it_back() {
    let fake = Fake::new();
    let context = Context::new(Device::get(0).unwrap()).unwrap();
    memory_held_elsewhere(&context, &model(), &options(), 1 << 20).unwrap();
    drop(context);
    assert_eq!(fake.live(), Live::default());
}

#[test]
fn what_compute_sanitizer_looks_at_runs_in_every_format_and_mixture() {
    let fake = Fake::new();
    for formats in format_models::formats() {
        few_tokens::chain(formats);
        if formats.0 == formats.1 {
            few_tokens::experts_and_norms(formats);
        }
        let plan = few_tokens::fused_plan(formats);
        assert!(Program::of(&plan, &Gpu::H200).is_some(), "{formats:?} in the persistent kernel");
    }
    few_tokens::at_depth(false);
    few_tokens::drawn();
    assert_eq!(fake.live(), Live::default());
}
