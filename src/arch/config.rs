//! What a model's keys say, checked once: every number that the recording of a layer uses.

use crate::checkpoint::{Array, Checkpoint, Metadata, Value};
use crate::error::{Defect, Error, Result};
use crate::ops::Pairing;
use std::path::Path;

/// Layers, at most.
const MAX_LAYERS: u64 = 512;
/// Elements of the residual stream, at most.
const MAX_HIDDEN: u64 = 1 << 17;
/// Elements of the feed-forward block, at most.
const MAX_FFN: u64 = 1 << 20;
/// Query heads, at most.
const MAX_HEADS: u64 = 1024;
/// Elements of a head, at most.
const MAX_HEAD_DIM: u64 = 256;
/// Token ids, at most.
const MAX_VOCAB: u64 = 1 << 22;
/// Positions, at most.
const MAX_CONTEXT: u64 = 1 << 24;

/// An architecture that is served: how its keys and tensors are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Architecture {
    /// Llama 2 and 3, Mistral, TinyLlama, SmolLM: adjacent rotation pairs.
    Llama,
    /// Qwen2 and Qwen2.5: halves rotate together, biases on query, key and value.
    Qwen2,
}

impl Architecture {
    const ALL: [Self; 2] = [Self::Llama, Self::Qwen2];

    /// Name in `general.architecture`, prefix of the architecture's keys.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
        }
    }

    /// Which elements of a head rotate together.
    pub fn pairing(self) -> Pairing {
        match self {
            Self::Llama => Pairing::Adjacent,
            Self::Qwen2 => Pairing::Halves,
        }
    }

    /// Whether query, key and value projections must have biases.
    pub(super) fn needs_qkv_bias(self) -> bool {
        match self {
            Self::Llama => false,
            Self::Qwen2 => true,
        }
    }
}

/// Rotary position embedding, as the keys describe it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub base: f32,
    /// Elements of a head that rotate, even.
    pub rotary: u32,
    /// Factor on every angle: 1, or the reciprocal of the linear scaling factor.
    pub scale: f32,
    /// Which elements of a head rotate together.
    pub pairing: Pairing,
}

/// A model's dimensions and constants, all within the limits of this crate.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `general.name`, or the architecture where there is none.
    pub name: String,
    /// How the tensors are to be read.
    pub architecture: Architecture,
    /// Layers.
    pub layers: u32,
    /// Elements of the residual stream.
    pub hidden: u32,
    /// Query heads.
    pub heads: u32,
    /// Key/value heads; divides `heads`.
    pub kv_heads: u32,
    /// Elements of a head, even; `heads · head_dim` need not be `hidden`.
    pub head_dim: u32,
    /// Elements of the feed-forward block.
    pub ffn: u32,
    /// Token ids are below this.
    pub vocab: u32,
    /// Positions that the model was made for.
    pub context: u32,
    /// Added to the mean square in every norm.
    pub eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
}

/// The keys of one architecture.
struct Keys<'a> {
    path: &'a Path,
    metadata: &'a Metadata,
    prefix: &'static str,
}

impl Keys<'_> {
    fn key(&self, rest: &str) -> String {
        format!("{}.{rest}", self.prefix)
    }

    fn bad(&self, key: &str, why: String) -> Error {
        self.metadata.error(key, Defect::BadValue, why)
    }

    fn unsupported(&self, key: &str, what: impl Into<String>, instead: &str) -> Error {
        Error::Unsupported {
            path: self.path.to_owned(),
            at: key.to_owned(),
            what: what.into(),
            instead: instead.to_owned(),
        }
    }

    /// `value` as u32, within `1..=max`.
    fn within(&self, key: &str, value: u64, max: u64) -> Result<u32> {
        u32::try_from(value)
            .ok()
            .filter(|v| (1..=max).contains(&u64::from(*v)))
            .ok_or_else(|| self.bad(key, format!("is {value}, expected 1 to {max}")))
    }

    fn count(&self, rest: &str, max: u64) -> Result<u32> {
        let key = self.key(rest);
        self.within(&key, self.metadata.required_u64(&key)?, max)
    }

    /// A count that may be given per layer; it must be the same for all of them.
    fn uniform(&self, rest: &str, layers: u32, max: u64) -> Result<Option<u32>> {
        let key = self.key(rest);
        let Some(all) = self.metadata.u64_per_layer_key(&key, layers as usize)? else {
            return Ok(None);
        };
        let first = all.first().copied().unwrap_or(0);
        // Each is checked, so that a zero in the middle is a bad value and not a mixture.
        for value in &all {
            self.within(&key, *value, max)?;
        }
        if all.iter().any(|v| *v != first) {
            let what = "a count that differs from layer to layer";
            return Err(self.unsupported(&key, what, "use a model with equal layers"));
        }
        self.within(&key, first, max).map(Some)
    }

    fn required_uniform(&self, rest: &str, layers: u32, max: u64) -> Result<u32> {
        let value = self.uniform(rest, layers, max)?;
        value.ok_or_else(|| self.metadata.missing(&self.key(rest)))
    }

    /// A finite number above zero.
    fn positive(&self, rest: &str) -> Result<Option<f32>> {
        let key = self.key(rest);
        match self.metadata.f32_key(&key)? {
            Some(v) if !(v.is_finite() && v > 0.0) => {
                Err(self.bad(&key, format!("is {v}, expected a finite number above 0")))
            }
            value => Ok(value),
        }
    }

    /// Refuses a number that would change the answer and is not computed.
    fn must_be_off(&self, rest: &str) -> Result<()> {
        let key = self.key(rest);
        match self.metadata.f32_key(&key)? {
            Some(v) if v != 0.0 => {
                Err(self.unsupported(&key, format!("the value {v}"), "use a model without it"))
            }
            _ => Ok(()),
        }
    }
}

