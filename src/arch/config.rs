//! What a model's keys say, checked once: every number that the recording of a layer uses.

use super::family::Has;
use super::keys::Keys;
use super::{Architecture, RopeConfig, SUPPORTED};
use crate::checkpoint::{Array, Checkpoint, Value};
use crate::error::{Defect, Error, Result};
use crate::ops::TopK;

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
/// Experts of a layer, at most, and those chosen for a token.
const MAX_EXPERTS: [u64; 2] = [TopK::MOST_EXPERTS as u64, TopK::MOST_USED as u64];
/// Token ids, at most.
const MAX_VOCAB: u64 = 1 << 22;
/// Positions, at most.
const MAX_CONTEXT: u64 = 1 << 24;

/// Layers that see only the last positions.
#[derive(Clone, Debug, PartialEq)]
pub struct LocalLayers {
    /// Positions that a token of theirs sees, its own included.
    pub window: u32,
    /// Which layers, `[layers]`.
    pub layers: Vec<bool>,
    /// Their rotation.
    pub rope: RopeConfig,
}

/// Feed-forward blocks of which each token uses a few.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    /// Experts of a layer.
    pub count: u32,
    /// Experts that a token uses.
    pub used: u32,
    /// Elements of an expert's feed-forward block.
    pub ffn: u32,
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
    /// Factor on the embeddings.
    pub embed_scale: f32,
    /// Factor on the attention scores.
    pub attention_scale: f32,
    /// Bound of the attention scores, where they are capped.
    pub attention_softcap: Option<f32>,
    /// Bound of the logits, where they are capped.
    pub logit_softcap: Option<f32>,
    /// Layers that see only the last positions, where there are some.
    pub local: Option<LocalLayers>,
    /// Experts in the place of the feed-forward blocks, where there are some.
    pub experts: Option<Experts>,
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
        let family = architecture.family();
        let keys = Keys { path, metadata, prefix: family.name };
        refuse_features(&keys, architecture)?;

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
        let rope = RopeConfig::read(&keys, family.pairing, head_dim, context)?;
        let eps_key = "attention.layer_norm_rms_epsilon";
        let eps = keys.positive(eps_key)?.ok_or_else(|| metadata.missing(&keys.key(eps_key)))?;
        let vocab = vocab(&keys)?;
        let name = metadata.str_key("general.name")?.unwrap_or(architecture.name()).to_owned();
        let mut config = Self {
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
            embed_scale: 1.0,
            attention_scale: per_root(head_dim),
            attention_softcap: None,
            logit_softcap: None,
            local: None,
            experts: experts(&keys, architecture, ffn)?,
        };
        (family.adapt)(&keys, &mut config)?;
        Ok(config)
    }

    /// Rows of the query projection: `heads · head_dim`.
    pub fn q_rows(&self) -> u32 {
        self.heads * self.head_dim
    }

    /// Rows of the key (and the value) projection: `kv_heads · head_dim`.
    pub fn kv_rows(&self) -> u32 {
        self.kv_heads * self.head_dim
    }

    /// What is special about a layer that sees only the last positions.
    pub fn local(&self, layer: u32) -> Option<&LocalLayers> {
        self.local.as_ref().filter(|l| l.layers.get(layer as usize) == Some(&true))
    }

    /// Reads which layers are local: `attention.sliding_window` positions (`window` where the key
    /// is absent) are seen in all layers but every `period`-th, or in those that
    /// `attention.sliding_window_pattern` names.
    pub(super) fn read_local(
        &mut self,
        keys: &Keys<'_>,
        window: Option<u32>,
        period: u64,
        rope: RopeConfig,
    ) -> Result<()> {
        let rest = "attention.sliding_window";
        let window = match keys.metadata.contains(&keys.key(rest)) {
            true => keys.optional_count(rest, u64::from(u32::MAX))?,
            false => window,
        };
        let key = keys.key("attention.sliding_window_pattern");
        let layers = match keys.metadata.entry(&key).map(|e| e.value) {
            Some(Value::Array(_)) => {
                let each = keys.metadata.bool_array_key(&key)?.unwrap_or_default();
                if each.len() != self.layers as usize {
                    let why = format!("has {} elements for {} layers", each.len(), self.layers);
                    return Err(keys.metadata.error(&key, Defect::BadArray, why));
                }
                each.to_vec()
            }
            _ => {
                let period = keys.metadata.u64_key(&key)?.unwrap_or(period);
                // A period of 0: every layer.
                let local = |layer| period == 0 || layer % period < period - 1;
                (0..u64::from(self.layers)).map(local).collect()
            }
        };
        self.local = window.map(|window| LocalLayers { window, layers, rope });
        Ok(())
    }
}

