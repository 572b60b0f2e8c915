//! The tensors of a model, checked once: presence, type, shape and size.

use super::ModelConfig;
use crate::checkpoint::{Checkpoint, TensorInfo};
use crate::error::{Defect, Error, Result};
use crate::quant::QuantFormat;
use std::collections::HashSet;

/// A matrix of the checkpoint that has been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedMatrix {
    name: String,
    format: QuantFormat,
    rows: u32,
    columns: u32,
}

impl CheckedMatrix {
    /// Tensor name.
    pub fn name(&self) -> &str {
        &self.name
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

/// A vector of the checkpoint that has been checked; of any format, converted to f32 exactly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedVector {
    name: String,
    len: u32,
}

impl CheckedVector {
    /// Tensor name.
    pub fn name(&self) -> &str {
        &self.name
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

/// The matrices of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerRole {
    /// Queries from the residual stream.
    Query,
    /// Keys from the residual stream.
    Key,
    /// Values from the residual stream.
    Value,
    /// Attention back to the residual stream.
    Output,
    /// Gate of the feed-forward block.
    Gate,
    /// The gated part of the feed-forward block.
    Up,
    /// Feed-forward block back to the residual stream.
    Down,
}

impl LayerRole {
    /// All of them, in the order of a layer.
    pub const ALL: [Self; 7] =
        [Self::Query, Self::Key, Self::Value, Self::Output, Self::Gate, Self::Up, Self::Down];

    /// Tensor name without layer and ending.
    pub fn tensor(self) -> &'static str {
        match self {
            Self::Query => "attn_q",
            Self::Key => "attn_k",
            Self::Value => "attn_v",
            Self::Output => "attn_output",
            Self::Gate => "ffn_gate",
            Self::Up => "ffn_up",
            Self::Down => "ffn_down",
        }
    }

    /// `(rows, columns)` that a configuration asks for.
    fn shape(self, c: &ModelConfig) -> (u32, u32) {
        match self {
            Self::Query => (c.q_rows(), c.hidden),
            Self::Key | Self::Value => (c.kv_rows(), c.hidden),
            Self::Output => (c.hidden, c.q_rows()),
            Self::Gate | Self::Up => (c.ffn, c.hidden),
            Self::Down => (c.hidden, c.ffn),
        }
    }

    fn needs_bias(self, c: &ModelConfig) -> bool {
        matches!(self, Self::Query | Self::Key | Self::Value) && c.architecture.needs_qkv_bias()
    }
}

/// The weights of one layer. The only way to one is [`validate`](Self::validate): whoever holds
/// it need not check again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidatedLayerWeights {
    attn_norm: CheckedVector,
    ffn_norm: CheckedVector,
    projections: [Projection; 7],
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
        let name = |part: &str| format!("blk.{layer}.{part}");
        let mut known = HashSet::new();
        let mut norm = |part: &str| {
            let v = vector(checkpoint, &name(part), config.hidden)?;
            known.insert(v.name.clone());
            Ok::<_, Error>(v)
        };
        let attn_norm = norm("attn_norm.weight")?;
        let ffn_norm = norm("ffn_norm.weight")?;
        // Fused projections stand in for the separate ones: better to say so than "missing".
        let fused = name("attn_qkv.weight");
        if checkpoint.tensor(&fused).is_some() {
            return Err(unknown(checkpoint, &fused));
        }
        let mut project = |role: LayerRole| {
            let (rows, columns) = role.shape(config);
            let part = role.tensor();
            let weight = matrix(checkpoint, &name(&format!("{part}.weight")), rows, columns)?;
            let bias = name(&format!("{part}.bias"));
            let bias = (role.needs_bias(config) || checkpoint.tensor(&bias).is_some())
                .then(|| vector(checkpoint, &bias, rows))
                .transpose()?;
            known.insert(weight.name.clone());
            known.extend(bias.iter().map(|b| b.name.clone()));
            Ok::<_, Error>(Projection { weight, bias })
        };
        let [q, k, v, o, gate, up, down] = LayerRole::ALL;
        let projections = [
            project(q)?,
            project(k)?,
            project(v)?,
            project(o)?,
            project(gate)?,
            project(up)?,
            project(down)?,
        ];
        let prefix = name("");
        let mut own = checkpoint.tensors().iter().filter(|t| t.name.starts_with(&prefix));
        match own.find(|t| !known.contains(&t.name)) {
            Some(extra) => Err(unknown(checkpoint, &extra.name)),
            None => Ok(Self { attn_norm, ffn_norm, projections }),
        }
    }

    /// Gain of the norm before attention, `[hidden]`.
    pub fn attn_norm(&self) -> &CheckedVector {
        &self.attn_norm
    }

    /// Gain of the norm before the feed-forward block, `[hidden]`.
    pub fn ffn_norm(&self) -> &CheckedVector {
        &self.ffn_norm
    }

    /// One of the matrices.
    pub fn projection(&self, role: LayerRole) -> &Projection {
        &self.projections[role as usize]
    }
}

/// The weights outside the layers, checked in the same way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidatedModelWeights {
    embedding: CheckedMatrix,
    final_norm: CheckedVector,
    head: Projection,
    rope_factors: Option<CheckedVector>,
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
        let rope_factors = optional("rope_freqs.weight", config.rope.rotary / 2)?;
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
                    ];
                    if !known.contains(&t.name.as_str()) {
                        let path = checkpoint.path().display();
                        log::warn!("{path}: tensor {} is not used", t.name);
                    }
                }
            }
        }
        Ok(Self { embedding, final_norm, head, rope_factors })
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

    /// Divisors of the rotary frequencies, `[rotary / 2]`.
    pub fn rope_factors(&self) -> Option<&CheckedVector> {
        self.rope_factors.as_ref()
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

fn find<'a>(checkpoint: &'a Checkpoint, name: &str) -> Result<&'a TensorInfo> {
    checkpoint.tensor(name).ok_or_else(|| {
        let why = "the file does not have this tensor";
        Error::invalid(checkpoint.path(), name, None, Defect::MissingTensor, why)
    })
}

/// The tensor `name`, with dimensions `want` (innermost first; outer ones of 1 do not matter).
fn with_shape<'a>(checkpoint: &'a Checkpoint, name: &str, want: &[u32]) -> Result<&'a TensorInfo> {
    let info = find(checkpoint, name)?;
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
    Ok(CheckedMatrix { name: name.to_owned(), format: info.format, rows, columns })
}

fn vector(checkpoint: &Checkpoint, name: &str, len: u32) -> Result<CheckedVector> {
    with_shape(checkpoint, name, &[len])?;
    Ok(CheckedVector { name: name.to_owned(), len })
}

/// A vector of the checkpoint as f32, whatever its format.
///
/// # Errors
///
/// Those of [`Checkpoint::read`].
pub(crate) fn read_vector(checkpoint: &Checkpoint, name: &str) -> Result<Vec<f32>> {
    let info = find(checkpoint, name)?;
    let bytes = checkpoint.read_all(info)?;
    let columns = usize::try_from(info.columns())
        .map_err(|_| Error::Internal(format!("tensor {name} was not validated")))?;
    let mut out = vec![0.0; columns];
    info.format.decode_row(&bytes, &mut out);
    Ok(out)
}