impl ModelConfig {
    /// Reads and checks the keys of a checkpoint.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for an architecture or feature that is not served (with the list of
    /// what is), [`Error::InvalidModel`] naming the key that is absent, of another type or out of
    /// bounds.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self> {
        let (path, metadata) = (checkpoint.path(), checkpoint.metadata());
        let architecture = architecture(checkpoint)?;
        let keys = Keys { path, metadata, prefix: architecture.name() };
        refuse_features(&keys)?;

        let layers = keys.count("block_count", MAX_LAYERS)?;
        let hidden = keys.count("embedding_length", MAX_HIDDEN)?;
        let context = keys.count("context_length", MAX_CONTEXT)?;
        let ffn = keys.required_uniform("feed_forward_length", layers, MAX_FFN)?;
        let heads = keys.required_uniform("attention.head_count", layers, MAX_HEADS)?;
        let kv_heads = keys.uniform("attention.head_count_kv", layers, MAX_HEADS)?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            let why = format!("{kv_heads} key/value heads do not divide {heads} heads");
            return Err(keys.bad(&keys.key("attention.head_count_kv"), why));
        }
        let head_dim = head_dim(&keys, hidden, heads)?;
        let rope = rope(&keys, architecture, head_dim)?;
        let eps_key = "attention.layer_norm_rms_epsilon";
        let eps = keys.positive(eps_key)?.ok_or_else(|| metadata.missing(&keys.key(eps_key)))?;
        let vocab = vocab(&keys)?;
        let name = metadata.str_key("general.name")?.unwrap_or(architecture.name()).to_owned();
        Ok(Self {
            name,
            architecture,
            layers,
            hidden,
            heads,
            kv_heads,
            head_dim,
            ffn,
            vocab,
            context,
            eps,
            rope,
        })
    }

    /// Rows of the query projection: `heads · head_dim`.
    pub fn q_rows(&self) -> u32 {
        self.heads * self.head_dim
    }

    /// Rows of the key (and the value) projection: `kv_heads · head_dim`.
    pub fn kv_rows(&self) -> u32 {
        self.kv_heads * self.head_dim
    }
}

fn architecture(checkpoint: &Checkpoint) -> Result<Architecture> {
    let name = checkpoint.architecture()?;
    Architecture::ALL.into_iter().find(|a| a.name() == name).ok_or_else(|| Error::Unsupported {
        path: checkpoint.path().to_owned(),
        at: "general.architecture".to_owned(),
        what: format!("architecture \"{name}\""),
        instead: format!("supported are {}", super::SUPPORTED.join(", ")),
    })
}

/// Features that change the answer and are not computed.
fn refuse_features(keys: &Keys<'_>) -> Result<()> {
    let experts = keys.key("expert_count");
    if keys.metadata.u64_key(&experts)?.is_some_and(|n| n > 0) {
        return Err(keys.unsupported(&experts, "mixture of experts", "use a dense model"));
    }
    keys.must_be_off("attn_logit_softcapping")?;
    keys.must_be_off("final_logit_softcapping")?;
    keys.must_be_off("attention.temperature_scale")?;
    if keys.metadata.contains(&keys.key("attention.sliding_window")) {
        // As other engines do for these architectures.
        log::warn!("{}: attention.sliding_window is ignored", keys.path.display());
    }
    Ok(())
}

