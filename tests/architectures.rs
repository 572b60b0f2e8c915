//! Every architecture against its own modelling code: small models with random weights, and the
//! logits that `transformers` computed with them (`golden/make_architectures.py`).
#![allow(clippy::unwrap_used)] // Helpers of tests are tests.

mod golden_models;

use decode_graph::arch::{self, PlanOptions};
use decode_graph::checkpoint::Checkpoint;
use decode_graph::error::Error;
use decode_graph::ops::KvType;
use decode_graph::plan::DecodePlan;
use decode_graph::plan::fuse::fuse;
use decode_graph::reference;
use decode_graph::session::{BackendChoice, DecodeSession, SessionOptions};
use decode_graph::verify::{self, Golden, GoldenBounds, GoldenReport};
use golden_models::{all, folder};
use std::collections::BTreeSet;

/// What the CPU reference makes of `golden`, against the bounds that hold for every architecture.
fn check(checkpoint: &Checkpoint, golden: &Golden) -> Result<GoldenReport, Error> {
    let options = SessionOptions {
        backend: BackendChoice::Cpu,
        capacity: golden.capacity() as u32,
        kv: Some(KvType::F32),
        ..SessionOptions::default()
    };
    let mut session = DecodeSession::new(checkpoint, &options, &mut |_, _| {})?;
    let report = verify::compare(&mut session, golden, &mut |_, _| {})?;
    report.check(&GoldenBounds { max_abs_logit_error: 1e-3, ..GoldenBounds::EXACT })?;
    Ok(report)
}

#[test]
fn every_architecture_agrees_with_its_own_code_beyond_its_window_and_original_context() {
    for (name, golden, checkpoint) in all() {
        let report = check(&checkpoint, &golden).unwrap_or_else(|e| panic!("{name}: {e}"));
        let (error, first) = (report.max_abs_logit_error, report.top1_agreement);
        println!("{name}: {} positions, error {error:.1e}, first {first}", report.positions);
        // Every logit of every position was compared.
        let key = format!("{}.vocab_size", checkpoint.architecture().unwrap());
        let vocab = checkpoint.required_u64(&key).unwrap() as usize;
        assert!(golden.forced.top_ids.iter().all(|ids| ids.len() == vocab), "{name}");
    }
}

/// The file with the number of `key`, 4 bytes, replaced.
fn with_key(name: &str, key: &str, value: [u8; 4]) -> Vec<u8> {
    let mut bytes = std::fs::read(folder().join(name)).unwrap();
    let text = [(key.len() as u64).to_le_bytes().as_slice(), key.as_bytes()].concat();
    let at = bytes.windows(text.len()).position(|w| w == text).unwrap() + text.len() + 4;
    bytes[at..at + 4].copy_from_slice(&value);
    bytes
}

#[test]
fn the_goldens_see_a_small_change_of_every_key_that_is_special() {
    let int = u32::to_le_bytes;
    let float = f32::to_le_bytes;
    let goldens = all();
    let folder = tempfile::tempdir().unwrap();
    for (golden, key, value) in [
        ("gemma2", "gemma2.attn_logit_softcapping", float(3.1)),
        ("gemma2", "gemma2.final_logit_softcapping", float(8.1)),
        ("gemma2", "gemma2.attention.sliding_window", int(11)),
        ("gemma3", "gemma3.attention.sliding_window", int(11)),
        ("gemma3", "gemma3.rope.freq_base", float(9e5)),
        ("gemma3", "gemma3.rope.scaling.factor", float(7.9)),
        ("llama-yarn", "llama.rope.scaling.factor", float(3.9)),
        ("llama-yarn", "llama.rope.scaling.original_context_length", int(20)),
        ("mixtral", "llama.expert_used_count", int(1)),
        ("phi3-long", "phi3.attention.sliding_window", int(13)),
        ("phi3-long", "phi3.rope.scaling.attn_factor", float(1.1)),
        ("phi3-long", "phi3.rope.scaling.original_context_length", int(48)),
        ("phi3-short", "phi3.rope.scaling.original_context_length", int(23)),
        ("qwen3moe", "qwen3moe.expert_used_count", int(4)),
    ] {
        let (_, golden, _) = goldens.iter().find(|(name, ..)| name == golden).unwrap();
        let path = folder.path().join(&golden.model);
        std::fs::write(&path, with_key(&golden.model, key, value)).unwrap();
        let seen = check(&Checkpoint::open(&path).unwrap(), golden);
        assert!(matches!(seen, Err(Error::Verification(_))), "{key}: {seen:?}");
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

#[test]
fn fusion_takes_what_its_kernels_compute_and_leaves_the_rest() {
    let layer = |name: &str| -> Vec<String> {
        let goldens = all();
        let (_, _, checkpoint) = goldens.iter().find(|(golden, ..)| golden == name).unwrap();
        let options = PlanOptions { capacity: 32, kv: KvType::F16 };
        let fused = fuse(&arch::record(checkpoint, options).unwrap());
        let of_layer = fused.steps.iter().filter_map(|s| s.label.strip_prefix("L01."));
        of_layer.map(str::to_owned).collect()
    };
    let five = ["qkv", "attn.attention", "o_proj", "gate_up", "down"];
    assert_eq!(layer("llama-yarn"), five);
    assert_eq!(layer("phi3-long"), five);
    let heads = ["qkv", "head_rope", "attn.attention"];
    assert_eq!(layer("qwen3"), [&heads[..], &["o_proj", "gate_up", "down"]].concat());
    let after = ["attn.o", "norm_add", "gate_up", "ffn.down", "norm_add"];
    assert_eq!(layer("gemma2"), [&["qkv", "attn.attention"][..], &after].concat());
    assert_eq!(layer("gemma3"), [&heads[..], &after].concat());
    let route = ["ffn.norm", "ffn.router", "ffn.top_k"];
    let experts = [&route[..], &["expert_gate_up", "ffn.down", "ffn.sum"]].concat();
    assert_eq!(layer("mixtral"), [&["qkv", "attn.attention", "o_proj"], &experts[..]].concat());
}
