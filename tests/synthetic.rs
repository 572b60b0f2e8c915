//! Synthetic checkpoints: the shapes and weight formats of the real models, and weights that are
//! a pure function of seed, tensor and place.

#![allow(missing_docs, clippy::unwrap_used)]

use decode_graph::arch::{PlanOptions, record};
use decode_graph::checkpoint::{Checkpoint, SyntheticSpec};
use decode_graph::error::Error;
use decode_graph::ops::KvType;
use decode_graph::quant::QuantFormat::{self, F32, Q4K, Q5_0, Q5K, Q6K, Q8_0};
use std::collections::BTreeMap;

fn make(spec: &str) -> Checkpoint {
    Checkpoint::synthetic(&SyntheticSpec::parse(spec).unwrap()).unwrap()
}

fn census(c: &Checkpoint) -> BTreeMap<QuantFormat, usize> {
    let mut count = BTreeMap::new();
    for t in c.tensors() {
        *count.entry(t.format).or_default() += 1;
    }
    count
}

fn format(c: &Checkpoint, name: &str) -> QuantFormat {
    c.tensor(name).unwrap_or_else(|| panic!("{name}")).format
}

#[test]
fn unknown_names_are_usage_errors_that_list_the_valid_ones() {
    for (text, lists) in [("llama-9", "smollm2-135m"), ("tiny:q3", "q4_k_m"), ("", "tiny")] {
        let Err(Error::Usage(said)) = SyntheticSpec::parse(text) else { panic!("{text}") };
        assert!(said.contains(lists), "{said}");
    }
    assert_eq!(SyntheticSpec::parse("tiny").unwrap().to_string(), "tiny:q4_k_m");
    assert_eq!(make("llama-3.2-1b").path().to_str(), Some("llama-3.2-1b:q4_k_m"));
}

#[test]
fn llama_8b_q4_k_m_has_six_bits_in_the_sixteen_layers_that_published_files_have() {
    let c = make("llama-3.1-8b:q4_k_m");
    let six = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31];
    for layer in 0..32 {
        let wanted = if six.contains(&layer) { Q6K } else { Q4K };
        for part in ["attn_v", "ffn_down"] {
            assert_eq!(format(&c, &format!("blk.{layer}.{part}.weight")), wanted, "{layer} {part}");
        }
        for part in ["attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"] {
            assert_eq!(format(&c, &format!("blk.{layer}.{part}.weight")), Q4K);
        }
    }
    assert_eq!(format(&c, "output.weight"), Q6K);
    assert_eq!(format(&c, "token_embd.weight"), Q4K);
    // The published file of this model is 4.92 GB.
    let bytes: u64 = c.tensors().iter().map(|t| t.bytes).sum();
    assert!((4_900_000_000..4_930_000_000).contains(&bytes), "{bytes}");
}

#[test]
fn rows_that_are_no_multiple_of_256_fall_back_as_in_published_files() {
    // Counted in the published Q4_K_M file.
    let wanted = [(F32, 109), (Q5_0, 81), (Q8_0, 10), (Q4K, 27), (Q6K, 9)];
    assert_eq!(census(&make("gemma-3-270m:q4_k_m")), BTreeMap::from(wanted));

    let c = make("smollm2-135m:q5_k_m");
    assert_eq!(format(&c, "blk.4.attn_q.weight"), QuantFormat::Q5_1);
    assert_eq!(format(&c, "blk.4.ffn_down.weight"), Q5K);
    assert_eq!(format(&c, "token_embd.weight"), Q8_0);
}

#[test]
fn experts_have_the_bytes_of_the_published_file() {
    let c = make("qwen3-30b-a3b:q4_k_m");
    assert_eq!(c.tensor("blk.0.ffn_down_exps.weight").unwrap().shape, [768, 2048, 128]);
    assert_eq!(format(&c, "blk.0.ffn_gate_inp.weight"), F32);
    // It is 18.6 GB.
    let bytes: u64 = c.tensors().iter().map(|t| t.bytes).sum();
    assert!((18_500_000_000..18_700_000_000).contains(&bytes), "{bytes}");

    let c = make("mixtral-8x7b:q4_k_m");
    assert_eq!(c.tensor("blk.0.ffn_down_exps.weight").unwrap().shape, [14_336, 4096, 8]);
    assert!(c.u64_key("llama.expert_feed_forward_length").unwrap().is_none());
    for (part, wanted) in [("attn_q", Q4K), ("attn_k", Q8_0), ("attn_v", Q8_0)] {
        assert_eq!(format(&c, &format!("blk.5.{part}.weight")), wanted, "{part}");
    }
    assert_eq!(format(&c, "blk.5.attn_output.weight"), Q5K);
    // It is 28.4 GB.
    let bytes: u64 = c.tensors().iter().map(|t| t.bytes).sum();
    assert!((28_400_000_000..28_500_000_000).contains(&bytes), "{bytes}");
}

