//! What a model's keys and tensors may be, and that everything else is refused by name.
#![allow(clippy::unwrap_used)] // Helpers of tests are tests.

mod small_model;

use decode_graph::arch::{self, ModelConfig, PlanOptions};
use decode_graph::error::{Defect, Error};
use decode_graph::ops::{KvType, Pairing};
use decode_graph::plan::WeightSpec;
use decode_graph::quant::QuantFormat;
use small_model::{Key, SmallModel};

const OPTIONS: PlanOptions = PlanOptions { capacity: 32, kv: KvType::F32 };

fn record(model: &SmallModel) -> Result<decode_graph::plan::DecodePlan, Error> {
    let folder = tempfile::tempdir().unwrap();
    arch::record(&model.open(folder.path()), OPTIONS)
}

fn llama() -> SmallModel {
    SmallModel::new("llama", QuantFormat::Q8_0)
}

/// The place and class of the error, `None` for what is not supported.
fn refusal(model: &SmallModel) -> (String, Option<Defect>) {
    match record(model).unwrap_err() {
        Error::InvalidModel { at, defect, .. } => (at, Some(defect)),
        Error::Unsupported { at, .. } => (at, None),
        other => panic!("{other}"),
    }
}

#[test]
fn a_key_that_no_model_can_have_is_refused_by_name() {
    let nan = Key::F32(f32::NAN);
    let bad = Some(Defect::BadValue);
    let cases: Vec<(&str, Key, Option<Defect>)> = vec![
        ("block_count", Key::U32(0), bad),
        ("block_count", Key::U32(u32::MAX), bad),
        ("attention.head_count", Key::U32(0), bad),
        ("attention.head_count_kv", Key::U32(0), bad),
        ("attention.head_count_kv", Key::U32(3), bad),
        ("attention.head_count", Key::U32(6), bad),
        ("attention.key_length", Key::U32(0), bad),
        ("attention.key_length", Key::U32(15), bad),
        ("attention.key_length", Key::U32(1000), bad),
        ("rope.dimension_count", Key::U32(18), bad),
        ("rope.dimension_count", Key::U32(7), bad),
        ("rope.dimension_count", Key::U32(0), bad),
        ("attention.layer_norm_rms_epsilon", Key::F32(0.0), bad),
        ("attention.layer_norm_rms_epsilon", Key::F32(-1e-5), bad),
        ("attention.layer_norm_rms_epsilon", nan.clone(), bad),
        ("rope.freq_base", Key::F32(0.0), bad),
        ("rope.freq_base", Key::F32(-1.0), bad),
        ("rope.freq_base", nan, bad),
        ("rope.scaling.factor", Key::F32(f32::INFINITY), bad),
        ("context_length", Key::U32(0), bad),
        ("context_length", Key::U64(1 << 63), bad),
        ("embedding_length", Key::I32(-64), bad),
        ("embedding_length", Key::F32(64.0), Some(Defect::BadType)),
        ("attention.head_count_kv", Key::U32s(vec![2, 2, 2]), Some(Defect::BadArray)),
        ("attention.head_count_kv", Key::U32s(vec![2, 0]), bad),
        ("attention.head_count_kv", Key::U32s(vec![2, 4]), None),
        ("feed_forward_length", Key::U32s(vec![128, 64]), None),
        ("expert_count", Key::U32(8), None),
        ("attn_logit_softcapping", Key::F32(50.0), None),
        ("rope.scaling.type", Key::Text("yarn"), None),
        ("attention.value_length", Key::U32(32), None),
    ];
    for (key, value, defect) in cases {
        let key = format!("llama.{key}");
        let mut model = llama();
        // Six heads need an absent key_length to be wrong, and a divisor.
        if matches!(value, Key::U32(6)) {
            model.set("llama.attention.head_count_kv", Key::U32(6));
        }
        model.set(&key, value.clone());
        assert_eq!(refusal(&model), (key, defect), "{value:?}");
    }
}

#[test]
fn a_required_key_is_missed_by_name_and_an_unknown_architecture_lists_what_is_served() {
    for key in ["block_count", "embedding_length", "context_length", "feed_forward_length"] {
        let key = format!("llama.{key}");
        assert_eq!(refusal(llama().unset(&key)), (key, Some(Defect::MissingKey)));
    }
    let at = "general.architecture".to_owned();
    assert_eq!(refusal(llama().unset(&at)), (at.clone(), Some(Defect::MissingKey)));
    let mut model = llama();
    let e = record(model.set(&at, Key::Text("mamba"))).unwrap_err();
    assert!(e.to_string().contains("mamba") && e.to_string().contains("llama, qwen2"), "{e}");
    assert_eq!(e.exit_code(), 4);
}

