//! The models whose shapes can be had without their weights: a row each, as their published
//! GGUF files have it.

use super::super::gguf;
use super::super::metadata::{Array, Metadata, StringArray, Value};
use super::mix::Mix;
use std::path::Path;

/// A model's shape.
#[derive(Debug)]
pub(super) struct Shape {
    /// Name on the command line.
    pub(super) name: &'static str,
    /// `general.name`.
    title: &'static str,
    architecture: &'static str,
    pub(super) layers: u64,
    hidden: u64,
    pub(super) heads: u64,
    pub(super) kv_heads: u64,
    head_dim: u64,
    ffn: u64,
    vocab: u64,
    context: u64,
    epsilon: f32,
    rope_base: f32,
    /// Factor of the llama3 rope scaling, where there is one.
    rope_factor: Option<f64>,
    /// Whether the embedding makes the logits too.
    tied: bool,
    /// Whether the file says `attention.key_length`.
    key_length: bool,
    /// Tokens that a local layer sees.
    window: Option<u32>,
    /// Context that the divisors of the frequencies stretch (LongRoPE), where there are some.
    original: Option<u64>,
    /// Elements of a head that rotate, where they are not all.
    rotary: Option<u64>,
    /// Experts, those of a token, and elements of each one's feed-forward block.
    experts: Option<(u64, u64, u64)>,
}

impl Shape {
    /// Whether it has the eight experts that the mixtures make an exception for.
    pub(super) fn has_eight_experts(&self) -> bool {
        self.experts.is_some_and(|(count, ..)| count == 8)
    }
}

/// What a tensor is for, as far as its format depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Norm, bias, table or router.
    Vector,
    /// Any other matrix.
    Matrix,
    /// Makes the logits: `output`, or a tied embedding.
    Logits,
    /// Query, key and value in one.
    Fused,
    /// Values of the attention of a layer.
    Value(u64),
    /// Down projection of a layer.
    Down(u64),
}

/// How a tensor's elements are distributed.
#[derive(Debug)]
pub(super) enum Content {
    /// Zero mean, standard deviation `sigma`, in the tensor's format.
    Matrix {
        /// Standard deviation.
        sigma: f32,
    },
    /// f32, uniform.
    Vector {
        /// Mean.
        mean: f32,
        /// Standard deviation.
        sigma: f32,
    },
    /// f32, these values.
    Table(Vec<f32>),
}

/// A tensor of a shape.
pub(super) struct Tensor {
    pub(super) name: String,
    /// `[columns, rows]` or `[elements]`.
    pub(super) shape: Vec<u64>,
    pub(super) role: Role,
    pub(super) content: Content,
}

/// What the rows below share.
const BASE: Shape = Shape {
    name: "",
    title: "",
    architecture: "llama",
    layers: 0,
    hidden: 0,
    heads: 0,
    kv_heads: 0,
    head_dim: 0,
    ffn: 0,
    vocab: 0,
    context: 0,
    epsilon: 1e-5,
    rope_base: 10_000.0,
    rope_factor: None,
    tied: false,
    key_length: false,
    window: None,
    original: None,
    rotary: None,
    experts: None,
};

