//! Sessions over a fake driver: without a fault they compute what the CPU reference computes.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod fake_driver;
mod small_model;

use decode_graph::checkpoint::Checkpoint;
use decode_graph::error::{Error, Result};
use decode_graph::ops::KvType;
use decode_graph::quant::QuantFormat;
use decode_graph::session::{
    BackendChoice, DebugLevel, DecodeSession, Mode, SessionOptions,
};
use fake_driver::{Fake, Fault, Live};
use small_model::SmallModel;
use std::ops::ControlFlow;

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
    let kv = Some(KvType::F16);
    SessionOptions { backend, mode, debug, capacity: 24, kv, ..SessionOptions::default() }
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
    Ok(Seen { tokens, logits, keys: bits(&keys), values: bits(&values) })
}

fn small(format: QuantFormat) -> Checkpoint {
    SmallModel::new("llama", format).open(tempfile::tempdir().unwrap().path())
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
