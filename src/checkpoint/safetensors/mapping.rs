//! From stored tensors and `config.json` to the names, shapes, order and keys that GGUF has.

use super::super::metadata::{Metadata, Value};
use super::super::unserved;
use super::families::{self, Family};
use super::json::Json;
use super::{Content, DataFile, Made, Stored, TensorInfo, rope};
use crate::error::{Defect, Error, Result};
use crate::quant::QuantFormat;
use std::collections::BTreeMap;
use std::path::Path;

/// Most experts of a layer.
const EXPERT_CAP: u64 = 4096;

/// Numbers of the configuration that the mapping itself needs.
pub(super) struct Dimensions {
    pub(super) layers: u64,
    pub(super) hidden: u64,
    pub(super) heads: u64,
    pub(super) kv_heads: u64,
    pub(super) head_dim: u64,
    pub(super) context: u64,
}

/// The keys of the model under construction.
pub(super) struct Keys<'a> {
    family: &'a Family,
    metadata: Metadata,
}

impl Keys<'_> {
    /// Puts the architecture's key `rest`, which comes from `origin`.
    pub(super) fn put(&mut self, rest: &str, origin: &'static str, value: Value) {
        self.metadata.derive(format!("{}.{rest}", self.family.architecture), origin, value);
    }

    pub(super) fn count(&mut self, rest: &str, origin: &'static str, n: u64) {
        self.put(rest, origin, u32::try_from(n).map_or(Value::U64(n), Value::U32));
    }

    pub(super) fn number(&mut self, rest: &str, origin: &'static str, x: f64) {
        self.put(rest, origin, Value::F32(x as f32));
    }

    pub(super) fn text(&mut self, rest: &str, origin: &'static str, text: &str) {
        self.put(rest, origin, Value::String(text.as_bytes().to_vec()));
    }
}

/// Maps a model.
///
/// # Errors
/// Those of the configuration; [`Error::Unsupported`] naming a tensor that has no place or is of
/// a type that is not served; [`Error::InvalidModel`] naming one that is missing.
pub(super) fn map(
    folder: &Path,
    config: &Json,
    files: Vec<DataFile>,
    stored: Vec<Stored>,
) -> Result<Made> {
    let family = families::of(config)?;
    let d = dimensions(config)?;
    let mut keys = Keys { family, metadata: Metadata::new(config.path()) };
    let made = common_keys(folder, config, &d, &mut keys)?;

    let tied = config.bool("tie_word_embeddings")?.unwrap_or(family.tied);
    let mut out =
        Mapping { config, family, d: &d, tied, tensors: Vec::new(), contents: Vec::new() };
    let mut experts = BTreeMap::new();
    for t in &stored {
        match out.target(&t.name)? {
            Target::Unused => {}
            Target::Tensor(name) => out.tensor(name, t, &files)?,
            Target::Expert(name, number) => {
                let of: &mut BTreeMap<u64, &Stored> = experts.entry(name).or_default();
                of.insert(number, t);
            }
        }
    }
    for (name, of) in experts {
        out.experts(name, &of, &files)?;
    }
    for (name, values) in made {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let shape = vec![values.len() as u64];
        out.add(name.to_owned(), QuantFormat::F32, shape, bytes.len() as u64, Content::Made(bytes));
    }
    out.complete()?;
    let (tensors, contents) = (out.tensors, out.contents);
    Ok(Made { metadata: keys.metadata, tensors, files, contents })
}

fn dimensions(config: &Json) -> Result<Dimensions> {
    let count = |key: &str| match config.required_u64(key)? {
        0 => Err(config.error(key, Defect::BadValue, "is 0")),
        n => Ok(n),
    };
    let (hidden, heads) = (count("hidden_size")?, count("num_attention_heads")?);
    let kv_heads = match config.u64("num_key_value_heads")? {
        Some(0) => return Err(config.error("num_key_value_heads", Defect::BadValue, "is 0")),
        Some(n) => n,
        None => heads,
    };
    let head_dim = match config.u64("head_dim")? {
        Some(n) => n,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let why = format!("{heads} heads do not divide hidden_size {hidden}, without head_dim");
            return Err(config.error("num_attention_heads", Defect::BadValue, why));
        }
    };
    let context = count("max_position_embeddings")?;
    Ok(Dimensions {
        layers: count("num_hidden_layers")?,
        hidden,
        heads,
        kv_heads,
        head_dim,
        context,
    })
}

