//! Model families by `model_type`: a row says which architecture of GGUF it is, and how its names
//! and conventions differ from it. A new family is one row of [`FAMILIES`].
//!
//! Sources: the models' own `config.json`, the modelling code of the `transformers` project, and
//! what llama.cpp's converter writes for them.

use super::super::metadata::{Array, Value};
use super::json::Json;
use super::mapping::{Dimensions, Keys};
use crate::error::{Defect, Error, Result};

/// A tensor of a layer: its module there, and its name in GGUF; both without `.weight` or `.bias`.
type Name = (&'static str, &'static str);

/// The matrices of experts, which are stored one by one and stacked in GGUF.
pub(super) struct Experts {
    /// What stands before the expert's number.
    pub(super) prefix: &'static str,
    /// After the number, and in GGUF.
    pub(super) names: [Name; 3],
}

/// How one `model_type` is read.
pub(super) struct Family {
    model_type: &'static str,
    /// `general.architecture`.
    pub(super) architecture: &'static str,
    /// Whether rows of query and key heads are stored half by half, while this architecture's
    /// neighbours rotate together in GGUF.
    pub(super) interleaved: bool,
    /// Whether a norm's gain is stored as what it adds to 1.
    pub(super) norms_plus_one: bool,
    /// `tie_word_embeddings` where the file does not say.
    pub(super) tied: bool,
    /// The activation that the architecture's feed-forward block computes.
    activation: &'static str,
    /// Tensors of a layer.
    pub(super) names: &'static [&'static [Name]],
    pub(super) experts: Option<Experts>,
    /// Keys beyond those that all have.
    pub(super) keys: fn(&Json, &Dimensions, &mut Keys<'_>) -> Result<()>,
}

/// Attention and feed-forward block in separate matrices, and the norm before attention.
const COMMON: &[Name] = &[
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];
/// Norms before each block only.
const PRE_NORMS: &[Name] = &[("post_attention_layernorm", "ffn_norm")];
/// Norms before and after each block.
const SANDWICH_NORMS: &[Name] = &[
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];
/// Norms of every query and key head.
const HEAD_NORMS: &[Name] =
    &[("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm")];
/// Fused projections; the first half of `gate_up_proj` is the gate, in GGUF's `ffn_up` too.
const FUSED: &[Name] = &[("self_attn.qkv_proj", "attn_qkv"), ("mlp.gate_up_proj", "ffn_up")];

/// What a dense model with pre-norms and SwiGLU is; rows name what differs.
const PLAIN: Family = Family {
    model_type: "",
    architecture: "",
    interleaved: false,
    norms_plus_one: false,
    tied: false,
    activation: "silu",
    names: &[COMMON, PRE_NORMS],
    experts: None,
    keys: |_, _, _| Ok(()),
};

const FAMILIES: &[Family] = &[
    Family { model_type: "llama", architecture: "llama", interleaved: true, ..PLAIN },
    Family {
        model_type: "mistral",
        architecture: "llama",
        interleaved: true,
        keys: |c, d, k| window(c, d, k),
        ..PLAIN
    },
    Family {
        model_type: "mixtral",
        architecture: "llama",
        interleaved: true,
        names: &[COMMON, PRE_NORMS, &[("block_sparse_moe.gate", "ffn_gate_inp")]],
        experts: Some(Experts {
            prefix: "block_sparse_moe.experts.",
            names: [("w1", "ffn_gate_exps"), ("w3", "ffn_up_exps"), ("w2", "ffn_down_exps")],
        }),
        keys: |c, d, k| {
            experts(c, k)?;
            window(c, d, k)
        },
        ..PLAIN
    },
    Family { model_type: "qwen2", architecture: "qwen2", keys: |c, _, _| no_window(c), ..PLAIN },
    Family {
        model_type: "qwen3",
        architecture: "qwen3",
        names: &[COMMON, PRE_NORMS, HEAD_NORMS],
        keys: |c, _, _| no_window(c),
        ..PLAIN
    },
    Family {
        model_type: "qwen3_moe",
        architecture: "qwen3moe",
        names: &[COMMON, PRE_NORMS, HEAD_NORMS, &[("mlp.gate", "ffn_gate_inp")]],
        experts: Some(Experts {
            prefix: "mlp.experts.",
            names: [
                ("gate_proj", "ffn_gate_exps"),
                ("up_proj", "ffn_up_exps"),
                ("down_proj", "ffn_down_exps"),
            ],
        }),
        keys: qwen3_moe,
        ..PLAIN
    },
    Family {
        model_type: "gemma2",
        architecture: "gemma2",
        norms_plus_one: true,
        tied: true,
        activation: "gelu_pytorch_tanh",
        names: &[COMMON, SANDWICH_NORMS],
        keys: gemma,
        ..PLAIN
    },
    Family {
        model_type: "gemma3_text",
        architecture: "gemma3",
        norms_plus_one: true,
        tied: true,
        activation: "gelu_pytorch_tanh",
        names: &[COMMON, SANDWICH_NORMS, HEAD_NORMS],
        keys: gemma,
        ..PLAIN
    },
    Family {
        model_type: "phi3",
        architecture: "phi3",
        names: &[COMMON, PRE_NORMS, FUSED],
        keys: |c, d, k| window(c, d, k),
        ..PLAIN
    },
];

