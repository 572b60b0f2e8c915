use super::*;
use crate::arch::{PlanOptions, record};
use crate::checkpoint::{Checkpoint, SyntheticSpec};
use crate::ops::KvType;

fn plan() -> DecodePlan {
    let model = Checkpoint::synthetic(&SyntheticSpec::parse("tiny").unwrap()).unwrap();
    record(&model, PlanOptions { capacity: 64, kv: KvType::F16 }).unwrap()
}

/// Stamps of `tokens` tokens whose step `i` takes `10 + i` µs and each stamp 1 µs more; 5 µs between
/// two tokens. Token `slow` takes a millisecond more, in its first step.
fn stamps(plan: &DecodePlan, tokens: u64, slow: Option<u64>) -> Vec<u64> {
    let mut clock = 1_000_000_000;
    let mut all = Vec::new();
    for token in 0..tokens {
        clock += 6_000;
        all.push(clock);
        for i in 0..plan.steps.len() as u64 {
            clock += (11 + i) * 1000;
            if slow == Some(token) && i == 0 {
                clock += 1_000_000;
            }
            all.push(clock);
        }
    }
    all
}

fn profile(plan: &DecodePlan, stamps: &[u64]) -> Profile {
    Profile::of_stamps(plan, &|s| s.op.describe().name().to_owned(), 0, stamps).unwrap()
}

#[test]
fn steps_without_their_stamps_sum_up_to_the_plain_replay() {
    let plan = plan();
    let n = plan.steps.len() as f64;
    let plain = 5.0 + (0..plan.steps.len()).map(|i| 10.0 + i as f64).sum::<f64>();
    // One slow token of nine is outside the middle half.
    let mut p = profile(&plan, &stamps(&plan, 10, Some(4)));
    assert!((p.token_us - (plain + n + 1.0)).abs() < 1e-6, "{} {plain}", p.token_us);
    assert!((p.sum_us() - p.token_us).abs() < 1e-6, "the distances are the token");
    p.reconcile(plain, Some(7.0));
    assert!((p.stamp_us - 1.0).abs() < 1e-6, "{}", p.stamp_us);
    assert!((p.sum_us() - plain).abs() < 1e-6);
    for (i, s) in p.steps.iter().enumerate() {
        assert!((s.time_us - (10.0 + i as f64)).abs() < 1e-6, "{s:?}");
        assert_eq!(s.label, plan.steps[i].label);
        assert_eq!(s.bytes, plan.steps[i].op.describe().traffic(4).dram());
    }
    assert!((p.between_us - 5.0).abs() < 1e-6);
    // A plain replay that was slower gives nothing to take off.
    p.reconcile(2.0 * plain, None);
    assert_eq!(p.stamp_us, 0.0);
    assert!(p.steps.iter().all(|s| s.time_us == s.raw_us));
}

#[test]
fn between_tokens_of_the_persistent_kernel_lies_the_relaunch_gap() {
    let step = StepProfile { time_us: 9.0, cycles: Some(Cycles::default()), ..Default::default() };
    let mut p = Profile { steps: vec![step; 2], token_us: 18.0, ..Profile::default() };
    p.reconcile(20.0, Some(1.5));
    assert_eq!((p.between_us, p.sum_us(), p.stamp_us), (1.5, 19.5, 0.0));
}

#[test]
fn kernels_are_the_sums_of_their_steps() {
    let plan = plan();
    let p = profile(&plan, &stamps(&plan, 6, None));
    let by_kernel = p.by_kernel();
    assert_eq!(by_kernel.iter().map(|(n, _)| n).sum::<usize>(), plan.steps.len());
    let us: f64 = by_kernel.iter().map(|(_, s)| s.time_us).sum();
    assert!((us + p.between_us - p.sum_us()).abs() < 1e-6);
    let bytes: u64 = by_kernel.iter().map(|(_, s)| s.bytes).sum();
    assert_eq!(bytes, p.steps.iter().map(|s| s.bytes).sum::<u64>());
}

#[test]
fn one_token_is_no_profile() {
    let plan = plan();
    let one = stamps(&plan, 1, None);
    assert!(Profile::of_stamps(&plan, &|_| String::new(), 0, &one).is_err());
}

#[test]
fn trace_events_follow_one_another_and_carry_what_a_step_reads() {
    let plan = plan();
    let p = profile(&plan, &stamps(&plan, 12, None));
    let trace = chrome_trace(&p, "tiny", Some(100.0));
    let events = trace["traceEvents"].as_array().unwrap();
    let of = |track: u32| {
        events.iter().filter(move |e| e["ph"] == "X" && e["tid"] == track).collect::<Vec<_>>()
    };
    let (tokens, steps) = (of(1), of(2));
    assert_eq!((tokens.len(), steps.len()), (8, 8 * plan.steps.len()));
    let end = |e: &serde_json::Value| e["ts"].as_f64().unwrap() + e["dur"].as_f64().unwrap();
    for pair in steps.windows(2) {
        assert!(pair[1]["ts"].as_f64().unwrap() >= end(pair[0]) - 1e-6);
    }
    for (i, token) in tokens.iter().enumerate() {
        let inside = &steps[i * plan.steps.len()..][..plan.steps.len()];
        assert_eq!(token["ts"], inside[0]["ts"]);
        assert!((end(token) - end(inside[inside.len() - 1])).abs() < 1e-6);
    }
    let head = steps.iter().find(|e| e["args"]["bytes"].as_u64() > Some(0)).unwrap();
    let speed = head["args"]["gb_per_s"].as_f64().unwrap();
    assert!((head["args"]["percent_of_ceiling"].as_f64().unwrap() - speed).abs() < 1e-9);
}
