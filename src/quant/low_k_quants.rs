//! Formats of super-blocks of 256 with a plane of 2-bit quants: `Q2_K`, `Q3_K`.
//!
//! ```text
//! Q2_K   w = (d·sc)·q − dmin·mn    scales[16] (sc low, mn high nibble), qs[64], d, dmin
//! Q3_K   w = (d·sc)·(q − 4)        high[32], qs[64], scales[12], d; sc 6 bits, less 32
//! ```
//!
//! Sixteen sub-blocks of 16. Quant `i` is bits `2·(i % 128 / 32)` and up of `qs[32·(i / 128) + i % 32]`;
//! its third bit is bit `i / 32` of `high[i % 32]`.

use super::planes::{
    BIT_STEP, Columns, SIX_BITS, STEP, UNIT_COLUMNS, each_row_pair, half_at, place_bit_pairs,
    place_bits, place_scales, place_six_bits, place_sixteen, side_by_side,
};
use super::random::{Bits, SPREAD_SQUARE, fill, put_half, signed_spread, spread};
use super::tile::ROWS;
use super::{Facts, Format};

/// Elements of a sub-block.
const SUB_BLOCK: usize = 16;

/// Bytes of the quants of a super-block.
const QUANTS: usize = UNIT_COLUMNS / 4;

/// Bytes of the 2-bit plane of a unit.
const PAIR_PLANE: usize = ROWS * QUANTS;

/// `Q2_K`.
pub(super) struct Q2K;

/// `Q3_K`.
pub(super) struct Q3K;

/// Spreads the 2-bit quants `stored` `[64]`, one a byte.
#[inline(always)]
fn bit_pairs(stored: &[u8], q: &mut Columns) {
    for (stored, q) in stored.chunks_exact(STEP).zip(q.chunks_exact_mut(4 * STEP)) {
        for (part, q) in q.chunks_exact_mut(STEP).enumerate() {
            for (q, stored) in q.iter_mut().zip(stored) {
                *q = (stored >> (2 * part)) & 3;
            }
        }
    }
}

impl Q2K {
    const D: usize = SUB_BLOCK + QUANTS;
    const BYTES: usize = Self::D + 4;

    /// The quants of the block that `row` begins with; a row past the matrix leaves `q` alone.
    #[inline(always)]
    fn quants(row: &[u8], q: &mut Columns) {
        if let Some(stored) = row.get(SUB_BLOCK..Self::D) {
            bit_pairs(stored, q);
        }
    }
}

impl Format for Q2K {
    fn facts(&self) -> Facts {
        Facts::of_blocks("Q2_K", "q2_k", 10, UNIT_COLUMNS, Self::BYTES)
    }

    #[inline(always)]
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        let blocks = blocks.chunks_exact(Self::BYTES);
        for (block, out) in blocks.zip(out.chunks_exact_mut(UNIT_COLUMNS)) {
            let (d, dmin) = (half_at(block, Self::D), half_at(block, Self::D + 2));
            let mut q = [0; UNIT_COLUMNS];
            Self::quants(block, &mut q);
            let parts = out.chunks_exact_mut(SUB_BLOCK).zip(q.chunks_exact(SUB_BLOCK));
            for ((out, q), field) in parts.zip(block) {
                let (scale, minimum) = (d * f32::from(field & 15), dmin * f32::from(field >> 4));
                for (out, q) in out.iter_mut().zip(q) {
                    *out = scale * f32::from(*q) - minimum;
                }
            }
        }
    }

    fn pack_unit(&self, rows: &[&[u8]; ROWS], _columns: usize, out: &mut [u8]) {
        let (plane, rest) = out.split_at_mut(PAIR_PLANE);
        let (scales, halves) = rest.split_at_mut(ROWS * SUB_BLOCK);
        each_row_pair(rows, Self::quants, |g, low, high| {
            place_bit_pairs(g, &side_by_side(low, high, 0, 2), plane);
        });
        place_sixteen(rows, 0, scales);
        place_scales::<4>(rows, Self::BYTES, Self::D, halves);
    }

    fn synthesize(&self, sigma: f32, bits: Bits<'_>, blocks: &mut [u8]) {
        // As for Q4_K: scales and minima independent and uniform in 8..16, dmin = mean(q)·d.
        const FIELD_VARIANCE: f32 = 63.0 / 12.0;
        const FIELD_SQUARE: f32 = 11.5 * 11.5 + FIELD_VARIANCE;
        const MEAN: f32 = 1.5;
        const VARIANCE: f32 = FIELD_SQUARE * 15.0 / 12.0 + MEAN * MEAN * 2.0 * FIELD_VARIANCE;
        let unit = sigma / (VARIANCE * SPREAD_SQUARE).sqrt();
        for block in blocks.chunks_exact_mut(Self::BYTES) {
            fill(&mut block[..Self::D], bits);
            for fields in &mut block[..SUB_BLOCK] {
                *fields |= 0x88;
            }
            let d = unit * spread(bits);
            put_half(block, Self::D, d);
            put_half(block, Self::D + 2, d * MEAN);
        }
    }
}