/// `1 / √n`, rounded once.
pub(super) fn per_root(n: u32) -> f32 {
    (1.0 / f64::from(n).sqrt()) as f32
}

fn architecture(checkpoint: &Checkpoint) -> Result<Architecture> {
    let name = checkpoint.architecture()?;
    Architecture::ALL.into_iter().find(|a| a.name() == name).ok_or_else(|| Error::Unsupported {
        path: checkpoint.path().to_owned(),
        at: "general.architecture".to_owned(),
        what: format!("architecture \"{name}\""),
        instead: format!("supported are {}", SUPPORTED.join(", ")),
    })
}

/// Features that change the answer and are not computed for this architecture.
fn refuse_features(keys: &Keys<'_>, architecture: Architecture) -> Result<()> {
    let family = architecture.family();
    if !family.softcaps {
        keys.must_be_off("attn_logit_softcapping")?;
        keys.must_be_off("final_logit_softcapping")?;
    }
    keys.must_be_off("attention.temperature_scale")?;
    if !family.windows && keys.metadata.contains(&keys.key("attention.sliding_window")) {
        // As other engines do for these architectures.
        log::warn!("{}: attention.sliding_window is ignored", keys.path.display());
    }
    Ok(())
}

fn experts(keys: &Keys<'_>, architecture: Architecture, ffn: u32) -> Result<Option<Experts>> {
    let [most, most_used] = MAX_EXPERTS;
    let (key, wanted) = (keys.key("expert_count"), architecture.family().experts);
    let count = match keys.optional_count("expert_count", most)? {
        None if wanted == Has::Always => return Err(keys.metadata.missing(&key)),
        None => return Ok(None),
        Some(_) if wanted == Has::Never => {
            return Err(keys.unsupported(&key, "mixture of experts", "use a dense model"));
        }
        Some(n) => n,
    };
    let used = keys.count("expert_used_count", most_used.min(count.into()))?;
    let ffn = keys.optional_count("expert_feed_forward_length", MAX_FFN)?.unwrap_or(ffn);
    for rest in ["expert_shared_count", "expert_group_count", "leading_dense_block_count"] {
        keys.must_be_off(rest)?;
    }
    // 1: softmax, which is what is computed. The weights of the chosen experts sum up to one.
    let gating = keys.key("expert_gating_func");
    if keys.metadata.u64_key(&gating)?.is_some_and(|g| g > 1) {
        return Err(keys.unsupported(&gating, "this choice of experts", "use one by softmax"));
    }
    if keys.metadata.bool_key(&keys.key("expert_weights_norm"))? == Some(false) {
        let key = keys.key("expert_weights_norm");
        return Err(keys.unsupported(&key, "false", "use a model without the key"));
    }
    match keys.positive_or_off("expert_weights_scale", None)? {
        None | Some(1.0) => Ok(Some(Experts { count, used, ffn })),
        Some(f) => {
            let key = keys.key("expert_weights_scale");
            Err(keys.unsupported(&key, format!("the factor {f}"), "use a model without it"))
        }
    }
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