#[test]
fn lossless_integers_and_equal_arrays_are_read_and_head_dim_may_be_explicit() {
    let mut model = llama();
    model.set("llama.block_count", Key::U64(2)).set("llama.embedding_length", Key::I32(64));
    model.set("llama.attention.head_count_kv", Key::U32s(vec![2, 2]));
    record(&model).unwrap();
    // Three heads of 32 over a residual stream of 64.
    model.set("llama.attention.key_length", Key::U32(32));
    model.set("llama.attention.head_count", Key::U32(3));
    model.set("llama.attention.head_count_kv", Key::U32(1));
    for l in 0..2 {
        model.change(&format!("blk.{l}.attn_q.weight"), |t| t.shape = vec![64, 96]);
        model.change(&format!("blk.{l}.attn_output.weight"), |t| t.shape = vec![96, 64]);
    }
    let folder = tempfile::tempdir().unwrap();
    let config = ModelConfig::read(&model.open(folder.path())).unwrap();
    assert_eq!((config.head_dim, config.q_rows(), config.hidden), (32, 96, 64));
    record(&model).unwrap();
}

#[test]
fn every_tensor_of_a_layer_is_missed_by_name() {
    let model = SmallModel::new("qwen2", QuantFormat::Q8_0);
    for t in &model.tensors {
        let refused = refusal(model.clone().remove(&t.name));
        assert_eq!(refused, (t.name.clone(), Some(Defect::MissingTensor)));
    }
}

#[test]
fn a_tensor_of_another_shape_is_refused_by_name() {
    for (name, shape) in [
        ("blk.1.attn_k.weight", vec![32, 64]),
        ("blk.0.ffn_down.weight", vec![64, 128]),
        ("blk.0.attn_norm.weight", vec![32]),
        ("token_embd.weight", vec![64, 95]),
        ("output_norm.weight", vec![64, 2]),
    ] {
        let mut model = llama();
        model.change(name, |t| t.shape = shape);
        assert_eq!(refusal(&model), (name.to_owned(), Some(Defect::ShapeMismatch)));
    }
}

#[test]
fn a_tensor_that_a_layer_would_ignore_is_refused_and_one_outside_is_not() {
    for name in ["blk.1.attn_q_norm.weight", "blk.0.attn_qkv.weight", "blk.2.attn_norm.weight"] {
        let mut model = llama();
        model.tensor(name, &[64], QuantFormat::F32);
        assert_eq!(refusal(&model), (format!("tensor {name}"), None));
    }
    let mut model = llama();
    model.tensor("extra.weight", &[64], QuantFormat::F32);
    record(&model).unwrap();
}

#[test]
fn mixed_formats_optional_biases_and_norms_of_any_format_are_served() {
    let mut model = llama();
    model.change("blk.0.attn_v.weight", |t| t.format = QuantFormat::F16);
    model.change("blk.1.ffn_up.weight", |t| t.format = QuantFormat::Q5_1);
    model.change("blk.1.ffn_norm.weight", |t| t.format = QuantFormat::Q8_0);
    model.tensor("blk.0.attn_output.bias", &[64], QuantFormat::F32);
    model.tensor("blk.1.ffn_down.bias", &[64], QuantFormat::F16);
    model.tensor("output.bias", &[96], QuantFormat::F32);
    let plan = record(&model).unwrap();
    let biases = plan.weights.iter().filter(|w| w.name().ends_with(".bias")).count();
    assert_eq!(biases, 3);
}

#[test]
fn frequencies_follow_base_linear_scaling_and_the_files_divisors() {
    let freqs = |model: &SmallModel| {
        let plan = record(model).unwrap();
        plan.weights
            .iter()
            .find_map(|w| match w {
                WeightSpec::Computed { values, .. } => Some(values.clone()),
                WeightSpec::Matrix { .. } | WeightSpec::Vector { .. } => None,
            })
            .unwrap()
    };
    let plain = freqs(&llama());
    assert_eq!(plain.len(), 8);
    assert_eq!((plain[0], plain[4]), (1.0, 0.01));
    let mut scaled = llama();
    scaled.set("llama.rope.scaling.type", Key::Text("linear"));
    scaled.set("llama.rope.scaling.factor", Key::F32(4.0));
    let quarter: Vec<f32> = plain.iter().map(|f| f / 4.0).collect();
    assert_eq!(freqs(&scaled), quarter);
    scaled.set("llama.rope.scaling.type", Key::Text("none"));
    assert_eq!(freqs(&scaled), plain);
    let mut divided = llama();
    divided.tensor("rope_freqs.weight", &[8], QuantFormat::F32);
    // Weights about zero are no divisors.
    assert_eq!(refusal(&divided), ("rope_freqs.weight".to_owned(), Some(Defect::BadValue)));
}

#[test]
fn qwen2_rotates_halves_and_llama_neighbours() {
    let folder = tempfile::tempdir().unwrap();
    let read = |arch| {
        let model = SmallModel::new(arch, QuantFormat::Q8_0);
        ModelConfig::read(&model.open(folder.path())).unwrap().rope.pairing
    };
    assert_eq!((read("llama"), read("qwen2")), (Pairing::Adjacent, Pairing::Halves));
}