/// The keys that every family has; gives the tensors that stand in no file.
fn common_keys(
    folder: &Path,
    config: &Json,
    d: &Dimensions,
    keys: &mut Keys<'_>,
) -> Result<Vec<(&'static str, Vec<f32>)>> {
    let architecture = Value::String(keys.family.architecture.as_bytes().to_vec());
    keys.metadata.derive("general.architecture".to_owned(), "model_type", architecture);
    if let Some(name) = folder.file_name() {
        let name = Value::String(name.to_string_lossy().into_owned().into_bytes());
        keys.metadata.push("general.name".to_owned(), None, name);
    }
    for (rest, origin, n) in [
        ("block_count", "num_hidden_layers", d.layers),
        ("context_length", "max_position_embeddings", d.context),
        ("embedding_length", "hidden_size", d.hidden),
        ("attention.head_count", "num_attention_heads", d.heads),
        ("attention.head_count_kv", "num_key_value_heads", d.kv_heads),
        ("attention.key_length", "head_dim", d.head_dim),
        ("attention.value_length", "head_dim", d.head_dim),
    ] {
        keys.count(rest, origin, n);
    }
    for (rest, origin) in
        [("feed_forward_length", "intermediate_size"), ("vocab_size", "vocab_size")]
    {
        keys.count(rest, origin, config.required_u64(origin)?);
    }
    let eps = config.required_f64("rms_norm_eps")?;
    keys.number("attention.layer_norm_rms_epsilon", "rms_norm_eps", eps);
    (keys.family.keys)(config, d, keys)?;
    rope::map(config, d, keys)
}

/// Where a stored tensor goes.
enum Target {
    /// Nowhere: it follows from something else.
    Unused,
    /// To the tensor of this name.
    Tensor(String),
    /// Into the tensor of this name, as this expert's.
    Expert(String, u64),
}

/// The tensors of the model under construction.
struct Mapping<'a> {
    config: &'a Json,
    family: &'a Family,
    d: &'a Dimensions,
    tied: bool,
    tensors: Vec<TensorInfo>,
    contents: Vec<Content>,
}