impl Shape {
    pub(super) const ALL: &[Self] = &[
        Self {
            name: "llama-3.2-1b",
            title: "Llama 3.2 1B",
            layers: 16,
            hidden: 2048,
            heads: 32,
            kv_heads: 8,
            head_dim: 64,
            ffn: 8192,
            vocab: 128_256,
            context: 131_072,
            rope_base: 500_000.0,
            rope_factor: Some(32.0),
            tied: true,
            key_length: true,
            ..BASE
        },
        Self {
            name: "llama-3.1-8b",
            title: "Llama 3.1 8B",
            layers: 32,
            hidden: 4096,
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            ffn: 14_336,
            vocab: 128_256,
            context: 131_072,
            rope_base: 500_000.0,
            rope_factor: Some(8.0),
            ..BASE
        },
        Self {
            name: "llama-2-7b",
            title: "Llama 2 7B",
            layers: 32,
            hidden: 4096,
            heads: 32,
            kv_heads: 32,
            head_dim: 128,
            ffn: 11_008,
            vocab: 32_000,
            context: 4096,
            ..BASE
        },
        Self {
            name: "mixtral-8x7b",
            title: "Mixtral 8x7B",
            layers: 32,
            hidden: 4096,
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            ffn: 14_336,
            vocab: 32_000,
            context: 32_768,
            rope_base: 1e6,
            experts: Some((8, 2, 14_336)),
            ..BASE
        },
        Self {
            name: "qwen2.5-1.5b",
            title: "Qwen2.5 1.5B",
            architecture: "qwen2",
            layers: 28,
            hidden: 1536,
            heads: 12,
            kv_heads: 2,
            head_dim: 128,
            ffn: 8960,
            vocab: 151_936,
            context: 32_768,
            epsilon: 1e-6,
            rope_base: 1e6,
            tied: true,
            ..BASE
        },
        Self {
            name: "qwen3-8b",
            title: "Qwen3 8B",
            architecture: "qwen3",
            layers: 36,
            hidden: 4096,
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            ffn: 12_288,
            vocab: 151_936,
            context: 40_960,
            epsilon: 1e-6,
            rope_base: 1e6,
            key_length: true,
            ..BASE
        },
        Self {
            name: "qwen3-30b-a3b",
            title: "Qwen3 30B A3B",
            architecture: "qwen3moe",
            layers: 48,
            hidden: 2048,
            heads: 32,
            kv_heads: 4,
            head_dim: 128,
            ffn: 6144,
            vocab: 151_936,
            context: 40_960,
            epsilon: 1e-6,
            rope_base: 1e6,
            key_length: true,
            experts: Some((128, 8, 768)),
            ..BASE
        },
        Self {
            name: "gemma-2-2b",
            title: "Gemma 2 2B",
            architecture: "gemma2",
            layers: 26,
            hidden: 2304,
            heads: 8,
            kv_heads: 4,
            head_dim: 256,
            ffn: 9216,
            vocab: 256_000,
            context: 8192,
            epsilon: 1e-6,
            tied: true,
            key_length: true,
            window: Some(4096),
            ..BASE
        },
        Self {
            name: "gemma-3-270m",
            title: "Gemma 3 270M",
            architecture: "gemma3",
            layers: 18,
            hidden: 640,
            heads: 4,
            kv_heads: 1,
            head_dim: 256,
            ffn: 2048,
            vocab: 262_144,
            context: 32_768,
            epsilon: 1e-6,
            rope_base: 1e6,
            tied: true,
            key_length: true,
            window: Some(512),
            ..BASE
        },
        Self {
            name: "phi-4-mini",
            title: "Phi 4 Mini",
            architecture: "phi3",
            layers: 32,
            hidden: 3072,
            heads: 24,
            kv_heads: 8,
            head_dim: 128,
            ffn: 8192,
            vocab: 200_064,
            context: 131_072,
            tied: true,
            window: Some(262_144),
            original: Some(4096),
            rotary: Some(96),
            ..BASE
        },
        Self {
            name: "smollm2-135m",
            title: "SmolLM2 135M",
            layers: 30,
            hidden: 576,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            ffn: 1536,
            vocab: 49_152,
            context: 8192,
            rope_base: 100_000.0,
            tied: true,
            ..BASE
        },
        Self {
            name: "tiny",
            title: "Tiny",
            layers: 2,
            hidden: 256,
            heads: 4,
            kv_heads: 2,
            head_dim: 64,
            ffn: 512,
            vocab: 512,
            context: 512,
            ..BASE
        },
    ];

    /// All tensors, in file order.
    pub(super) fn tensors(&self) -> Vec<Tensor> {
        let mut list = Vec::new();
        let qk_norm = matches!(self.architecture, "qwen3" | "qwen3moe" | "gemma3");
        let post_norms = matches!(self.architecture, "gemma2" | "gemma3");
        let fused = self.architecture == "phi3";
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);

