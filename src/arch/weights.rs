//! The tensors of a model, checked once: presence, type, shape and size.

use super::{Experts, ModelConfig, RopeScaling};
use crate::checkpoint::{Checkpoint, TensorInfo};
use crate::error::{Defect, Error, Result};
use crate::quant::QuantFormat;
use std::collections::HashSet;

/// A matrix of the checkpoint that has been checked: a tensor, or rows of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedMatrix {
    name: String,
    first_row: u32,
    format: QuantFormat,
    rows: u32,
    columns: u32,
}

impl CheckedMatrix {
    /// Tensor name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Row of the tensor at which the matrix begins.
    pub fn first_row(&self) -> u32 {
        self.first_row
    }

    /// Weight format.
    pub fn format(&self) -> QuantFormat {
        self.format
    }

    /// Rows: the length of the product.
    pub fn rows(&self) -> u32 {
        self.rows
    }

    /// Columns: the length of the vector that it multiplies.
    pub fn columns(&self) -> u32 {
        self.columns
    }
}

/// A vector of the checkpoint that has been checked: a tensor, or a part of one; of any format,
/// converted to f32 exactly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedVector {
    name: String,
    first: u32,
    len: u32,
}

impl CheckedVector {
    /// Tensor name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Element of the tensor at which the vector begins.
    pub fn first(&self) -> u32 {
        self.first
    }

    /// Elements.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether it has no elements: never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// A projection: a matrix and, where the file has one, its bias.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Projection {
    /// `[rows, columns]`.
    pub weight: CheckedMatrix,
    /// `[rows]`.
    pub bias: Option<CheckedVector>,
}

impl Projection {
    /// Rows `from..from + rows`.
    fn part(&self, from: u32, rows: u32) -> Self {
        let weight = CheckedMatrix { first_row: from, rows, ..self.weight.clone() };
        let bias = self.bias.clone().map(|b| CheckedVector { first: from, len: rows, ..b });
        Self { weight, bias }
    }
}

/// The matrices of a layer's feed-forward block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FeedForward {
    /// One block.
    Dense {
        /// Gate, `[ffn, hidden]`.
        gate: Projection,
        /// The gated part, `[ffn, hidden]`.
        up: Projection,
        /// Back to the residual stream, `[hidden, ffn]`.
        down: Projection,
    },
    /// One block an expert.
    Experts {
        /// How many, and their size.
        size: Experts,
        /// Chooses, `[experts, hidden]`.
        router: Projection,
        /// Gates, `[experts · ffn, hidden]`, expert after expert.
        gate: CheckedMatrix,
        /// The gated parts, `[experts · ffn, hidden]`.
        up: CheckedMatrix,
        /// Back to the residual stream, `[experts · hidden, ffn]`.
        down: CheckedMatrix,
    },
}

/// The weights of one layer. The only way to one is [`validate`](Self::validate): whoever holds
/// it need not check again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidatedLayerWeights {
    attn_norm: CheckedVector,
    qkv: [Projection; 3],
    head_norms: Option<[CheckedVector; 2]>,
    output: Projection,
    post_attn_norm: Option<CheckedVector>,
    ffn_norm: CheckedVector,
    feed_forward: FeedForward,
    post_ffn_norm: Option<CheckedVector>,
}

impl ValidatedLayerWeights {
    /// Checks the tensors of `layer`: every one that the configuration asks for is there, with
    /// its type, shape and size, and none that it does not know.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidModel`] with [`Defect::MissingTensor`] or [`Defect::ShapeMismatch`] naming
    /// the tensor; [`Error::Unsupported`] for a tensor of the layer that would be ignored.
    pub fn validate(checkpoint: &Checkpoint, config: &ModelConfig, layer: u32) -> Result<Self> {
        let family = config.architecture.family();
        let hidden = config.hidden;
        let mut own = Layer { checkpoint, prefix: format!("blk.{layer}."), known: HashSet::new() };
        let weights = Self {
            attn_norm: own.vector("attn_norm.weight", hidden)?,
            qkv: own.qkv(config)?,
            head_norms: match family.head_norms {
                true => Some([
                    own.vector("attn_q_norm.weight", config.head_dim)?,
                    own.vector("attn_k_norm.weight", config.head_dim)?,
                ]),
                false => None,
            },
            output: own.projection("attn_output", hidden, config.q_rows())?,
            post_attn_norm: own.when(family.post_norms, "post_attention_norm.weight", hidden)?,
            ffn_norm: own.vector("ffn_norm.weight", hidden)?,
            feed_forward: own.feed_forward(config)?,
            post_ffn_norm: own.when(family.post_norms, "post_ffw_norm.weight", hidden)?,
        };
        own.refuse_others()?;
        Ok(weights)
    }

