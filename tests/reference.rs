//! The CPU reference: against another implementation on a real model, and the session over it.

mod small_model;

use decode_graph::checkpoint::{Checkpoint, SyntheticSpec};
use decode_graph::error::Error;
use decode_graph::ops::KvType;
use decode_graph::quant::QuantFormat;
use decode_graph::session::{BackendChoice, Chosen, DecodeSession, Finish, SessionOptions};
use decode_graph::verify::{self, Golden, GoldenBounds};
use small_model::SmallModel;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn cpu(capacity: u32) -> SessionOptions {
    SessionOptions { backend: BackendChoice::Cpu, capacity, ..SessionOptions::default() }
}

fn open(checkpoint: &Checkpoint, options: &SessionOptions) -> DecodeSession {
    DecodeSession::new(checkpoint, options, &mut |_, _| {}).unwrap()
}

fn tiny() -> Checkpoint {
    Checkpoint::synthetic(&SyntheticSpec::parse("tiny:q8_0").unwrap()).unwrap()
}

/// Decodes and collects what the sink sees.
fn decode(s: &mut DecodeSession, inputs: &[u32], n: u32) -> (Vec<Chosen>, Finish) {
    let mut seen = Vec::new();
    let finish = s
        .decode(inputs, n, &mut |c| {
            seen.push(c);
            ControlFlow::Continue(())
        })
        .unwrap();
    (seen, finish)
}

fn tokens(seen: &[Chosen]) -> Vec<u32> {
    seen.iter().map(|c| c.token).collect()
}

#[test]
fn a_real_model_agrees_with_transformers_at_every_position_and_continuation() {
    let model = root("models/smollm2-135m-instruct-q4_1.gguf");
    assert!(model.exists(), "the test model is not here: run models/fetch.sh first");
    let golden = Golden::open(&root("tests/golden/smollm2-135m-q4_1.json")).unwrap();
    let checkpoint = Checkpoint::open(&model).unwrap();
    let mut session = open(&checkpoint, &cpu(golden.capacity() as u32));
    let start = Instant::now();
    let mut steps = 0;
    let report = verify::compare(&mut session, &golden, &mut |done, _| steps = done).unwrap();
    let rate = steps as f64 / start.elapsed().as_secs_f64();
    println!("{report:#?}\n{rate:.1} tok/s");
    report.check(&GoldenBounds::EXACT).unwrap();
    assert_eq!((report.positions, report.top1_agreement), (256, 1.0));
    assert_eq!((report.greedy_prompts, report.greedy_equal), (6, 6));
    assert!((report.mean_nll - report.golden_mean_nll).abs() < 1e-4);
}
