//! Small models whose plans call every kernel that has weights, in every format and in every mixture
//! of formats that has a kernel of its own.
#![allow(clippy::unwrap_used)] // A wrong builder is a wrong test.
#![allow(dead_code)] // Each test file uses its own part.

use crate::small_model::{Key, SmallModel};
use decode_graph::arch::{PlanOptions, record};
use decode_graph::checkpoint::Checkpoint;
use decode_graph::ops::KvType;
use decode_graph::ops::fused::Qkv;
use decode_graph::plan::fuse::fuse;
use decode_graph::quant::QuantFormat;

/// Width of the residual stream, of a token's experts and of the feed-forward block's half.
const WIDTH: u64 = 256;
const HEAD: u64 = 64;
const EXPERTS: u64 = 5;

/// `llama`: qkv, o_proj, gate_up, down and lm_head; `gemma3`: heads with norms, blocks with norms
/// after them, GELU; `qwen3moe`: experts. All biases that GGUF allows them.
pub(crate) const ARCHITECTURES: [&str; 3] = ["llama", "gemma3", "qwen3moe"];

/// Steps of a layer of theirs that must be there, or it is not their kernels that are called.
fn steps(arch: &str) -> &'static [&'static str] {
    match arch {
        "llama" => &["qkv", "o_proj", "gate_up", "down"],
        "gemma3" => &["qkv", "head_rope", "norm_add", "gate_up"],
        _ => &["qkv", "head_rope", "o_proj", "expert_gate_up"],
    }
}

/// Of all matrices but the values, and of the values.
pub(crate) type Formats = (QuantFormat, QuantFormat);

/// Every format, and every mixture that has a kernel.
pub(crate) fn formats() -> impl Iterator<Item = Formats> + Clone {
    QuantFormat::ALL.into_iter().map(|f| (f, f)).chain(Qkv::MIXED)
}

/// Architecture, formats of (everything, values), model: each for its fused plan.
pub(crate) fn all() -> impl Iterator<Item = (&'static str, String, Checkpoint)> {
    let each = |arch| formats().map(move |pair| (arch, pair));
    ARCHITECTURES.into_iter().flat_map(each).map(|(arch, (format, values))| {
        let model = model(arch, (format, values)).open(tempfile::tempdir().unwrap().path());
        let plan = fuse(&record(&model, PlanOptions { capacity: 64, kv: KvType::F16 }).unwrap());
        for step in steps(arch) {
            let there = plan.steps.iter().any(|s| s.label == format!("L01.{step}"));
            assert!(there, "{arch} {format}/{values}: no {step}");
        }
        (arch, format!("{format}/{values}"), model)
    })
}

/// One of [`ARCHITECTURES`].
pub(crate) fn model(arch: &str, (format, values): Formats) -> SmallModel {
    let heads = (WIDTH / HEAD) as u32;
    let mut model = SmallModel::new(arch, format).widen(heads);
    for layer in 0..2 {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let vector = |model: &mut SmallModel, part: &str, len| {
            model.tensor(&name(part), &[len], QuantFormat::F32);
        };
        model.change(&name("attn_v.weight"), |t| t.format = values);
        for (part, rows) in [
            ("attn_q", WIDTH),
            ("attn_k", WIDTH / 2),
            ("attn_v", WIDTH / 2),
            ("attn_output", WIDTH),
            ("ffn_gate", 2 * WIDTH),
            ("ffn_up", 2 * WIDTH),
            ("ffn_down", WIDTH),
        ] {
            if arch != "qwen3moe" || part.starts_with("attn") {
                vector(&mut model, &format!("{part}.bias"), rows);
            }
        }
        if arch != "llama" {
            vector(&mut model, "attn_q_norm.weight", HEAD);
            vector(&mut model, "attn_k_norm.weight", HEAD);
        }
        if arch == "gemma3" {
            vector(&mut model, "post_attention_norm.weight", WIDTH);
            vector(&mut model, "post_ffw_norm.weight", WIDTH);
        }
        if arch == "qwen3moe" {
            for part in ["gate", "up", "down"] {
                model.remove(&name(&format!("ffn_{part}.weight")));
                let stacked = name(&format!("ffn_{part}_exps.weight"));
                model.tensor(&stacked, &[WIDTH, WIDTH, EXPERTS], format);
            }
            model.tensor(&name("ffn_gate_inp.weight"), &[WIDTH, EXPERTS], QuantFormat::F32);
        }
    }
    if arch == "gemma3" {
        model.set("gemma3.attention.sliding_window", Key::U32(7));
    }
    if arch == "qwen3moe" {
        model.set("qwen3moe.expert_count", Key::U32(EXPERTS as u32));
        model.set("qwen3moe.expert_used_count", Key::U32(2));
        model.set("qwen3moe.expert_feed_forward_length", Key::U32(WIDTH as u32));
    }
    model
}