impl Mapping<'_> {
    fn target(&self, name: &str) -> Result<Target> {
        let tensor = |name: &str| Ok(Target::Tensor(name.to_owned()));
        match name {
            "model.embed_tokens.weight" => return tensor("token_embd.weight"),
            "model.norm.weight" => return tensor("output_norm.weight"),
            // A copy of the embeddings, or what training left behind.
            "lm_head.weight" if self.tied => return Ok(Target::Unused),
            "lm_head.weight" => return tensor("output.weight"),
            "lm_head.bias" => return tensor("output.bias"),
            _ => {}
        }
        self.of_layer(name).ok_or_else(|| self.family.unknown(self.config, name))
    }

    /// `model.layers.<layer>.<module>.<weight or bias>`.
    fn of_layer(&self, name: &str) -> Option<Target> {
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let layer = number(layer).filter(|layer| *layer < self.d.layers)?;
        // Old checkpoints keep the frequencies, which follow from the configuration.
        if rest == "self_attn.rotary_emb.inv_freq" {
            return Some(Target::Unused);
        }
        let (module, kind) = rest.rsplit_once('.')?;
        if !matches!(kind, "weight" | "bias") {
            return None;
        }
        if let Some(experts) = &self.family.experts
            && let Some(rest) = module.strip_prefix(experts.prefix)
        {
            let (expert, matrix) = rest.split_once('.')?;
            let (_, gguf) = experts.names.iter().find(|(own, _)| *own == matrix)?;
            return Some(Target::Expert(format!("blk.{layer}.{gguf}.{kind}"), number(expert)?));
        }
        let gguf = self.family.gguf_name(module)?;
        Some(Target::Tensor(format!("blk.{layer}.{gguf}.{kind}")))
    }

    fn add(
        &mut self,
        name: String,
        format: QuantFormat,
        shape: Vec<u64>,
        bytes: u64,
        content: Content,
    ) {
        self.tensors.push(TensorInfo { name, format, shape, bytes, index: self.tensors.len() });
        self.contents.push(content);
    }

    /// Format of `t`, and its shape with the innermost dimension first.
    fn checked(&self, t: &Stored, files: &[DataFile]) -> Result<(QuantFormat, Vec<u64>)> {
        let path = files[t.span.file].path();
        let format = t.format().ok_or_else(|| unserved(path, &t.name, &t.dtype.to_string()))?;
        if !(1..=4).contains(&t.shape.len()) || t.shape.contains(&0) {
            let why = format!("is {:?}; a weight has 1 to 4 dimensions, none of them 0", t.shape);
            let at = format!("tensor {}", t.name);
            return Err(Error::invalid(path, at, None, Defect::BadShape, why));
        }
        Ok((format, t.shape.iter().rev().copied().collect()))
    }

    fn tensor(&mut self, name: String, t: &Stored, files: &[DataFile]) -> Result<()> {
        let (format, shape) = self.checked(t, files)?;
        let span = t.span;
        let heads = if name.contains(".attn_q.") {
            Some(self.d.heads)
        } else if name.contains(".attn_k.") {
            Some(self.d.kv_heads)
        } else {
            None
        };
        if let Some(heads) = heads.filter(|_| self.family.interleaved) {
            let rows = t.shape[0];
            if !rows.is_multiple_of(heads) || !(rows / heads).is_multiple_of(2) {
                let why = format!("has {rows} rows, expected {heads} heads of an even number");
                let (path, at) = (files[span.file].path(), format!("tensor {}", t.name));
                return Err(Error::invalid(path, at, None, Defect::ShapeMismatch, why));
            }
            let (row_bytes, head_rows) = (t.bytes / rows, rows / heads);
            let content = Content::Interleaved { span, row_bytes, head_rows };
            self.add(name, format, shape, t.bytes, content);
        } else if self.family.norms_plus_one && name.ends_with("norm.weight") {
            let elements: u64 = t.shape.iter().product();
            let content = Content::PlusOne { span, format };
            self.add(name, QuantFormat::F32, shape, elements.saturating_mul(4), content);
        } else {
            self.add(name, format, shape, t.bytes, Content::Whole(span));
        }
        Ok(())
    }

    /// Stacks the matrices of all experts.
    fn experts(
        &mut self,
        name: String,
        of: &BTreeMap<u64, &Stored>,
        files: &[DataFile],
    ) -> Result<()> {
        let (key, count) = families::expert_count(self.config)?;
        if !(1..=EXPERT_CAP).contains(&count) {
            let why = format!("is {count}, expected 1 to {EXPERT_CAP}");
            return Err(self.config.error(key, Defect::BadValue, why));
        }
        let absent = |why| self.missing(&name, why);
        if let Some(beyond) = of.keys().find(|n| **n >= count) {
            return Err(absent(format!("has an expert {beyond}, {key} is {count}")));
        }
        let Some(first) = of.get(&0) else { return Err(absent("lacks expert 0".to_owned())) };
        let (format, mut shape) = self.checked(first, files)?;
        let mut parts = Vec::with_capacity(count as usize);
        for number in 0..count {
            let t = of.get(&number).ok_or_else(|| absent(format!("lacks expert {number}")))?;
            if (t.dtype, &t.shape) != (first.dtype, &first.shape) {
                let (path, at) = (files[t.span.file].path(), format!("tensor {}", t.name));
                let why = format!(
                    "is {:?} of {}, expert 0 has {:?} of {}",
                    t.shape, t.dtype, first.shape, first.dtype
                );
                return Err(Error::invalid(path, at, None, Defect::ShapeMismatch, why));
            }
            parts.push(t.span);
        }
        shape.push(count);
        let bytes = first.bytes.saturating_mul(count);
        let content = Content::Stack { parts, part_bytes: first.bytes };
        self.add(name, format, shape, bytes, content);
        Ok(())
    }

    /// That what only the configuration promises is there.
    fn complete(&self) -> Result<()> {
        let has = |name: &str| self.tensors.iter().any(|t| t.name == name);
        if !self.tied && !has("output.weight") {
            let why = "the files do not have it, and tie_word_embeddings is false".to_owned();
            return Err(self.missing("lm_head.weight", why));
        }
        for (key, names) in [
            ("attention_bias", &["attn_q", "attn_k", "attn_v", "attn_output"][..]),
            ("mlp_bias", &["ffn_gate", "ffn_up", "ffn_down"]),
        ] {
            // Of models with other projections the architecture says what it needs.
            if self.config.bool(key)? != Some(true)
                || self.family.gguf_name("self_attn.q_proj").is_none()
            {
                continue;
            }
            for layer in 0..self.d.layers {
                let absent =
                    names.iter().map(|n| format!("blk.{layer}.{n}.bias")).find(|n| !has(n));
                if let Some(name) = absent {
                    return Err(self.missing(&name, format!("{key} is true, and it is not there")));
                }
            }
        }
        Ok(())
    }

    fn missing(&self, tensor: &str, why: String) -> Error {
        let path = self.config.path().parent().unwrap_or(self.config.path());
        Error::invalid(path, format!("tensor {tensor}"), None, Defect::MissingTensor, why)
    }
}

/// A number as it is written, without a sign or leading zeros.
fn number(text: &str) -> Option<u64> {
    text.parse().ok().filter(|n: &u64| n.to_string() == text)
}
