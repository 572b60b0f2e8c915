//! `y[r] = Σ_c w[r, c] · x[c]`, each row decoded and summed block by block.
//!
//! A row is summed in [`LANES`] fixed lanes, column `c` in lane `c mod LANES`, which are then added
//! pairwise; every product and every sum is rounded on its own (no fused multiply-add). So the
//! result has the same bits with every instruction set and on every number of threads.

use crate::quant::{Format, FormatVisitor, QuantFormat};
use pulp::{Arch, Simd, WithSimd};

/// Lanes of a sum: four registers of eight, so that additions overlap.
const LANES: usize = 32;

/// Weights that are decoded at a time, at most: the largest block of a format.
const MOST: usize = 256;

/// `y[r] = Σ_c w[r, c] · x[c]`: `bytes` `[rows, row_bytes]` of `format`, `x` `[columns]`, `y`
/// `[rows]`.
pub(super) fn rows(format: QuantFormat, bytes: &[u8], row_bytes: usize, x: &[f32], y: &mut [f32]) {
    format.visit(Rows { bytes, row_bytes, x, y });
}

/// `Σ_i a[i] · b[i]`, summed as a row is.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    Arch::new().dispatch(Dot { a, b })
}

struct Rows<'a> {
    bytes: &'a [u8],
    row_bytes: usize,
    x: &'a [f32],
    y: &'a mut [f32],
}

impl FormatVisitor for Rows<'_> {
    type Out = ();

    fn visit<F: Format>(self, format: &F) {
        Arch::new().dispatch(RowsAs { rows: self, format });
    }
}

/// [`Rows`] of a format; compiled once more for each instruction set.
struct RowsAs<'a, F> {
    rows: Rows<'a>,
    format: &'a F,
}

impl<F: Format> WithSimd for RowsAs<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Rows { bytes, row_bytes, x, y } = self.rows;
        // Whole blocks and whole rows of lanes.
        let step = self.format.block_elements().max(LANES);
        let step_bytes = step / self.format.block_elements() * self.format.block_bytes();
        let mut decoded = [0.0f32; MOST];
        for (bytes, y) in bytes.chunks_exact(row_bytes).zip(y) {
            let (blocks, x) = (bytes.chunks_exact(step_bytes), x.chunks_exact(step));
            let mut sum = Sum::new(simd);
            let tail = if blocks.remainder().is_empty() {
                0.0
            } else {
                self.format.decode(blocks.remainder(), &mut decoded);
                tail(&decoded, x.remainder())
            };
            for (block, x) in blocks.zip(x) {
                let decoded = &mut decoded[..step];
                self.format.decode(block, decoded);
                sum.add(decoded, x);
            }
            *y = sum.total() + tail;
        }
    }
}

struct Dot<'a> {
    a: &'a [f32],
    b: &'a [f32],
}

impl WithSimd for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let (a, b) = (self.a.chunks_exact(LANES), self.b.chunks_exact(LANES));
        let tail = tail(a.remainder(), b.remainder());
        let mut sum = Sum::new(simd);
        a.zip(b).for_each(|(a, b)| sum.add(a, b));
        sum.total() + tail
    }
}

