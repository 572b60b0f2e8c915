//! What a model's keys and tensors may be, and that everything else is refused by name.
#![allow(clippy::unwrap_used)] // Helpers of tests are tests.

mod small_model;

use decode_graph::arch::{self, ModelConfig, PlanOptions};
use decode_graph::error::{Defect, Error};
use decode_graph::ops::{KvType, Pairing};
use decode_graph::plan::WeightSpec;
use decode_graph::quant::QuantFormat;
use small_model::{Key, SmallModel};
use std::slice::from_ref;

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
        ("expert_count", Key::U32(513), bad),
        ("expert_count", Key::F32(8.0), Some(Defect::BadType)),
        ("attn_logit_softcapping", Key::F32(50.0), None),
        ("rope.scaling.type", Key::Text("dynamic"), None),
        ("rope.scaling.yarn_log_multiplier", Key::F32(0.5), None),
        ("rope.scaling.attn_factor", Key::F32(0.0), bad),
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
    assert!(e.to_string().contains("mamba"), "{e}");
    for name in arch::SUPPORTED {
        assert!(e.to_string().contains(name), "{e}");
    }
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

/// The configuration of `arch` with keys set; the tensors do not matter.
fn config(arch: &str, keys: &[(&str, Key)]) -> Result<ModelConfig, Error> {
    let folder = tempfile::tempdir().unwrap();
    let mut model = SmallModel::new(arch, QuantFormat::Q8_0);
    for (key, value) in keys {
        model.set(&format!("{arch}.{key}"), value.clone());
    }
    ModelConfig::read(&model.open(folder.path()))
}

#[test]
fn experts_are_read_where_the_architecture_has_them_and_refused_by_key_elsewhere() {
    let text = |arch, keys: &[(&str, Key)]| config(arch, keys).unwrap_err().to_string();
    let eight = ("expert_count", Key::U32(8));
    let two = ("expert_used_count", Key::U32(2));
    let read = config("llama", &[eight.clone(), two.clone()]).unwrap().experts.unwrap();
    assert_eq!((read.count, read.used, read.ffn), (8, 2, 128));
    let ffn = ("expert_feed_forward_length", Key::U32(48));
    let read = config("qwen3moe", &[eight.clone(), two.clone(), ffn]).unwrap().experts.unwrap();
    assert_eq!((read.count, read.used, read.ffn), (8, 2, 48));
    assert_eq!(config("llama", &[("expert_count", Key::U32(0))]).unwrap().experts, None);

    assert!(text("qwen2", from_ref(&eight)).contains("qwen2.expert_count: mixture of experts"));
    assert!(text("qwen3moe", &[]).contains("qwen3moe.expert_count"));
    assert!(text("llama", from_ref(&eight)).contains("llama.expert_used_count"));
    for (key, value) in [
        ("expert_used_count", Key::U32(9)),
        ("expert_shared_count", Key::U32(1)),
        ("expert_gating_func", Key::U32(2)),
        ("expert_weights_scale", Key::F32(2.5)),
    ] {
        let said = text("llama", &[eight.clone(), two.clone(), (key, value)]);
        assert!(said.contains(key), "{said}");
    }
}

#[test]
fn local_layers_follow_the_period_of_the_architecture_or_the_keys() {
    let local = |arch, keys: &[(&str, Key)]| {
        let mut all = vec![("block_count", Key::U32(8))];
        all.extend_from_slice(keys);
        config(arch, &all).unwrap().local.map(|l| {
            let layers: String = l.layers.iter().map(|b| if *b { 'L' } else { 'g' }).collect();
            (l.window, layers)
        })
    };
    let window = ("attention.sliding_window", Key::U32(16));
    let pattern = |value| ("attention.sliding_window_pattern", value);
    let some = |window, layers: &str| Some((window, layers.to_owned()));
    assert_eq!(local("gemma2", &[]), some(4096, "LgLgLgLg"));
    assert_eq!(local("gemma3", from_ref(&window)), some(16, "LLLLLgLL"));
    assert_eq!(local("gemma3", &[]), None);
    assert_eq!(local("phi3", from_ref(&window)), some(16, "LLLLLLLL"));
    assert_eq!(local("phi3", &[("attention.sliding_window", Key::U32(0))]), None);
    assert_eq!(local("llama", from_ref(&window)), some(16, "LLLLLLLL"));
    assert_eq!(local("llama", &[]), None);
    assert_eq!(local("qwen2", from_ref(&window)), None);
    let three = pattern(Key::U32(3));
    assert_eq!(local("gemma3", &[window.clone(), three]), some(16, "LLgLLgLL"));
    let each = [true, false, false, true, false, false, false, true];
    let each = pattern(Key::Bools(each.to_vec()));
    assert_eq!(local("gemma3", &[window.clone(), each]), some(16, "LggLgggL"));
    let short = [("block_count", Key::U32(8)), window, pattern(Key::Bools(vec![true; 7]))];
    let said = config("gemma3", &short).unwrap_err().to_string();
    assert!(said.contains("gemma3.attention.sliding_window_pattern"), "{said}");
    assert!(said.contains("has 7 elements for 8 layers"), "{said}");
}

