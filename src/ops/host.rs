//! The host twin of the device memory that a plan touches; read and written by the references.

use super::{Buf, CacheRef, KvType, Matrix, Vector, WeightId, product};
use crate::quant::QuantFormat;
use half::f16;
use rayon::prelude::*;
use std::ops::Range;

/// One weight on the host.
#[derive(Clone, Debug)]
pub enum HostWeight {
    /// A matrix as in the file, `[rows, row_bytes]`.
    Matrix {
        /// Weight format.
        format: QuantFormat,
        /// Columns.
        columns: usize,
        /// The file's bytes.
        bytes: Vec<u8>,
    },
    /// A vector.
    Vector(Vec<f32>),
}

/// The host's `StepState`: what changes from token to token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostState {
    /// Token that is being computed.
    pub token: u32,
    /// Its position.
    pub position: u32,
    /// The token that the last step chose.
    pub next: u32,
    /// Whether every logit of the last step was finite.
    pub finite: bool,
}

/// Everything that a plan reads and writes, on the host. Workspace buffers live in one arena at
/// the very offsets that they have on the device, so that a wrong reuse shows here too.
#[derive(Debug)]
pub struct HostMemory {
    arena: Vec<f32>,
    ranges: Vec<Range<usize>>,
    weights: Vec<HostWeight>,
    caches: Vec<(Vec<f32>, Vec<f32>)>,
    /// Token and position.
    pub state: HostState,
}

impl HostMemory {
    /// Memory of a workspace of `words` f32 with each [`Buf`] at its range of them, with `weights`
    /// in the order of the plan's table and one pair of caches of `cache_len` elements per layer.
    pub fn new(
        words: usize,
        ranges: Vec<Range<usize>>,
        weights: Vec<HostWeight>,
        layers: usize,
        cache_len: usize,
    ) -> Self {
        Self {
            arena: vec![f32::NAN; words],
            ranges,
            weights,
            caches: (0..layers).map(|_| (vec![0.0; cache_len], vec![0.0; cache_len])).collect(),
            state: HostState::default(),
        }
    }

    /// The contents of `buf`.
    pub fn buf(&self, buf: Buf) -> &[f32] {
        &self.arena[self.ranges[buf.0 as usize].clone()]
    }

    /// The contents of `buf`, to write.
    pub fn buf_mut(&mut self, buf: Buf) -> &mut [f32] {
        &mut self.arena[self.ranges[buf.0 as usize].clone()]
    }

    /// The elements of a weight vector.
    pub fn vector(&self, v: Vector) -> &[f32] {
        match &self.weights[v.id.0 as usize] {
            HostWeight::Vector(v) => v,
            HostWeight::Matrix { .. } => &[],
        }
    }

    /// Keys and values of a layer, `[kv_heads, capacity, head_dim]` each.
    pub fn cache(&self, layer: u32) -> (&[f32], &[f32]) {
        let (k, v) = &self.caches[layer as usize];
        (k, v)
    }

    /// Keys and values of a layer, to write.
    pub fn cache_mut(&mut self, layer: u32) -> (&mut [f32], &mut [f32]) {
        let (k, v) = &mut self.caches[layer as usize];
        (k, v)
    }

    /// Row `row` of a matrix, decoded into `out` `[columns]`.
    pub fn row(&self, m: Matrix, row: usize, out: &mut [f32]) {
        let (format, bytes, row_bytes) = self.matrix(m.id);
        format.decode_row(&bytes[row * row_bytes..(row + 1) * row_bytes], out);
    }

    fn matrix(&self, id: WeightId) -> (QuantFormat, &[u8], usize) {
        match &self.weights[id.0 as usize] {
            HostWeight::Matrix { format, columns, bytes } => {
                (*format, bytes, format.row_bytes(*columns).unwrap_or(0))
            }
            HostWeight::Vector(_) => (QuantFormat::F32, &[], 0),
        }
    }

    /// `out[r] = Σ_c matrix[r, c] · x[c]`: rows in parallel, each decoded to f32 and summed as
    /// `product::dot` does, so that the result depends neither on the number of threads nor on
    /// the processor.
    pub fn product(&mut self, m: Matrix, x: &[f32], out: Buf) {
        let mut y = std::mem::take(&mut self.arena);
        let (format, bytes, row_bytes) = self.matrix(m.id);
        let target = &mut y[self.ranges[out.0 as usize].clone()][..m.rows as usize];
        // Enough rows that a task is worth its scheduling, few enough that threads share evenly.
        let rows = (32_768 / x.len().max(1)).clamp(4, 256);
        let rows_of = |(i, y): (usize, &mut [f32])| {
            let first = i * rows * row_bytes;
            product::rows(format, &bytes[first..first + y.len() * row_bytes], row_bytes, x, y);
        };
        target.par_chunks_mut(rows).enumerate().for_each(rows_of);
        self.arena = y;
    }

    /// Rounds to the element type of the cache.
    pub fn cached(cache: &CacheRef, v: f32) -> f32 {
        match cache.kind {
            KvType::F32 => v,
            KvType::F16 => f16::from_f32(v).to_f32(),
        }
    }
}
