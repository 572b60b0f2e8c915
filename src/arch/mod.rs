//! Architectures: a configuration and how it records its layers. No kernels, no device.
//!
//! `family` is the table: a row an architecture, from a file of its own. `config` and `rope` read
//! the keys, `weights` checks the tensors, `decoder` records the layers of all of them.

mod config;
mod decoder;
mod family;
mod gemma2;
mod gemma3;
mod keys;
mod llama;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3moe;
mod rope;
mod weights;

pub use config::{Experts, LocalLayers, ModelConfig};
pub use family::{Architecture, SUPPORTED};
pub use rope::{RopeConfig, RopeScaling};
pub(crate) use weights::read_vector;
pub use weights::{
    CheckedMatrix, CheckedVector, FeedForward, Projection, ValidatedLayerWeights,
    ValidatedModelWeights,
};

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::ops::KvType;
use crate::plan::DecodePlan;

/// What a plan is made for, beside the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanOptions {
    /// Positions of the key/value cache.
    pub capacity: u32,
    /// Element type of the key/value cache.
    pub kv: KvType,
}

/// Records the plain plan of a model: one token, all layers.
///
/// # Errors
///
/// [`crate::error::Error::Unsupported`] for an architecture or feature that is not served, and
/// [`crate::error::Error::InvalidModel`] naming the key or tensor that is wrong.
pub fn record(checkpoint: &Checkpoint, options: PlanOptions) -> Result<DecodePlan> {
    let config = ModelConfig::read(checkpoint)?;
    decoder::record(checkpoint, &config, options)
}
