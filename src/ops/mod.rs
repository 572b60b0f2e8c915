//! The op vocabulary: one op a file, each holding what it means, its launch geometry, the bytes
//! it moves and its CPU reference.
//!
//! [`Op`] is closed and [`Describe`] has no default bodies: an op without a reference, a byte
//! count or a launch does not compile. The plain ops come first; a fused op ([`fused`]) holds the
//! plain ops that it replaces, and its reference calls theirs.

mod add;
mod argmax;
mod attention;
mod embed;
mod expert_gate_up;
mod expert_matvec;
mod expert_sum;
pub mod fused;
pub mod gemv;
mod glu;
mod host;
mod kv_append;
mod launch;
mod matvec;
mod product;
mod rms_norm;
mod rope;
mod sample;
mod softcap;
mod summary;
mod top_k;

pub use add::Add;
pub use argmax::Argmax;
pub use attention::Attention;
pub use embed::Embed;
pub use expert_gate_up::ExpertGateUp;
pub use expert_matvec::ExpertMatVec;
pub use expert_sum::ExpertSum;
pub use glu::{Activation, Glu};
pub use host::{HostMemory, HostState, HostWeight};
pub use kv_append::KvAppend;
pub use launch::{Arg, Gpu, Launch};
pub use matvec::MatVec;
pub use rms_norm::RmsNorm;
pub use rope::{Pairing, Rope};
pub use sample::{Sample, Sampling};
pub use softcap::Softcap;
pub use summary::Summary;
pub use top_k::TopK;

use crate::quant::{QuantFormat, RowOrder};

/// A workspace buffer, by index into the plan's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Buf(pub u32);

/// A weight, by index into the plan's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WeightId(pub u32);

/// A weight matrix `[rows, columns]` as an op sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Matrix {
    /// Entry of the plan's weight table.
    pub id: WeightId,
    /// Weight format.
    pub format: QuantFormat,
    /// Length of the product.
    pub rows: u32,
    /// Length of the vector that it multiplies.
    pub columns: u32,
    /// Order of the rows on the device.
    pub order: RowOrder,
}

impl Matrix {
    /// Bytes of the matrix.
    pub fn bytes(&self) -> u64 {
        let row = self.format.row_bytes(self.columns as usize).unwrap_or(0);
        row as u64 * u64::from(self.rows)
    }
}

/// A weight vector `[len]` f32 (norm gain, bias, RoPE frequencies).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Vector {
    /// Entry of the plan's weight table.
    pub id: WeightId,
    /// Elements.
    pub len: u32,
}

/// One layer's key and value cache, `[kv_heads, capacity, head_dim]` each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheRef {
    /// Layer.
    pub layer: u32,
    /// Key/value heads.
    pub kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Positions.
    pub capacity: u32,
    /// Element type.
    pub kind: KvType,
}

/// Element type of the key/value cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvType {
    /// 16-bit IEEE float.
    F16,
    /// 32-bit IEEE float.
    F32,
}

impl KvType {
    /// Bytes of an element.
    pub fn bytes(self) -> u64 {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// Name in kernel names and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }
}

/// Bytes that an op must move for one token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Weights: read once from device memory.
    pub weights: u64,
    /// Key/value cache, read and written.
    pub kv: u64,
    /// Workspace: normally served by the L2 cache.
    pub activations: u64,
}

impl Traffic {
    /// Weights and cache: what must cross device memory.
    pub fn dram(&self) -> u64 {
        self.weights + self.kv
    }
}

impl std::ops::Add for Traffic {
    type Output = Self;
    fn add(self, o: Self) -> Self {
        Self {
            weights: self.weights + o.weights,
            kv: self.kv + o.kv,
            activations: self.activations + o.activations,
        }
    }
}

impl std::iter::Sum for Traffic {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::default(), |a, b| a + b)
    }
}

/// What every op answers.
pub trait Describe {
    /// Short name, as printed in listings; the first part of its kernel's name.
    fn name(&self) -> &'static str;
    /// Shapes in words, for listings and debug output, for example `[4096] → [14336]`.
    fn shape(&self) -> String;
    /// Workspace buffers that it reads.
    fn reads(&self) -> Vec<Buf>;
    /// Workspace buffers that it writes.
    fn writes(&self) -> Vec<Buf>;
    /// Weights that it reads.
    fn weights(&self) -> Vec<WeightId>;
    /// Bytes moved when the token at `position` is computed.
    fn traffic(&self, position: u32) -> Traffic;
    /// The launch that performs it on `gpu`.
    fn launch(&self, gpu: &Gpu) -> Launch;
    /// The op in plain Rust: the text that defines what the kernel must compute.
    fn reference(&self, mem: &mut HostMemory);
}