    /// Gain of the norm before attention, `[hidden]`.
    pub fn attn_norm(&self) -> &CheckedVector {
        &self.attn_norm
    }

    /// Query, key and value: `[q_rows, hidden]`, `[kv_rows, hidden]` twice.
    pub fn qkv(&self) -> &[Projection; 3] {
        &self.qkv
    }

    /// Gains of the norms of each query and key head, `[head_dim]` each.
    pub fn head_norms(&self) -> Option<&[CheckedVector; 2]> {
        self.head_norms.as_ref()
    }

    /// Attention back to the residual stream, `[hidden, q_rows]`.
    pub fn output(&self) -> &Projection {
        &self.output
    }

    /// Gain of the norm of what attention adds to the residual stream, `[hidden]`.
    pub fn post_attn_norm(&self) -> Option<&CheckedVector> {
        self.post_attn_norm.as_ref()
    }

    /// Gain of the norm before the feed-forward block, `[hidden]`.
    pub fn ffn_norm(&self) -> &CheckedVector {
        &self.ffn_norm
    }

    /// Matrices of the feed-forward block.
    pub fn feed_forward(&self) -> &FeedForward {
        &self.feed_forward
    }

    /// Gain of the norm of what the feed-forward block adds to the residual stream, `[hidden]`.
    pub fn post_ffn_norm(&self) -> Option<&CheckedVector> {
        self.post_ffn_norm.as_ref()
    }
}

/// The tensors of one layer, and which of them have been asked for.
struct Layer<'a> {
    checkpoint: &'a Checkpoint,
    prefix: String,
    known: HashSet<String>,
}

impl Layer<'_> {
    fn name(&self, part: &str) -> String {
        format!("{}{part}", self.prefix)
    }

    fn has(&self, part: &str) -> bool {
        self.checkpoint.tensor(&self.name(part)).is_some()
    }

    fn vector(&mut self, part: &str, len: u32) -> Result<CheckedVector> {
        let v = vector(self.checkpoint, &self.name(part), len)?;
        self.known.insert(v.name.clone());
        Ok(v)
    }

    fn when(&mut self, there: bool, part: &str, len: u32) -> Result<Option<CheckedVector>> {
        there.then(|| self.vector(part, len)).transpose()
    }

    /// `<part>.weight` and, where it is there, `<part>.bias`.
    fn projection(&mut self, part: &str, rows: u32, columns: u32) -> Result<Projection> {
        let name = self.name(&format!("{part}.weight"));
        let weight = matrix(self.checkpoint, &name, rows, columns)?;
        self.known.insert(name);
        let bias = format!("{part}.bias");
        let bias = self.when(self.has(&bias), &bias, rows)?;
        Ok(Projection { weight, bias })
    }

    /// Query, key and value, from one tensor where there is `attn_qkv`.
    fn qkv(&mut self, config: &ModelConfig) -> Result<[Projection; 3]> {
        let family = config.architecture.family();
        let (hidden, q_rows, kv_rows) = (config.hidden, config.q_rows(), config.kv_rows());
        let parts = [("attn_q", q_rows), ("attn_k", kv_rows), ("attn_v", kv_rows)];
        let mut qkv = if family.fused || self.has("attn_qkv.weight") {
            let all = self.projection("attn_qkv", q_rows + 2 * kv_rows, hidden)?;
            let (k, v) = (q_rows, q_rows + kv_rows);
            [all.part(0, q_rows), all.part(k, kv_rows), all.part(v, kv_rows)]
        } else {
            let [q, k, v] = parts.map(|(part, rows)| self.projection(part, rows, hidden));
            [q?, k?, v?]
        };
        // Biases may stand apart also where the matrices do not.
        for (projection, (part, rows)) in qkv.iter_mut().zip(parts) {
            let bias = format!("{part}.bias");
            let missing = family.qkv_bias && projection.bias.is_none();
            if missing || projection.bias.is_none() && self.has(&bias) {
                projection.bias = Some(self.vector(&bias, rows)?);
            }
        }
        Ok(qkv)
    }

    fn feed_forward(&mut self, config: &ModelConfig) -> Result<FeedForward> {
        let (hidden, ffn) = (config.hidden, config.ffn);
        if let Some(size @ Experts { count, ffn, .. }) = config.experts {
            return Ok(FeedForward::Experts {
                size,
                router: self.projection("ffn_gate_inp", count, hidden)?,
                gate: self.experts("ffn_gate_exps.weight", count, ffn, hidden)?,
                up: self.experts("ffn_up_exps.weight", count, ffn, hidden)?,
                down: self.experts("ffn_down_exps.weight", count, hidden, ffn)?,
            });
        }
        let [gate, up] = if config.architecture.family().fused {
            // One matrix, gate first.
            let both = self.projection("ffn_up", 2 * ffn, hidden)?;
            [both.part(0, ffn), both.part(ffn, ffn)]
        } else {
            [self.projection("ffn_gate", ffn, hidden)?, self.projection("ffn_up", ffn, hidden)?]
        };
        Ok(FeedForward::Dense { gate, up, down: self.projection("ffn_down", hidden, ffn)? })
    }

    /// The matrices `[rows, columns]` of all experts as one.
    fn experts(
        &mut self,
        part: &str,
        count: u32,
        rows: u32,
        columns: u32,
    ) -> Result<CheckedMatrix> {
        let name = self.name(part);
        let format = with_shape(self.checkpoint, &name, &[columns, rows, count])?.format;
        self.known.insert(name.clone());
        Ok(CheckedMatrix { name, first_row: 0, format, rows: rows * count, columns })
    }

    /// A tensor of the layer that nobody asked for would be left out of the answer.
    fn refuse_others(&self) -> Result<()> {
        let mut own = self.checkpoint.tensors().iter().filter(|t| t.name.starts_with(&self.prefix));
        match own.find(|t| !self.known.contains(&t.name)) {
            Some(extra) => Err(unknown(self.checkpoint, &extra.name)),
            None => Ok(()),
        }
    }
}

