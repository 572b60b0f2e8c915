//! The host twin of the device memory that a plan touches; read and written by the references.

use super::{Buf, CacheRef, KvType, Matrix, Vector, WeightId};
use crate::plan::WorkspaceLayout;
use crate::quant::{Format, FormatVisitor, QuantFormat};
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
    /// Memory for `layout`, with `weights` in the order of the plan's table and one pair of caches
    /// of `cache_len` elements per layer.
    pub fn new(
        layout: &WorkspaceLayout,
        weights: Vec<HostWeight>,
        layers: usize,
        cache_len: usize,
    ) -> Self {
        let word = |b: usize| b / 4;
        let ranges = layout.placements().iter().map(|p| word(p.offset)..word(p.offset + p.bytes));
        Self {
            arena: vec![f32::NAN; word(layout.bytes())],
            ranges: ranges.collect(),
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
    /// `dot` does, so that the result depends neither on the number of threads nor on the
    /// processor.
    pub fn product(&mut self, m: Matrix, x: &[f32], out: Buf) {
        let mut y = std::mem::take(&mut self.arena);
        let (format, bytes, row_bytes) = self.matrix(m.id);
        let target = &mut y[self.ranges[out.0 as usize].clone()][..m.rows as usize];
        // Enough rows that a task is worth its scheduling, few enough that threads share evenly.
        let rows = (32_768 / x.len().max(1)).clamp(4, 256);
        let arch = pulp::Arch::new();
        target.par_chunks_mut(rows).enumerate().for_each_init(
            || vec![0.0f32; x.len()],
            |row, (i, y)| {
                let first = i * rows * row_bytes;
                let bytes = &bytes[first..first + y.len() * row_bytes];
                format.visit(Rows { arch, bytes, row_bytes, x, row, y });
            },
        );
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

/// Some rows of a matrix, to be multiplied with `x`.
struct Rows<'a> {
    arch: pulp::Arch,
    bytes: &'a [u8],
    row_bytes: usize,
    x: &'a [f32],
    /// Scratch for a decoded row.
    row: &'a mut [f32],
    y: &'a mut [f32],
}

impl FormatVisitor for Rows<'_> {
    type Out = ();

    fn visit<F: Format>(self, format: &F) {
        let arch = self.arch;
        arch.dispatch(RowsAs { rows: self, format });
    }
}

/// [`Rows`] of a format; compiled once more for each instruction set.
struct RowsAs<'a, F> {
    rows: Rows<'a>,
    format: &'a F,
}

impl<F: Format> pulp::NullaryFnOnce for RowsAs<'_, F> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Rows { bytes, row_bytes, x, row, y, .. } = self.rows;
        for (bytes, y) in bytes.chunks_exact(row_bytes).zip(y) {
            self.format.decode(bytes, row);
            *y = dot(row, x);
        }
    }
}

/// Lanes of [`dot`]: four registers of eight, so that additions overlap.
const LANES: usize = 32;

/// `Σ a[i] · b[i]` in [`LANES`] fixed lanes, lanes added pairwise. No fused multiply-add: the
/// result is the same on every processor.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    // Rows of eight: what the compiler keeps in one register each.
    let mut lanes = [[0.0f32; 8]; LANES / 8];
    let (ca, cb) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = ca.remainder().iter().zip(cb.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in ca.zip(cb) {
        let products = a.as_chunks::<8>().0.iter().zip(b.as_chunks::<8>().0);
        for (lanes, (a, b)) in lanes.iter_mut().zip(products) {
            *lanes = std::array::from_fn(|i| lanes[i] + a[i] * b[i]);
        }
    }
    let lanes = lanes.as_flattened_mut();
    let mut n = LANES;
    while n > 1 {
        n /= 2;
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
    }
    lanes[0] + tail
}
