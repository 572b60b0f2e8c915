//! Architectures: a configuration and how it records its layers. No kernels, no device.

mod config;
mod llama;
mod weights;

pub use config::{Architecture, ModelConfig, RopeConfig};
pub(crate) use weights::read_vector;
pub use weights::{
    CheckedMatrix, CheckedVector, LayerRole, Projection, ValidatedLayerWeights,
    ValidatedModelWeights,
};

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::ops::KvType;
use crate::plan::DecodePlan;

/// Architectures that are served, by the name in `general.architecture`.
pub const SUPPORTED: [&str; 2] = ["llama", "qwen2"];

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
    llama::record(checkpoint, &config, options)
}