        let embedding = if self.tied { Role::Logits } else { Role::Matrix };
        list.push(matrix("token_embd.weight".to_owned(), self.hidden, self.vocab, embedding));
        if let Some(factor) = self.rope_factor {
            let values = rope_factors(f64::from(self.rope_base), self.head_dim, factor);
            list.push(table("rope_freqs.weight", values));
        }
        if let Some(original) = self.original {
            // Of the published tables only that they are ones, and rise to the ratio of contexts.
            let half = self.rotary() / 2;
            let ratio = self.context as f64 / original as f64;
            let long = |i| ratio.powf(i as f64 / (half - 1) as f64) as f32;
            list.push(table("rope_factors_long.weight", (0..half).map(long).collect()));
            list.push(table("rope_factors_short.weight", vec![1.0; half as usize]));
        }
        for layer in 0..self.layers {
            let name = |part: &str| format!("blk.{layer}.{part}");
            let weight = |part: &str, columns, rows, role| {
                matrix(name(&format!("{part}.weight")), columns, rows, role)
            };
            let norm = |part: &str, size| vector(name(&format!("{part}.weight")), size, 1.0, 0.05);
            list.push(norm("attn_norm", self.hidden));
            if fused {
                list.push(weight("attn_qkv", self.hidden, q + 2 * kv, Role::Fused));
            } else {
                list.push(weight("attn_q", self.hidden, q, Role::Matrix));
                list.push(weight("attn_k", self.hidden, kv, Role::Matrix));
                list.push(weight("attn_v", self.hidden, kv, Role::Value(layer)));
            }
            if self.architecture == "qwen2" {
                list.push(vector(name("attn_q.bias"), q, 0.0, 0.02));
                list.push(vector(name("attn_k.bias"), kv, 0.0, 0.02));
                list.push(vector(name("attn_v.bias"), kv, 0.0, 0.02));
            }
            if qk_norm {
                list.push(norm("attn_q_norm", self.head_dim));
                list.push(norm("attn_k_norm", self.head_dim));
            }
            list.push(weight("attn_output", q, self.hidden, Role::Matrix));
            if post_norms {
                list.push(norm("post_attention_norm", self.hidden));
            }
            list.push(norm("ffn_norm", self.hidden));
            if let Some((count, _, ffn)) = self.experts {
                list.push(router(name("ffn_gate_inp.weight"), self.hidden, count));
                let mut all = |part, columns, rows, role| {
                    let mut t = weight(part, columns, rows, role);
                    t.shape.push(count);
                    list.push(t);
                };
                all("ffn_gate_exps", self.hidden, ffn, Role::Matrix);
                all("ffn_up_exps", self.hidden, ffn, Role::Matrix);
                all("ffn_down_exps", ffn, self.hidden, Role::Down(layer));
            } else if fused {
                list.push(weight("ffn_up", self.hidden, 2 * self.ffn, Role::Matrix));
                list.push(weight("ffn_down", self.ffn, self.hidden, Role::Down(layer)));
            } else {
                list.push(weight("ffn_gate", self.hidden, self.ffn, Role::Matrix));
                list.push(weight("ffn_up", self.hidden, self.ffn, Role::Matrix));
                list.push(weight("ffn_down", self.ffn, self.hidden, Role::Down(layer)));
            }
            if post_norms {
                list.push(norm("post_ffw_norm", self.hidden));
            }
        }
        list.push(vector("output_norm.weight".to_owned(), self.hidden, 1.0, 0.05));
        if !self.tied {
            list.push(matrix("output.weight".to_owned(), self.hidden, self.vocab, Role::Logits));
        }
        list
    }

    /// Elements of a head that rotate.
    fn rotary(&self) -> u64 {
        self.rotary.unwrap_or(self.head_dim)
    }
}

/// Values that are given, in f32.
fn table(name: &str, values: Vec<f32>) -> Tensor {
    let (name, shape) = (name.to_owned(), vec![values.len() as u64]);
    Tensor { name, shape, role: Role::Vector, content: Content::Table(values) }
}

/// The choice of experts is stored in f32, as norms are.
fn router(name: String, columns: u64, rows: u64) -> Tensor {
    let content = Content::Vector { mean: 0.0, sigma: 1.0 / (columns as f32).sqrt() };
    Tensor { name, shape: vec![columns, rows], role: Role::Vector, content }
}

/// Keeps activations of unit variance at unit variance: sigma = 1/√columns. For an embedding this
/// is the size that trained ones have (0.015 to 0.04).
fn matrix(name: String, columns: u64, rows: u64, role: Role) -> Tensor {
    let sigma = 1.0 / (columns as f32).sqrt();
    Tensor { name, shape: vec![columns, rows], role, content: Content::Matrix { sigma } }
}

fn vector(name: String, size: u64, mean: f32, sigma: f32) -> Tensor {
    Tensor { name, shape: vec![size], role: Role::Vector, content: Content::Vector { mean, sigma } }
}

/// Divisors of the rotary frequencies of Llama 3.1 and later, `[head_dim / 2]`:
///
/// ```text
/// λ = 2π · base^(2i/head_dim);  t = (8192/λ − 1)/(4 − 1)
/// 1 where λ < 8192/4,  factor where λ > 8192/1,  else 1/((1 − t)/factor + t)
/// ```
///
/// Source: the `llama3` rope type of the published configurations (low 1, high 4, original 8192).
fn rope_factors(base: f64, head_dim: u64, factor: f64) -> Vec<f32> {
    let (low, high, original) = (1.0, 4.0, 8192.0);
    let one = |i: u64| {
        let wavelength = std::f64::consts::TAU * base.powf(2.0 * i as f64 / head_dim as f64);
        if wavelength < original / high {
            1.0
        } else if wavelength > original / low {
            factor
        } else {
            let t = (original / wavelength - low) / (high - low);
            1.0 / ((1.0 - t) / factor + t)
        }
    };
    (0..head_dim / 2).map(|i| one(i) as f32).collect()
}

