//! How the architectures differ from each other: the row that each one's file holds.

use super::keys::Keys;
use super::{ModelConfig, gemma2, gemma3, llama, phi3, qwen2, qwen3, qwen3moe};
use crate::error::Result;
use crate::ops::{Activation, Pairing};

/// Whether the models of an architecture have something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Has {
    Never,
    Sometimes,
    Always,
}

/// What an architecture's models have in common, as departures from [`PLAIN`].
pub(super) struct Family {
    /// Name in `general.architecture`, prefix of the architecture's keys.
    pub(super) name: &'static str,
    /// Which elements of a head rotate together.
    pub(super) pairing: Pairing,
    /// Query, key and value projections must have biases (any projection may).
    pub(super) qkv_bias: bool,
    /// Every query and key head is normalised before it rotates.
    pub(super) head_norms: bool,
    /// What attention and feed-forward add to the residual stream is normalised first.
    pub(super) post_norms: bool,
    /// Query, key and value stand in one tensor, gate and up in another, gate first.
    pub(super) fused: bool,
    /// Of the feed-forward block.
    pub(super) activation: Activation,
    /// Whether experts stand in the place of the feed-forward blocks.
    pub(super) experts: Has,
    /// `adapt` reads the soft caps; elsewhere they are refused.
    pub(super) softcaps: bool,
    /// `adapt` reads the sliding window; elsewhere it is ignored, with a warning.
    pub(super) windows: bool,
    /// Reads the keys that are the architecture's own.
    pub(super) adapt: fn(&Keys<'_>, &mut ModelConfig) -> Result<()>,
}

/// Llama's decoder: norm before each block, gated feed-forward with SiLU.
pub(super) const PLAIN: Family = Family {
    name: "",
    pairing: Pairing::Halves,
    qkv_bias: false,
    head_norms: false,
    post_norms: false,
    fused: false,
    activation: Activation::Silu,
    experts: Has::Never,
    softcaps: false,
    windows: false,
    adapt: |_, _| Ok(()),
};

/// An architecture that is served: how its keys and tensors are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Architecture {
    /// Llama 2 and 3, Mistral, TinyLlama, SmolLM: adjacent rotation pairs.
    Llama,
    /// Qwen2 and Qwen2.5: halves rotate together, biases on query, key and value.
    Qwen2,
    /// Qwen3: norms of the query and key heads.
    Qwen3,
    /// Gemma 2: soft caps, norms after the blocks too, every other layer local.
    Gemma2,
    /// Gemma 3: norms of the heads, five of six layers local and rotated on a base of their own.
    Gemma3,
    /// Phi-3, Phi-3.5 and Phi-4: fused projections, part of a head rotates, LongRoPE.
    Phi3,
    /// Qwen3 with experts.
    Qwen3Moe,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Llama,
        Self::Qwen2,
        Self::Qwen3,
        Self::Gemma2,
        Self::Gemma3,
        Self::Phi3,
        Self::Qwen3Moe,
    ];

    pub(super) const fn family(self) -> &'static Family {
        match self {
            Self::Llama => &llama::FAMILY,
            Self::Qwen2 => &qwen2::FAMILY,
            Self::Qwen3 => &qwen3::FAMILY,
            Self::Gemma2 => &gemma2::FAMILY,
            Self::Gemma3 => &gemma3::FAMILY,
            Self::Phi3 => &phi3::FAMILY,
            Self::Qwen3Moe => &qwen3moe::FAMILY,
        }
    }

    /// Name in `general.architecture`.
    pub const fn name(self) -> &'static str {
        self.family().name
    }
}

/// Architectures that are served, by the name in `general.architecture`.
pub const SUPPORTED: [&str; Architecture::ALL.len()] = {
    let mut names = [""; Architecture::ALL.len()];
    let mut i = 0;
    while i < names.len() {
        names[i] = Architecture::ALL[i].name();
        i += 1;
    }
    names
};