/// What does not fill the lanes, in order.
fn tail(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// [`LANES`] partial sums in as many registers as `S` needs for them. Vectors by type, since left
/// to itself the compiler pairs the lanes up across registers and takes a quarter of the width.
struct Sum<S: Simd> {
    simd: S,
    registers: [S::f32s; LANES],
}

impl<S: Simd> Sum<S> {
    /// Registers in use: of an instruction set with one lane all, of one with eight four.
    const REGISTERS: usize = LANES / S::F32_LANES;

    #[inline(always)]
    fn new(simd: S) -> Self {
        Self { simd, registers: [simd.splat_f32s(0.0); LANES] }
    }

    /// Adds `a[i] · b[i]` to lane `i mod LANES`; both have whole rows of lanes.
    #[inline(always)]
    fn add(&mut self, a: &[f32], b: &[f32]) {
        for (a, b) in a.chunks_exact(LANES).zip(b.chunks_exact(LANES)) {
            let ((a, _), (b, _)) = (S::as_simd_f32s(a), S::as_simd_f32s(b));
            for (i, sum) in self.registers[..Self::REGISTERS].iter_mut().enumerate() {
                *sum = self.simd.add_f32s(*sum, self.simd.mul_f32s(a[i], b[i]));
            }
        }
    }

    #[inline(always)]
    fn total(self) -> f32 {
        let mut lanes = [0.0f32; LANES];
        lanes.copy_from_slice(bytemuck::cast_slice(&self.registers[..Self::REGISTERS]));
        let mut n = LANES;
        while n > 1 {
            n /= 2;
            for i in 0..n {
                lanes[i] += lanes[i + n];
            }
        }
        lanes[0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What does not repeat and has both signs.
    fn values(len: usize, frequency: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * frequency + 0.3).sin()).collect()
    }

    /// `a · b` lies within the rounding of `LANES` sums of `a.len() / LANES` terms.
    fn assert_is_product(found: f32, a: &[f32], b: &[f32], what: &str) {
        let terms = || a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
        let (exact, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
        let roundings = (a.len() / LANES + a.len() % LANES + 7) as f64;
        let bound = roundings * f64::from(f32::EPSILON) / 2.0 * size;
        let error = (f64::from(found) - exact).abs();
        assert!(error <= bound, "{what}: {found} is not {exact} within {bound:e}");
        assert!(exact.abs() > 100.0 * bound || a.is_empty(), "{what}: too small a sum to judge by");
    }

    #[test]
    fn a_dot_product_is_the_sum_of_the_products_at_every_length() {
        for len in (0..100).chain([576, 577, 1536, 4096]) {
            let (a, b) = (values(len, 0.7), values(len, 0.71));
            assert_is_product(dot(&a, &b), &a, &b, &format!("length {len}"));
        }
    }

    #[test]
    fn rows_times_x_are_their_weights_times_x_in_every_format_and_instruction_set() {
        struct With<'a>(Arch, Rows<'a>);
        impl FormatVisitor for With<'_> {
            type Out = ();
            fn visit<F: Format>(self, format: &F) {
                self.0.dispatch(RowsAs { rows: self.1, format });
            }
        }
        for format in QuantFormat::ALL {
            // Whole blocks; where blocks are single values, also what does not fill the lanes.
            let columns = if format.describe().block_elements() == 1 { 549 } else { 512 };
            let row_bytes = format.row_bytes(columns).unwrap();
            let mut bytes = vec![0; 5 * row_bytes];
            let mut state = 1u64;
            let mut bits = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 32) as u32
            };
            format.describe().synthesize(1.0, &mut bits, &mut bytes);
            // Near the first row, so that no sum is all cancellation.
            let mut x = vec![0.0; columns];
            format.decode_row(&bytes[..row_bytes], &mut x);
            x.iter_mut().zip(values(columns, 0.7)).for_each(|(x, v)| *x += v);
            let mut y = [0.0; 5];
            rows(format, &bytes, row_bytes, &x, &mut y);
            let mut row = vec![0.0; columns];
            for (r, (bytes, y)) in bytes.chunks_exact(row_bytes).zip(y).enumerate() {
                format.decode_row(bytes, &mut row);
                assert_is_product(y, &row, &x, &format!("{format} row {r}"));
                assert_eq!(y.to_bits(), dot(&row, &x).to_bits(), "{format} row {r}");
            }
            let mut plain = [0.0; 5];
            let all = Rows { bytes: &bytes, row_bytes, x: &x, y: &mut plain };
            format.visit(With(Arch::Scalar, all));
            assert_eq!(y.map(f32::to_bits), plain.map(f32::to_bits), "{format}");
        }
    }
}