/// Keys and values as the model's GGUF file has them, with a vocabulary of bytes and fillers.
pub(super) fn metadata(shape: &Shape, mix: Mix, path: &Path) -> Metadata {
    let mut m = Metadata::new(path);
    let text = |s: &str| Value::String(s.as_bytes().to_vec());
    // Shapes in the table are far below 2^32.
    let int = |n: u64| Value::U32(n as u32);
    let mut put = |key: &str, value| m.push(key.to_owned(), None, value);
    let a = shape.architecture;
    put("general.architecture", text(a));
    put("general.type", text("model"));
    put("general.name", text(&format!("{} (synthetic weights)", shape.title)));
    put("general.file_type", Value::U32(mix.file_type()));
    if !matches!(mix, Mix::F16 | Mix::Bf16) {
        put("general.quantization_version", Value::U32(2));
    }
    put(gguf::ALIGNMENT_KEY, Value::U32(gguf::DEFAULT_ALIGNMENT as u32));
    put(&format!("{a}.block_count"), int(shape.layers));
    put(&format!("{a}.context_length"), int(shape.context));
    put(&format!("{a}.embedding_length"), int(shape.hidden));
    put(&format!("{a}.feed_forward_length"), int(shape.ffn));
    put(&format!("{a}.attention.head_count"), int(shape.heads));
    put(&format!("{a}.attention.head_count_kv"), int(shape.kv_heads));
    put(&format!("{a}.attention.layer_norm_rms_epsilon"), Value::F32(shape.epsilon));
    if shape.key_length {
        put(&format!("{a}.attention.key_length"), int(shape.head_dim));
        put(&format!("{a}.attention.value_length"), int(shape.head_dim));
    }
    if let Some(window) = shape.window {
        put(&format!("{a}.attention.sliding_window"), Value::U32(window));
    }
    put(&format!("{a}.rope.freq_base"), Value::F32(shape.rope_base));
    if a == "llama" || shape.rotary.is_some() {
        put(&format!("{a}.rope.dimension_count"), int(shape.rotary()));
    }
    if let Some(original) = shape.original {
        put(&format!("{a}.rope.scaling.original_context_length"), int(original));
        // Of the published configuration: √(1 + ln(context / original) / ln original).
        let (ratio, log) = (shape.context as f64 / original as f64, (original as f64).ln());
        let factor = (1.0 + ratio.ln() / log).sqrt() as f32;
        put(&format!("{a}.rope.scaling.attn_factor"), Value::F32(factor));
    }
    if let Some((count, used, ffn)) = shape.experts {
        put(&format!("{a}.expert_count"), int(count));
        put(&format!("{a}.expert_used_count"), int(used));
        if ffn != shape.ffn {
            put(&format!("{a}.expert_feed_forward_length"), int(ffn));
        }
    }
    put(&format!("{a}.vocab_size"), int(shape.vocab));

    let (tokens, types) = vocabulary(shape.vocab);
    put("tokenizer.ggml.model", text("gpt2"));
    put("tokenizer.ggml.pre", text("gpt-2"));
    put("tokenizer.ggml.tokens", Value::Array(Array::String(tokens)));
    put("tokenizer.ggml.token_type", Value::Array(Array::I32(types)));
    put("tokenizer.ggml.merges", Value::Array(Array::String(StringArray::default())));
    put("tokenizer.ggml.bos_token_id", Value::U32(BOS));
    put("tokenizer.ggml.eos_token_id", Value::U32(BOS + 1));
    put("tokenizer.ggml.add_bos_token", Value::Bool(true));
    m
}

/// Id of the first token after the 256 bytes.
const BOS: u32 = 256;

/// Token texts and kinds: the 256 bytes in byte-level BPE's spelling, begin and end of text, and
/// fillers, so that any text has ids and any id has text.
fn vocabulary(size: u64) -> (StringArray, Vec<i32>) {
    let (normal, control) = (1, 3);
    let size = size as usize;
    let mut tokens = StringArray::with_capacity(size);
    let mut types = vec![normal; size];
    let mut unprintable = 0;
    for byte in 0..=255u8 {
        // Bytes that are no printable Latin-1 are spelled as the letters from U+0100 on.
        let spelled = match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => u32::from(byte),
            _ => {
                unprintable += 1;
                0xFF + unprintable
            }
        };
        let letter = char::from_u32(spelled).unwrap_or(char::REPLACEMENT_CHARACTER);
        tokens.push(letter.encode_utf8(&mut [0; 4]).as_bytes());
    }
    for special in ["<|bos|>", "<|eos|>"] {
        types[tokens.len()] = control;
        tokens.push(special.as_bytes());
    }
    for id in tokens.len()..size {
        tokens.push(format!("<{id}>").as_bytes());
    }
    (tokens, types)
}