/// Every op a plan can hold. Closed on purpose: fusion matches on it exhaustively.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// See [`Embed`].
    Embed(Embed),
    /// See [`RmsNorm`].
    RmsNorm(RmsNorm),
    /// See [`MatVec`].
    MatVec(MatVec),
    /// See [`Rope`].
    Rope(Rope),
    /// See [`KvAppend`].
    KvAppend(KvAppend),
    /// See [`Attention`].
    Attention(Attention),
    /// See [`Add`].
    Add(Add),
    /// See [`Glu`].
    Glu(Glu),
    /// See [`Softcap`].
    Softcap(Softcap),
    /// See [`TopK`].
    TopK(TopK),
    /// See [`ExpertMatVec`].
    ExpertMatVec(ExpertMatVec),
    /// See [`ExpertSum`].
    ExpertSum(ExpertSum),
    /// See [`Argmax`].
    Argmax(Argmax),
    /// See [`Sample`].
    Sample(Sample),
    /// See [`fused::Qkv`].
    Qkv(Box<fused::Qkv>),
    /// See [`ExpertGateUp`].
    ExpertGateUp(Box<ExpertGateUp>),
    /// See [`fused::NormQkv`].
    NormQkv(Box<fused::NormQkv>),
    /// See [`fused::HeadRope`].
    HeadRope(Box<fused::HeadRope>),
    /// See [`fused::NormAdd`].
    NormAdd(fused::NormAdd),
    /// See [`fused::Project`].
    Project(fused::Project),
    /// See [`fused::GateUp`].
    GateUp(fused::GateUp),
    /// See [`fused::LmHead`].
    LmHead(fused::LmHead),
}

impl Op {
    /// The op's answers, whichever op it is.
    pub fn describe(&self) -> &dyn Describe {
        match self {
            Self::Embed(op) => op,
            Self::RmsNorm(op) => op,
            Self::MatVec(op) => op,
            Self::Rope(op) => op,
            Self::KvAppend(op) => op,
            Self::Attention(op) => op,
            Self::Add(op) => op,
            Self::Glu(op) => op,
            Self::Softcap(op) => op,
            Self::TopK(op) => op,
            Self::ExpertMatVec(op) => op,
            Self::ExpertSum(op) => op,
            Self::Argmax(op) => op,
            Self::Sample(op) => op,
            Self::Qkv(op) => op.as_ref(),
            Self::ExpertGateUp(op) => op.as_ref(),
            Self::NormQkv(op) => op.as_ref(),
            Self::HeadRope(op) => op.as_ref(),
            Self::NormAdd(op) => op,
            Self::Project(op) => op,
            Self::GateUp(op) => op,
            Self::LmHead(op) => op,
        }
    }

    /// The plain ops that a fused op replaces; itself for a plain one.
    pub fn parts(&self) -> Vec<&dyn Describe> {
        match self {
            Self::Qkv(op) => op.parts().to_vec(),
            Self::ExpertGateUp(op) => op.parts().to_vec(),
            Self::NormQkv(op) => op.parts().to_vec(),
            Self::HeadRope(op) => op.parts().to_vec(),
            Self::NormAdd(op) => vec![&op.norm, &op.add],
            Self::Project(op) => vec![&op.mat, &op.add],
            Self::GateUp(op) => op.parts().to_vec(),
            Self::LmHead(op) => op.parts().to_vec(),
            Self::Embed(_)
            | Self::RmsNorm(_)
            | Self::MatVec(_)
            | Self::Rope(_)
            | Self::KvAppend(_)
            | Self::Attention(_)
            | Self::Add(_)
            | Self::Glu(_)
            | Self::Softcap(_)
            | Self::TopK(_)
            | Self::ExpertMatVec(_)
            | Self::ExpertSum(_)
            | Self::Argmax(_)
            | Self::Sample(_) => vec![self.describe()],
        }
    }

    /// Every buffer that the op or its reference touches, those inside a fusion included.
    pub fn buffers(&self) -> Vec<Buf> {
        let mut all: Vec<Buf> =
            self.parts().iter().flat_map(|p| p.reads().into_iter().chain(p.writes())).collect();
        all.sort_unstable();
        all.dedup();
        all
    }
}
