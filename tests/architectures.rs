//! Every architecture against its own modelling code: small models with random weights, and the
//! logits that `transformers` computed with them (`golden/make_architectures.py`).
#![allow(clippy::unwrap_used)] // Helpers of tests are tests.

use decode_graph::arch::{self, PlanOptions};
use decode_graph::checkpoint::Checkpoint;
use decode_graph::ops::KvType;
use decode_graph::plan::DecodePlan;
use decode_graph::plan::fuse::fuse;
use decode_graph::reference;
use decode_graph::session::{BackendChoice, DecodeSession, SessionOptions};
use decode_graph::verify::{self, Golden, GoldenBounds};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/architectures")
}

/// Every golden file with its name and its model.
fn all() -> Vec<(String, Golden, Checkpoint)> {
    let mut names: Vec<PathBuf> =
        std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    let goldens = names.into_iter().filter(|path| path.extension().unwrap() == "json");
    goldens
        .map(|path| {
            let golden = Golden::open(&path).unwrap();
            let checkpoint = Checkpoint::open(&folder().join(&golden.model)).unwrap();
            (path.file_stem().unwrap().to_string_lossy().into_owned(), golden, checkpoint)
        })
        .collect()
}

#[test]
fn every_architecture_agrees_with_its_own_code_beyond_its_window_and_original_context() {
    for (name, golden, checkpoint) in all() {
        let options = SessionOptions {
            backend: BackendChoice::Cpu,
            capacity: golden.capacity() as u32,
            kv: Some(KvType::F32),
            ..SessionOptions::default()
        };
        let mut session = DecodeSession::new(&checkpoint, &options, &mut |_, _| {}).unwrap();
        let report = verify::compare(&mut session, &golden, &mut |_, _| {}).unwrap();
        let (error, first) = (report.max_abs_logit_error, report.top1_agreement);
        println!("{name}: {} positions, error {error:.1e}, first {first}", report.positions);
        let bounds = GoldenBounds { max_abs_logit_error: 1e-3, ..GoldenBounds::EXACT };
        report.check(&bounds).unwrap_or_else(|e| panic!("{name}: {e}"));
        // Every logit of every position was compared.
        let vocab = session.plan().vocab as usize;
        assert!(golden.forced.top_ids.iter().all(|ids| ids.len() == vocab), "{name}");
    }
}

#[test]
fn every_architecture_that_is_served_has_a_golden() {
    let golden: BTreeSet<String> =
        all().iter().map(|(.., c)| c.architecture().unwrap().to_owned()).collect();
    assert_eq!(golden, arch::SUPPORTED.map(str::to_owned).into());
}

/// The bits of the logits after every token of `ids`.
fn logits(checkpoint: &Checkpoint, plan: &DecodePlan, ids: &[u32]) -> Vec<Vec<u32>> {
    let mut memory = reference::load(checkpoint, plan, &mut |_, _| {}).unwrap();
    (0u32..)
        .zip(ids)
        .map(|(position, token)| {
            memory.state.position = position;
            memory.state.token = *token;
            reference::interpret(plan, &mut memory).unwrap();
            memory.buf(plan.logits).iter().map(|v| v.to_bits()).collect()
        })
        .collect()
}

#[test]
fn the_fused_plan_of_every_architecture_computes_the_plain_plan_bit_for_bit() {
    for (name, golden, checkpoint) in all() {
        let ids = &golden.forced.ids;
        for kv in [KvType::F16, KvType::F32] {
            let options = PlanOptions { capacity: ids.len() as u32, kv };
            let plain = arch::record(&checkpoint, options).unwrap();
            let fused = fuse(&plain);
            assert!(fused.steps.len() < plain.steps.len(), "{name}: nothing is fused");
            let same = logits(&checkpoint, &fused, ids) == logits(&checkpoint, &plain, ids);
            assert!(same, "{name} {}", kv.name());
        }
    }
}