/// The weights outside the layers, checked in the same way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidatedModelWeights {
    embedding: CheckedMatrix,
    final_norm: CheckedVector,
    head: Projection,
    rope_divisors: RopeDivisors,
}

/// Divisors of the rotary frequencies, `[rotary / 2]` each, where the file has some.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RopeDivisors {
    /// At any length of the context: `rope_freqs.weight`.
    pub(super) any: Option<CheckedVector>,
    /// Up to the original length, and beyond it.
    pub(super) by_length: Option<[CheckedVector; 2]>,
}

impl ValidatedModelWeights {
    /// Checks the tensors outside the layers, and that no layer is beyond the configured ones.
    ///
    /// # Errors
    ///
    /// As [`ValidatedLayerWeights::validate`].
    pub fn validate(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Self> {
        let (vocab, hidden) = (config.vocab, config.hidden);
        let embedding = matrix(checkpoint, "token_embd.weight", vocab, hidden)?;
        let final_norm = vector(checkpoint, "output_norm.weight", hidden)?;
        let optional = |name: &str, len| {
            checkpoint.tensor(name).map(|_| vector(checkpoint, name, len)).transpose()
        };
        let weight = match checkpoint.tensor("output.weight") {
            Some(_) => matrix(checkpoint, "output.weight", vocab, hidden)?,
            None => embedding.clone(),
        };
        let head = Projection { weight, bias: optional("output.bias", vocab)? };
        let half = config.rope.rotary / 2;
        let lengths = ["rope_factors_short.weight", "rope_factors_long.weight"];
        // Each needs the other; LongRoPE needs both.
        let long = config.rope.scaling == RopeScaling::Long
            || lengths.iter().any(|name| checkpoint.tensor(name).is_some());
        let by_length = match long {
            true => {
                Some([vector(checkpoint, lengths[0], half)?, vector(checkpoint, lengths[1], half)?])
            }
            false => None,
        };
        let rope_divisors = RopeDivisors { any: optional("rope_freqs.weight", half)?, by_length };
        for t in checkpoint.tensors() {
            match t.name.strip_prefix("blk.") {
                Some(rest) if !in_layers(rest, config.layers) => {
                    return Err(unknown(checkpoint, &t.name));
                }
                Some(_) => {}
                None => {
                    let known = [
                        "token_embd.weight",
                        "output_norm.weight",
                        "output.weight",
                        "output.bias",
                        "rope_freqs.weight",
                        lengths[0],
                        lengths[1],
                    ];
                    if !known.contains(&t.name.as_str()) {
                        let path = checkpoint.path().display();
                        log::warn!("{path}: tensor {} is not used", t.name);
                    }
                }
            }
        }
        Ok(Self { embedding, final_norm, head, rope_divisors })
    }

    /// Token embeddings, `[vocab, hidden]`.
    pub fn embedding(&self) -> &CheckedMatrix {
        &self.embedding
    }

    /// Gain of the norm before the output head, `[hidden]`.
    pub fn final_norm(&self) -> &CheckedVector {
        &self.final_norm
    }

    /// Output head, `[vocab, hidden]`; the embeddings where it is tied to them.
    pub fn head(&self) -> &Projection {
        &self.head
    }

    pub(super) fn rope_divisors(&self) -> &RopeDivisors {
        &self.rope_divisors
    }
}

/// Whether `rest` of `blk.<rest>` is `<layer>.<part>`, written as this crate writes it, with a
/// layer below `layers`.
fn in_layers(rest: &str, layers: u32) -> bool {
    let Some((layer, _)) = rest.split_once('.') else { return false };
    layer.parse::<u32>().is_ok_and(|n| n < layers && n.to_string() == layer)
}

fn unknown(checkpoint: &Checkpoint, name: &str) -> Error {
    Error::Unsupported {
        path: checkpoint.path().to_owned(),
        at: format!("tensor {name}"),
        what: "a tensor that this architecture's layers do not use".to_owned(),
        instead: "leaving it out would change the answer, so the model is refused".to_owned(),
    }
}

/// The tensor `name`, with dimensions `want` (innermost first; outer ones of 1 do not matter).
fn with_shape<'a>(checkpoint: &'a Checkpoint, name: &str, want: &[u32]) -> Result<&'a TensorInfo> {
    let info = checkpoint.tensor(name).ok_or_else(|| {
        let why = format!("the file does not have this tensor, expected {want:?}");
        Error::invalid(checkpoint.path(), name, None, Defect::MissingTensor, why)
    })?;
    let mismatch = |why| Error::invalid(checkpoint.path(), name, None, Defect::ShapeMismatch, why);
    let (given, outer) = info.shape.split_at(want.len().min(info.shape.len()));
    let same = given.len() == want.len()
        && given.iter().zip(want).all(|(g, w)| *g == u64::from(*w))
        && outer.iter().all(|n| *n == 1);
    if !same {
        return Err(mismatch(format!("is {:?}, expected {want:?}", info.shape)));
    }
    let columns = want.first().copied().unwrap_or(0) as usize;
    let rows: u64 = want.iter().skip(1).map(|n| u64::from(*n)).product();
    let bytes = info.format.row_bytes(columns).and_then(|b| (b as u64).checked_mul(rows));
    match bytes {
        Some(bytes) if bytes == info.bytes => Ok(info),
        Some(bytes) => Err(mismatch(format!("is {} bytes, expected {bytes}", info.bytes))),
        None => Err(mismatch(format!(
            "rows of {columns} are no whole number of {} blocks",
            info.format
        ))),
    }
}

fn matrix(checkpoint: &Checkpoint, name: &str, rows: u32, columns: u32) -> Result<CheckedMatrix> {
    let info = with_shape(checkpoint, name, &[columns, rows])?;
    let (name, format) = (name.to_owned(), info.format);
    Ok(CheckedMatrix { name, first_row: 0, format, rows, columns })
}

fn vector(checkpoint: &Checkpoint, name: &str, len: u32) -> Result<CheckedVector> {
    with_shape(checkpoint, name, &[len])?;
    Ok(CheckedVector { name: name.to_owned(), first: 0, len })
}

/// A vector of the checkpoint as f32, whatever its format.
///
/// # Errors
///
/// Those of [`Checkpoint::read`].
pub(crate) fn read_vector(checkpoint: &Checkpoint, name: &str) -> Result<Vec<f32>> {
    let unchecked = || Error::Internal(format!("tensor {name} was not validated"));
    let info = checkpoint.tensor(name).ok_or_else(unchecked)?;
    let bytes = checkpoint.read_all(info)?;
    let columns = usize::try_from(info.columns()).map_err(|_| unchecked())?;
    let mut out = vec![0.0; columns];
    info.format.decode_row(&bytes, &mut out);
    Ok(out)
}
