//! The CPU reference: against another implementation on a real model, and the session over it.
#![allow(clippy::unwrap_used)] // Helpers of tests are tests.

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

#[test]
#[ignore = "a measurement: cargo test --release --test reference speed -- --ignored --nocapture"]
fn speed() {
    let checkpoint = Checkpoint::open(&root("models/smollm2-135m-instruct-q4_1.gguf")).unwrap();
    let mut session = open(&checkpoint, &cpu(256));
    for _ in 0..4 {
        session.reset().unwrap();
        let (start, used) = (Instant::now(), processor_seconds());
        let (seen, _) = decode(&mut session, &[504], 60);
        let rate = seen.len() as f64 / start.elapsed().as_secs_f64();
        let used = processor_seconds().zip(used).map(|(now, then)| now - then);
        // On a machine that others use too, the processor time is what tells two builds apart.
        let each = used.map(|used| format!(", {:.1} ms of processor", used * 1e3 / 60.0));
        println!("{rate:.1} tok/s{} a token", each.unwrap_or_default());
    }
}

/// Processor time of this process so far, all threads; `None` where it cannot be told.
fn processor_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // Behind the name in parentheses: user and system time are fields 14 and 15, in 1/100 s.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    Some((ticks()? + ticks()?) / 100.0)
}

#[test]
fn at_capacity_nothing_is_written_and_the_next_run_works() {
    let mut s = open(&tiny(), &cpu(8));
    let (seen, finish) = decode(&mut s, &[1, 2, 3], 20);
    assert_eq!((seen.len(), finish, s.position()), (8, Finish::Capacity, 8));
    let (before, logits) = (s.cache(1).unwrap(), s.logits().unwrap());
    assert_eq!(decode(&mut s, &[], 1), (vec![], Finish::Capacity));
    assert_eq!(decode(&mut s, &[5], 1), (vec![], Finish::Capacity));
    assert!(matches!(s.feed(5), Err(Error::Decode { position: 8, .. })));
    assert_eq!((s.cache(1).unwrap(), s.logits().unwrap()), (before, logits));
    s.reset().unwrap();
    let (again, finish) = decode(&mut s, &[1, 2, 3], 6);
    assert_eq!((again, finish), (seen, Finish::Done));
}

#[test]
fn a_token_outside_the_vocabulary_is_refused_before_anything_is_computed() {
    let mut s = open(&tiny(), &cpu(16));
    decode(&mut s, &[1, 2], 2);
    let (next, cache) = (s.position(), s.cache(0).unwrap());
    let refused = s.decode(&[4, 512], 1, &mut |_| ControlFlow::Continue(()));
    assert!(matches!(refused, Err(Error::Decode { position, .. }) if position == next + 1));
    assert_eq!((s.position(), s.cache(0).unwrap()), (next, cache));
    assert_eq!(decode(&mut s, &[4], 1).1, Finish::Done);
}

#[test]
fn inputs_one_by_one_in_a_run_or_after_a_stop_choose_the_same_tokens() {
    let checkpoint = tiny();
    let mut s = open(&checkpoint, &cpu(32));
    let (whole, finish) = decode(&mut s, &[7, 8, 9], 6);
    assert_eq!((whole.len(), finish), (8, Finish::Done));
    assert!(whole.iter().zip(0..).all(|(c, p)| c.position == p));

    let mut s = open(&checkpoint, &cpu(32));
    assert!(matches!(s.decode(&[], 1, &mut |_| ControlFlow::Continue(())), Err(Error::Usage(_))));
    assert!(matches!(s.logits(), Err(Error::Usage(_))));
    let mut parts: Vec<u32> = [7, 8, 9].map(|t| s.feed(t).unwrap()).to_vec();
    let mut stop_after = 2;
    let finish = s.decode(&[], 5, &mut |c| {
        parts.push(c.token);
        stop_after -= 1;
        if stop_after == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!((finish.unwrap(), s.position()), (Finish::Stopped, 5));
    parts.extend(tokens(&decode(&mut s, &[], 3).0));
    assert_eq!(parts, tokens(&whole));
    // Stopping among the inputs drops the rest of them.
    s.reset().unwrap();
    let finish = s.decode(&[7, 99, 98], 4, &mut |_| ControlFlow::Break(()));
    assert_eq!((finish.unwrap(), s.position()), (Finish::Stopped, 1));
    assert_eq!(tokens(&decode(&mut s, &[8, 9], 6).0), tokens(&whole)[1..]);
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let checkpoint = tiny();
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut s = open(&checkpoint, &cpu(32));
            decode(&mut s, &[3, 1, 4], 9);
            s.logits().unwrap()
        })
    };
    assert_eq!(on(1), on(3));
}

