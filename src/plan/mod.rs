//! The decode plan: what one token costs, in order. The only description of a layer.
//!
//! ```text
//! arch ── PlanBuilder ──▶ DecodePlan (plain) ── fuse ──▶ DecodePlan (fused)
//!                              │
//!          reference (CPU) ◀───┼───▶ eager, capture (one issue loop)
//! ```

mod builder;
pub mod fuse;
mod listing;
pub mod program;
mod workspace;

pub use builder::PlanBuilder;
pub use workspace::{BufferSpec, Placement, WorkspaceLayout};

use crate::ops::{Buf, CacheRef, KvType, Op, Traffic};
use crate::quant::{QuantFormat, RowOrder};

/// One op and where it stands in the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Printed in listings, errors and debug output, for example `L03.attn.norm`.
    pub label: String,
    /// Layer, where there is one.
    pub layer: Option<u32>,
    /// What to do.
    pub op: Op,
}

/// Where a weight comes from and what it is on the device.
#[derive(Clone, Debug, PartialEq)]
pub enum WeightSpec {
    /// A tensor of the checkpoint, laid into tiles.
    Matrix {
        /// Tensor name.
        name: String,
        /// Weight format.
        format: QuantFormat,
        /// Rows.
        rows: u32,
        /// Columns.
        columns: u32,
        /// Order of the rows on the device.
        order: RowOrder,
    },
    /// A tensor of the checkpoint, converted to f32.
    Vector {
        /// Tensor name.
        name: String,
        /// Elements.
        len: u32,
    },
    /// Values that the architecture computed (RoPE frequencies).
    Computed {
        /// For listings.
        name: String,
        /// The values.
        values: Vec<f32>,
    },
}

impl WeightSpec {
    /// Tensor name, or the name of the computed values.
    pub fn name(&self) -> &str {
        match self {
            Self::Matrix { name, .. } | Self::Vector { name, .. } | Self::Computed { name, .. } => {
                name
            }
        }
    }
}

/// The caches of all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSpec {
    /// Layers.
    pub layers: u32,
    /// Key/value heads.
    pub kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Positions.
    pub capacity: u32,
    /// Element type.
    pub kind: KvType,
}

impl CacheSpec {
    /// Elements of one layer's keys (or values).
    pub fn layer_elements(&self) -> u64 {
        u64::from(self.kv_heads) * u64::from(self.capacity) * u64::from(self.head_dim)
    }

    /// Bytes of all keys and values.
    pub fn bytes(&self) -> u64 {
        2 * u64::from(self.layers) * self.layer_elements() * self.kind.bytes()
    }

    /// One layer's part.
    pub fn layer(&self, layer: u32) -> CacheRef {
        CacheRef {
            layer,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            capacity: self.capacity,
            kind: self.kind,
        }
    }
}

/// Every op that one decoded token needs, in launch order, and all memory that they touch.
#[derive(Clone, Debug, PartialEq)]
pub struct DecodePlan {
    /// Model, for listings.
    pub model: String,
    /// The steps, first to last.
    pub steps: Vec<Step>,
    /// Workspace buffers, indexed by [`Buf`].
    pub buffers: Vec<BufferSpec>,
    /// Weights, indexed by [`crate::ops::WeightId`].
    pub weights: Vec<WeightSpec>,
    /// Key/value caches.
    pub cache: CacheSpec,
    /// Token ids are below this.
    pub vocab: u32,
    /// The buffer that holds the logits after a step.
    pub logits: Buf,
}

impl DecodePlan {
    /// Where every buffer lies, with reuse by lifetime.
    pub fn workspace(&self) -> WorkspaceLayout {
        WorkspaceLayout::of(self)
    }

    /// Bytes moved when the token at `position` is computed.
    pub fn traffic(&self, position: u32) -> Traffic {
        self.steps.iter().map(|s| s.op.describe().traffic(position)).sum()
    }
}