/// The family of a configuration.
///
/// # Errors
/// [`Error::Unsupported`] naming the `model_type`, or what about its configuration is not mapped.
pub(super) fn of(config: &Json) -> Result<&'static Family> {
    let name = config.str("model_type")?.ok_or_else(|| config.missing("model_type"))?;
    let family = FAMILIES.iter().find(|f| f.model_type == name).ok_or_else(|| {
        let known: Vec<_> = FAMILIES.iter().map(|f| f.model_type).collect();
        let what = format!("model type \"{}\"", name.escape_debug());
        config.unsupported("model_type", what, format!("known are {}", known.join(", ")))
    })?;
    if config.contains("quantization_config") {
        let instead = "use the model in bf16, f16 or f32, or a GGUF file of it";
        return Err(config.unsupported("quantization_config", "weights quantised so", instead));
    }
    for key in ["hidden_act", "hidden_activation"] {
        if let Some(found) = config.str(key)?.filter(|found| *found != family.activation) {
            // Gemma 2 says both, and only the second one counts.
            if key == "hidden_act" && config.contains("hidden_activation") {
                continue;
            }
            let what = format!("activation \"{}\"", found.escape_debug());
            let instead = format!("{name} models compute {}", family.activation);
            return Err(config.unsupported(key, what, instead));
        }
    }
    Ok(family)
}

/// A sliding window that hides positions of the model's own context.
fn window(config: &Json, d: &Dimensions, keys: &mut Keys<'_>) -> Result<()> {
    if let Some(window) = config.u64("sliding_window")?.filter(|w| *w < d.context) {
        keys.count("attention.sliding_window", "sliding_window", window);
    }
    Ok(())
}

/// Qwen lists a window that is off, unless the file says otherwise.
fn no_window(config: &Json) -> Result<()> {
    match config.bool("use_sliding_window")? {
        Some(true) => {
            let instead = "use a model without it";
            Err(config.unsupported("use_sliding_window", "a sliding window", instead))
        }
        _ => Ok(()),
    }
}

/// The key that tells the number of experts, and the number.
pub(super) fn expert_count(config: &Json) -> Result<(&'static str, u64)> {
    // The second name is the older one of the Qwen family.
    for key in ["num_local_experts", "num_experts"] {
        if let Some(n) = config.u64(key)? {
            return Ok((key, n));
        }
    }
    Err(config.missing("num_local_experts"))
}

fn experts(config: &Json, keys: &mut Keys<'_>) -> Result<()> {
    let (key, count) = expert_count(config)?;
    keys.count("expert_count", key, count);
    let chosen = "num_experts_per_tok";
    keys.count("expert_used_count", chosen, config.required_u64(chosen)?);
    Ok(())
}

fn qwen3_moe(config: &Json, _: &Dimensions, keys: &mut Keys<'_>) -> Result<()> {
    no_window(config)?;
    experts(config, keys)?;
    let size = "moe_intermediate_size";
    keys.count("expert_feed_forward_length", size, config.required_u64(size)?);
    let instead = "use a model whose layers all have experts with normalised weights";
    if config.bool("norm_topk_prob")? != Some(true) {
        let what = "experts' weights that do not sum to 1";
        return Err(config.unsupported("norm_topk_prob", what, instead));
    }
    let dense = config.f64s("mlp_only_layers")?.is_some_and(|layers| !layers.is_empty());
    if dense || config.u64("decoder_sparse_step")?.is_some_and(|n| n != 1) {
        return Err(config.unsupported("mlp_only_layers", "layers without experts", instead));
    }
    Ok(())
}

/// Windows of some layers, caps on scores and logits, and the scale of the scores.
fn gemma(config: &Json, d: &Dimensions, keys: &mut Keys<'_>) -> Result<()> {
    let key = "sliding_window";
    keys.count("attention.sliding_window", key, config.required_u64(key)?);
    for (key, name) in [
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ] {
        // The keys' defaults in GGUF are Gemma 2's values: off must be said.
        keys.number(name, key, config.positive(key)?.unwrap_or(0.0));
    }
    if let Some(kinds) = config.strs("layer_types")? {
        let mut slide = Vec::with_capacity(kinds.len());
        for kind in kinds {
            slide.push(match kind {
                "sliding_attention" => true,
                "full_attention" => false,
                other => {
                    let what = format!("attention of kind \"{}\"", other.escape_debug());
                    let instead = "known are sliding_attention and full_attention";
                    return Err(config.unsupported("layer_types", what, instead));
                }
            });
        }
        let value = Value::Array(Array::Bool(slide));
        keys.put("attention.sliding_window_pattern", "layer_types", value);
    } else if let Some(period) = config.u64("sliding_window_pattern")? {
        keys.count("attention.sliding_window_pattern", "sliding_window_pattern", period);
    }
    // GGUF has no key for the scale that its readers heed: it follows from the size class.
    let key = "query_pre_attn_scalar";
    let scalar = config.required_positive(key)?;
    let large = matches!(d.layers, 46 | 62);
    let derived = if large { d.hidden / d.heads } else { d.head_dim };
    if scalar != derived as f64 {
        let why = format!("is {scalar}, this architecture has {derived} for this size of model");
        return Err(config.error(key, Defect::BadValue, why));
    }
    Ok(())
}

impl Family {
    /// The name in GGUF of a layer's module.
    pub(super) fn gguf_name(&self, module: &str) -> Option<&'static str> {
        self.names.iter().copied().flatten().find(|(own, _)| *own == module).map(|(_, gguf)| *gguf)
    }

    /// The refusal of a tensor that has no place.
    pub(super) fn unknown(&self, config: &Json, tensor: &str) -> Error {
        Error::Unsupported {
            path: config.path().parent().unwrap_or(config.path()).to_owned(),
            at: format!("tensor {}", tensor.escape_debug()),
            what: format!("a tensor that {} models do not have", self.model_type),
            instead: "leaving it out would change the answer, so the model is refused".to_owned(),
        }
    }
}