#[test]
fn the_fused_plan_computes_the_plain_plan_bit_for_bit_for_every_format_and_pairing() {
    let folder = tempfile::tempdir().unwrap();
    for arch in ["llama", "qwen2"] {
        for format in QuantFormat::ALL {
            let mut model = SmallModel::new(arch, format);
            if format.describe().block_elements() > 64 {
                model = model.widen(4);
            }
            model.change("blk.1.attn_v.weight", |t| t.format = QuantFormat::Q8_0);
            let checkpoint = model.open(folder.path());
            for kv in [KvType::F16, KvType::F32] {
                let run = |fused| {
                    let mut s =
                        open(&checkpoint, &SessionOptions { fused, kv: Some(kv), ..cpu(16) });
                    let fewer = s.plan().steps.len() < 30;
                    assert_eq!(fewer, fused, "{} steps", s.plan().steps.len());
                    let seen = decode(&mut s, &[1, 2, 3], 8).0;
                    let logits = s.logits().unwrap();
                    let bits: Vec<u32> = logits.iter().map(|v| v.to_bits()).collect();
                    (seen, bits, s.cache(1).unwrap())
                };
                assert_eq!(run(true), run(false), "{arch} {format} {}", kv.name());
            }
        }
    }
}

#[test]
fn seek_fills_the_caches_with_the_same_f16_values_whatever_the_cache_type() {
    let checkpoint = tiny();
    let filled = |kv, position, seed| {
        let mut s = open(&checkpoint, &SessionOptions { kv: Some(kv), ..cpu(16) });
        s.seek(position, seed).unwrap();
        assert_eq!(s.position(), position);
        let caches = s.cache(1).unwrap();
        s.feed(1).unwrap();
        caches
    };
    let (keys, values) = filled(KvType::F32, 10, 5);
    assert_eq!((keys.clone(), values.clone()), filled(KvType::F16, 10, 5));
    assert_ne!((keys.clone(), values.clone()), filled(KvType::F32, 10, 6));
    assert_ne!(keys, values);
    // [kv_heads, capacity, head_dim]: ten positions of each head, then untouched zeros.
    for head in keys.chunks_exact(16 * 64) {
        assert!(head[..10 * 64].iter().any(|v| *v != 0.0));
        assert!(head[10 * 64..].iter().all(|v| *v == 0.0));
    }
    assert!(open(&checkpoint, &cpu(16)).seek(17, 0).is_err());
}

#[test]
fn without_a_device_auto_falls_back_and_cuda_by_name_fails() {
    let by_name = SessionOptions { backend: BackendChoice::Cuda, ..cpu(8) };
    let refused = DecodeSession::new(&tiny(), &by_name, &mut |_, _| {});
    if let Err(e) = refused {
        assert!(matches!(e, Error::NoDevice(_)), "{e}");
        let auto = SessionOptions { backend: BackendChoice::Auto, ..cpu(8) };
        assert_eq!(
            (open(&tiny(), &auto).backend(), open(&tiny(), &auto).mode()),
            ("cpu", "reference")
        );
    }
}