#[test]
fn every_shape_is_a_model_that_is_served() {
    for name in SyntheticSpec::shapes() {
        let options = PlanOptions { capacity: 8192, kv: KvType::F16 };
        record(&make(name), options).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

#[test]
fn other_mixtures_have_one_format_and_six_bits_for_the_logits() {
    for (spec, base, logits) in [
        ("llama-2-7b:q4_0", QuantFormat::Q4_0, Q6K),
        ("llama-2-7b:q4_1", QuantFormat::Q4_1, Q6K),
        ("llama-2-7b:q6_k", Q6K, Q6K),
        ("llama-2-7b:q8_0", Q8_0, Q8_0),
        ("llama-2-7b:bf16", QuantFormat::Bf16, QuantFormat::Bf16),
        ("llama-2-7b:f16", QuantFormat::F16, QuantFormat::F16),
    ] {
        let c = make(spec);
        for t in c.tensors() {
            let wanted = match t.name.as_str() {
                "output.weight" => logits,
                _ if t.shape.len() == 1 => F32,
                _ => base,
            };
            assert_eq!(t.format, wanted, "{spec} {}", t.name);
        }
    }
}

#[test]
fn mixtures_of_few_bits_spend_more_on_values_down_projections_and_the_attention_output() {
    use QuantFormat::{Iq4Nl, Iq4Xs, Q2K, Q3K, Q4_0, Q5_1};
    let parts = |spec: &str, layer: u64| {
        let c = make(spec);
        ["attn_q", "attn_v", "attn_output", "ffn_up", "ffn_down"]
            .map(|part| format(&c, &format!("blk.{layer}.{part}.weight")))
    };
    // Four query heads share a value head in Llama 3.1, none in Llama 2.
    assert_eq!(parts("llama-3.1-8b:q2_k", 9), [Q2K, Q4K, Q3K, Q2K, Q3K]);
    assert_eq!(parts("llama-2-7b:q2_k", 9), [Q2K, Q3K, Q3K, Q2K, Q3K]);
    assert_eq!(parts("llama-3.1-8b:q3_k_m", 1), [Q3K, Q5K, Q4K, Q3K, Q5K]);
    assert_eq!(parts("llama-3.1-8b:q3_k_m", 2), [Q3K, Q4K, Q4K, Q3K, Q4K]);
    for (mix, base) in [("iq4_nl", Iq4Nl), ("iq4_xs", Iq4Xs)] {
        let of = |shape, layer| parts(&format!("{shape}:{mix}"), layer);
        assert_eq!(of("llama-3.1-8b", 3), [base, Q5K, base, base, Q5K]);
        assert_eq!(of("llama-3.1-8b", 4), [base, Q5K, base, base, base]);
        assert_eq!(of("llama-2-7b", 4), [base; 5]);
    }
    // Rows of 576; down projections have 1536. Three query heads share a value head.
    assert_eq!(parts("smollm2-135m:q2_k", 9), [Q4_0, Q4_0, Q4_0, Q4_0, Q3K]);
    assert_eq!(parts("smollm2-135m:q3_k_m", 0), [Q4_0, Q5_1, Q5_0, Q4_0, Q5K]);
    assert_eq!(parts("smollm2-135m:iq4_xs", 9), [Iq4Nl, Iq4Nl, Iq4Nl, Iq4Nl, Iq4Xs]);
    // The published files are 3.18 and 4.02 GB, some megabytes of them the vocabulary.
    for (quant, size) in [("q2_k", 3.17), ("q3_k_m", 4.01)] {
        let c = make(&format!("llama-3.1-8b:{quant}"));
        assert_eq!(format(&c, "output.weight"), Q6K);
        let bytes: u64 = c.tensors().iter().map(|t| t.bytes).sum();
        assert!((bytes as f64 / 1e9 - size).abs() < 0.005, "{quant}: {bytes}");
    }
}

#[test]
fn tying_biases_norms_and_rope_factors_are_those_of_the_model() {
    for name in SyntheticSpec::shapes() {
        let c = make(name);
        let tied = ["llama-3.2-1b", "smollm2-135m", "qwen2.5-1.5b", "phi-4-mini"];
        let tied = tied.contains(&name) || name.starts_with("gemma");
        assert_eq!(c.tensor("output.weight").is_none(), tied, "{name}");
        let has = |tensor| c.tensor(tensor).is_some();
        assert_eq!(has("blk.0.attn_q.bias"), name.starts_with("qwen2"), "{name}");
        let head_norms = ["qwen3-8b", "qwen3-30b-a3b", "gemma-3-270m"].contains(&name);
        assert_eq!(has("blk.0.attn_q_norm.weight"), head_norms, "{name}");
        assert_eq!(has("blk.0.post_ffw_norm.weight"), name.starts_with("gemma"), "{name}");
        assert_eq!(has("rope_freqs.weight"), name.starts_with("llama-3"), "{name}");
        assert_eq!(has("blk.0.attn_qkv.weight"), name.starts_with("phi"), "{name}");
        assert_eq!(has("rope_factors_long.weight"), name.starts_with("phi"), "{name}");
        assert_eq!(
            has("blk.0.ffn_gate_exps.weight"),
            ["qwen3-30b-a3b", "mixtral-8x7b"].contains(&name),
            "{name}"
        );
        let vocab = c.required_u64(&format!("{}.vocab_size", c.architecture().unwrap())).unwrap();
        assert_eq!(c.tensor("token_embd.weight").unwrap().rows(), vocab);
        assert_eq!(c.required_strings("tokenizer.ggml.tokens").unwrap().len() as u64, vocab);
    }
}

fn floats(c: &Checkpoint, name: &str) -> Vec<f32> {
    let bytes = c.read_all(c.tensor(name).unwrap()).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

#[test]
fn rope_factors_go_from_one_to_the_factor_of_the_model() {
    for (name, factor, size) in [("llama-3.2-1b", 32.0, 32), ("llama-3.1-8b", 8.0, 64)] {
        let table = floats(&make(name), "rope_freqs.weight");
        assert_eq!(table.len(), size);
        assert!(table.is_sorted() && table[0] == 1.0 && table[size - 1] == factor, "{table:?}");
        assert!(table.iter().any(|&x| x > 1.0 && x < factor), "a smooth part between");
    }
}

#[test]
fn any_range_on_any_thread_has_the_same_bytes() {
    let specs: Vec<_> = SyntheticSpec::quants().map(|q| format!("tiny:{q}")).collect();
    for spec in specs.iter().map(String::as_str).chain(["smollm2-135m:q4_k_m"]) {
        let c = make(spec);
        let again = make(spec);
        for t in c.tensors().iter().filter(|t| t.bytes < 1 << 20) {
            let whole = c.read_all(t).unwrap();
            std::thread::scope(|scope| {
                for step in [whole.len() / 3 + 1, 977] {
                    let (again, whole) = (&again, &whole);
                    scope.spawn(move || {
                        for (i, wanted) in whole.chunks(step).enumerate() {
                            let mut part = vec![0xAA; wanted.len()];
                            again.read(t, (i * step) as u64, &mut part).unwrap();
                            assert_eq!(part, wanted, "{spec} {} part {i}", t.name);
                        }
                    });
                }
            });
        }
    }
}

#[test]
fn a_range_made_in_parallel_has_the_bytes_of_its_parts() {
    let c = make("smollm2-135m:q4_0");
    let t = c.tensor("token_embd.weight").unwrap();
    let mut large = vec![0; 3_000_001];
    c.read(t, 12_345, &mut large).unwrap();
    for (i, wanted) in large.chunks(100_003).enumerate() {
        let mut part = vec![0; wanted.len()];
        c.read(t, 12_345 + i as u64 * 100_003, &mut part).unwrap();
        assert!(part == wanted, "part {i}");
    }
}

#[test]
fn seeds_and_names_make_different_weights() {
    let c = make("tiny:q8_0");
    let spec = SyntheticSpec::parse("tiny:q8_0").unwrap().with_seed(1);
    let other = Checkpoint::synthetic(&spec).unwrap();
    let read = |c: &Checkpoint, name| c.read_all(c.tensor(name).unwrap()).unwrap();
    assert_ne!(read(&c, "blk.0.attn_q.weight"), read(&other, "blk.0.attn_q.weight"));
    assert_ne!(read(&c, "blk.0.attn_q.weight"), read(&c, "blk.1.attn_q.weight"));
    let all = read(&c, "blk.0.attn_q.weight");
    assert_ne!(all[..272], all[272..544], "groups differ");
}

#[test]
fn norms_are_near_one_and_biases_near_zero() {
    let norm = floats(&make("tiny"), "output_norm.weight");
    assert!(norm.iter().all(|x| (0.9..1.1).contains(x)));
    let mean = norm.iter().sum::<f32>() / norm.len() as f32;
    assert!((mean - 1.0).abs() < 0.01 && norm.windows(2).any(|w| w[0] != w[1]));
    let bias = floats(&make("qwen2.5-1.5b"), "blk.0.attn_q.bias");
    assert!(bias.iter().all(|x| x.abs() < 0.05) && bias.iter().any(|x| x.abs() > 0.01));
}

#[test]
fn matrices_keep_unit_variance() {
    let c = make("tiny:bf16");
    let t = c.tensor("blk.0.ffn_down.weight").unwrap();
    let row_bytes = t.format.row_bytes(t.columns() as usize).unwrap();
    let mut row = vec![0.0; t.columns() as usize];
    let mut square = 0.0;
    for bytes in c.read_all(t).unwrap().chunks_exact(row_bytes) {
        t.format.decode_row(bytes, &mut row);
        square += row.iter().map(|x| x * x).sum::<f32>();
    }
    let per_row = square / t.rows() as f32;
    assert!((0.95..1.05).contains(&per_row), "{per_row}");
}