fn head_dim(keys: &Keys<'_>, hidden: u32, heads: u32) -> Result<u32> {
    let (key, value_key) = (keys.key("attention.key_length"), keys.key("attention.value_length"));
    let explicit = keys.metadata.u64_key(&key)?;
    let (at, head_dim) = match explicit {
        Some(n) => (key, n),
        None if !hidden.is_multiple_of(heads) => {
            let why = format!(
                "{heads} heads do not divide embedding_length {hidden}, and {key} is absent"
            );
            return Err(keys.bad(&keys.key("attention.head_count"), why));
        }
        None => (keys.key("attention.head_count"), u64::from(hidden / heads)),
    };
    if head_dim == 0 || head_dim > MAX_HEAD_DIM || !head_dim.is_multiple_of(2) {
        let why = format!(
            "makes heads of {head_dim} elements, expected an even number, 2 to {MAX_HEAD_DIM}"
        );
        return Err(keys.bad(&at, why));
    }
    match keys.metadata.u64_key(&value_key)? {
        Some(n) if n != head_dim => {
            let what = format!("values of {n} elements with keys of {head_dim}");
            Err(keys.unsupported(&value_key, what, "use a model with equal ones"))
        }
        // At most MAX_HEAD_DIM.
        _ => Ok(head_dim as u32),
    }
}

fn rope(keys: &Keys<'_>, architecture: Architecture, head_dim: u32) -> Result<RopeConfig> {
    let key = keys.key("rope.dimension_count");
    let rotary = keys.metadata.u64_key(&key)?.unwrap_or(u64::from(head_dim));
    let whole = rotary == u64::from(head_dim);
    if rotary == 0 || rotary > u64::from(head_dim) || !rotary.is_multiple_of(2) {
        let why = format!("is {rotary}, expected an even number up to the head's {head_dim}");
        return Err(keys.bad(&key, why));
    }
    if architecture == Architecture::Llama && !whole {
        return Err(
            keys.bad(&key, format!("is {rotary}, for llama it must be the head's {head_dim}"))
        );
    }
    let base = keys.positive("rope.freq_base")?.unwrap_or(10_000.0);
    Ok(RopeConfig {
        base,
        rotary: rotary as u32,
        scale: rope_scale(keys)?,
        pairing: architecture.pairing(),
    })
}

/// Factor on the angles of linear scaling; other kinds of scaling are refused.
fn rope_scale(keys: &Keys<'_>) -> Result<f32> {
    let key = keys.key("rope.scaling.type");
    match keys.metadata.str_key(&key)? {
        Some("none") => return Ok(1.0),
        None | Some("linear") => {}
        Some(kind) => {
            let what = format!("rope scaling \"{kind}\"");
            return Err(keys.unsupported(&key, what, "supported are none, linear and rope_freqs"));
        }
    }
    for rest in ["rope.scaling.factor", "rope.scale_linear"] {
        let key = keys.key(rest);
        match keys.metadata.f32_key(&key)? {
            // Zero is how writers say that there is none.
            None | Some(0.0) => {}
            Some(f) if f.is_finite() && f > 0.0 => return Ok(1.0 / f),
            Some(f) => return Err(keys.bad(&key, format!("is {f}, expected a number above 0"))),
        }
    }
    Ok(1.0)
}

/// Token ids: the key, or the number of token texts.
fn vocab(keys: &Keys<'_>) -> Result<u32> {
    let (key, list) = (keys.key("vocab_size"), "tokenizer.ggml.tokens");
    let texts = match keys.metadata.entry(list).map(|e| e.value) {
        Some(Value::Array(Array::String(texts))) => Some(texts.len() as u64),
        // A timing run needs no token texts; whoever reads them says what is wrong.
        _ => None,
    };
    match (keys.metadata.u64_key(&key)?, texts) {
        (Some(n), Some(texts)) if texts > n => {
            let why = format!("{texts} token texts for a vocabulary of {n}");
            Err(keys.metadata.error(list, Defect::BadVocab, why))
        }
        (Some(n), _) => keys.within(&key, n, MAX_VOCAB),
        (None, Some(n)) => keys.within(list, n, MAX_VOCAB),
        (None, None) => Err(keys.metadata.missing(&key)),
    }
}