impl Q3K {
    const QUANTS: usize = UNIT_COLUMNS / 8;
    const SCALES: usize = Self::QUANTS + QUANTS;
    const D: usize = Self::SCALES + 12;
    const BYTES: usize = Self::D + 2;

    /// The quants 0..8 of the block that `row` begins with; a row past the matrix leaves `q` alone.
    #[inline(always)]
    fn quants(row: &[u8], q: &mut Columns) {
        let Some(block) = row.get(..Self::BYTES) else { return };
        bit_pairs(&block[Self::QUANTS..Self::SCALES], q);
        for (part, q) in q.chunks_exact_mut(STEP).enumerate() {
            for (q, high) in q.iter_mut().zip(block) {
                *q |= ((high >> part) & 1) << 2;
            }
        }
    }

    /// The 6-bit scale of sub-block `s`: low nibbles of 0..8, then high ones; two bits above.
    #[inline(always)]
    fn scale(block: &[u8], s: usize) -> u8 {
        let scales = &block[Self::SCALES..Self::D];
        let low = (scales[s % 8] >> (4 * (s / 8))) & 15;
        low | (((scales[8 + s % 4] >> (2 * (s / 4))) & 3) << 4)
    }
}

impl Format for Q3K {
    fn facts(&self) -> Facts {
        Facts::of_blocks("Q3_K", "q3_k", 11, UNIT_COLUMNS, Self::BYTES)
    }

    #[inline(always)]
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        let blocks = blocks.chunks_exact(Self::BYTES);
        for (block, out) in blocks.zip(out.chunks_exact_mut(UNIT_COLUMNS)) {
            let d = half_at(block, Self::D);
            let mut q = [0; UNIT_COLUMNS];
            Self::quants(block, &mut q);
            let parts = out.chunks_exact_mut(SUB_BLOCK).zip(q.chunks_exact(SUB_BLOCK));
            for (s, (out, q)) in parts.enumerate() {
                let scale = d * (i32::from(Self::scale(block, s)) - 32) as f32;
                for (out, q) in out.iter_mut().zip(q) {
                    *out = scale * (i32::from(*q) - 4) as f32;
                }
            }
        }
    }

    fn pack_unit(&self, rows: &[&[u8]; ROWS], _columns: usize, out: &mut [u8]) {
        let (plane, rest) = out.split_at_mut(PAIR_PLANE);
        let (high_bits, rest) = rest.split_at_mut(UNIT_COLUMNS / STEP * BIT_STEP);
        let (scales, halves) = rest.split_at_mut(SIX_BITS);
        each_row_pair(rows, Self::quants, |g, low, high| {
            place_bit_pairs(g, &side_by_side(low, high, 0, 2), plane);
            place_bits(g, &side_by_side(low, high, 2, 1), UNIT_COLUMNS, high_bits);
        });
        let four = |row: &[u8], t: usize| [0, 4, 8, 12].map(|i| Self::scale(row, i + t));
        place_six_bits(rows, four, scales);
        place_scales::<2>(rows, Self::BYTES, Self::D, halves);
    }

    fn synthesize(&self, sigma: f32, bits: Bits<'_>, blocks: &mut [u8]) {
        // Scales uniform in −32..32, quants in −4..4.
        const SCALE_SQUARE: f32 = 4098.0 / 12.0;
        const QUANT_SQUARE: f32 = 66.0 / 12.0;
        let unit = sigma / (SCALE_SQUARE * QUANT_SQUARE * SPREAD_SQUARE).sqrt();
        for block in blocks.chunks_exact_mut(Self::BYTES) {
            fill(&mut block[..Self::D], bits);
            put_half(block, Self::D, unit * signed_spread(bits));
        }
    }
}