#[test]
fn one_tensor_of_query_key_and_value_is_read_in_parts_and_biases_may_stand_apart() {
    let mut model = SmallModel::new("qwen2", QuantFormat::Q8_0);
    model.remove("blk.0.attn_q.weight").remove("blk.0.attn_k.weight");
    model.remove("blk.0.attn_v.weight").remove("blk.0.attn_k.bias");
    model.tensor("blk.0.attn_qkv.weight", &[64, 128], QuantFormat::Q8_0);
    assert_eq!(
        refusal(&model),
        ("blk.0.attn_k.bias".to_owned(), Some(Defect::MissingTensor)),
        "qwen2 has biases"
    );
    model.remove("blk.0.attn_q.bias").remove("blk.0.attn_v.bias");
    model.tensor("blk.0.attn_qkv.bias", &[128], QuantFormat::F32);
    let plan = record(&model).unwrap();
    let parts: Vec<_> = plan
        .weights
        .iter()
        .filter(|w| w.name().starts_with("blk.0.attn_qkv"))
        .map(|w| match w {
            WeightSpec::Matrix { first_row, rows, .. } => (*first_row, *rows),
            WeightSpec::Vector { first, len, .. } => (*first, *len),
            WeightSpec::Computed { .. } => panic!(),
        })
        .collect();
    assert_eq!(parts, [(0, 64), (0, 64), (64, 32), (64, 32), (96, 32), (96, 32)]);
    // Two sources of one matrix.
    model.tensor("blk.0.attn_q.weight", &[64, 64], QuantFormat::Q8_0);
    assert_eq!(refusal(&model), ("tensor blk.0.attn_q.weight".to_owned(), None));
}

#[test]
fn the_divisors_of_longrope_go_with_the_length_of_the_context_and_need_each_other() {
    let mut model = SmallModel::new("phi3", QuantFormat::Q8_0);
    let at = "rope_factors_long.weight".to_owned();
    model.tensor("rope_factors_short.weight", &[8], QuantFormat::F32);
    assert_eq!(refusal(&model), (at, Some(Defect::MissingTensor)));
    let keys =
        [("rope.scaling.type", Key::Text("longrope")), ("rope.scaling.factor", Key::F32(4.0))];
    let said = config("phi3", &keys).unwrap_err().to_string();
    assert!(said.contains("phi3.rope.scaling.type: a factor of 4 beside the divisors"), "{said}");
}

#[test]
fn every_tensor_of_a_layer_is_missed_by_name_and_shape() {
    let model = SmallModel::new("qwen2", QuantFormat::Q8_0);
    for t in &model.tensors {
        let mut without = model.clone();
        let refused = refusal(without.remove(&t.name));
        assert_eq!(refused, (t.name.clone(), Some(Defect::MissingTensor)));
        let said = record(&without).unwrap_err().to_string();
        assert!(said.contains(&format!("expected {:?}", t.shape)), "{said}");
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
        let mut right = Vec::new();
        let other = format!("is {shape:?}, expected ");
        model.change(name, |t| right = std::mem::replace(&mut t.shape, shape));
        assert_eq!(refusal(&model), (name.to_owned(), Some(Defect::ShapeMismatch)));
        let said = record(&model).unwrap_err().to_string();
        assert!(said.contains(&format!("{other}{right:?}")), "{said}");
    }
}

#[test]
fn a_tensor_that_a_layer_would_ignore_is_refused_and_one_outside_is_not() {
    for name in ["blk.1.attn_q_norm.weight", "blk.0.attn_qkv.bias", "blk.2.attn_norm.weight"] {
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
