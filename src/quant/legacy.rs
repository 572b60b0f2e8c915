//! Formats with one f16 scale per 32 weights: `Q4_0`, `Q4_1`, `Q5_0`, `Q5_1`, `Q8_0`.
//!
//! ```text
//! Q4_0, Q5_0   w = d·(q − 2^(bits−1))     d, [qh u32], qs[16]
//! Q4_1, Q5_1   w = d·q + m                d, m, [qh u32], qs[16]
//! Q8_0         w = d·q, q signed          d, qs[32]
//! ```
//!
//! Low nibbles of `qs` are elements 0..16, high nibbles 16..32; bit `i` of `qh` is bit 4 of
//! element `i`.

use super::planes::{
    BIT_STEP, BYTE_STEP, Columns, NIBBLE_STEP, STEP, each_row_pair, half_at, nibbles, place_bits,
    place_bytes, place_nibbles, place_scales, side_by_side,
};
use super::random::{Bits, SPREAD_SQUARE, fill, put_half, signed_spread, spread};
use super::tile::ROWS;
use super::{Facts, Format};

/// A format of blocks of 32: `BITS` is 4, 5 or 8; `MIN` says whether it has a minimum.
pub(super) struct Legacy<const BITS: usize, const MIN: bool> {
    name: &'static str,
    suffix: &'static str,
    ggml_id: u32,
}

pub(super) static Q4_0: Legacy<4, false> = Legacy { name: "Q4_0", suffix: "q4_0", ggml_id: 2 };
pub(super) static Q4_1: Legacy<4, true> = Legacy { name: "Q4_1", suffix: "q4_1", ggml_id: 3 };
pub(super) static Q5_0: Legacy<5, false> = Legacy { name: "Q5_0", suffix: "q5_0", ggml_id: 6 };
pub(super) static Q5_1: Legacy<5, true> = Legacy { name: "Q5_1", suffix: "q5_1", ggml_id: 7 };
pub(super) static Q8_0: Legacy<8, false> = Legacy { name: "Q8_0", suffix: "q8_0", ggml_id: 8 };

impl<const BITS: usize, const MIN: bool> Legacy<BITS, MIN> {
    /// Bytes before the quants: the scale, the minimum and the fifth bits.
    const HEADER: usize = 2 + if MIN { 2 } else { 0 };
    const QUANTS: usize = Self::HEADER + if BITS == 5 { 4 } else { 0 };
    const BYTES: usize = Self::HEADER + BITS * STEP / 8;

    /// The quants of one block, as stored.
    #[inline(always)]
    fn quants(block: &[u8], q: &mut [u8]) {
        let stored = &block[Self::QUANTS..Self::BYTES];
        if BITS == 8 {
            q.copy_from_slice(stored);
            return;
        }
        nibbles(stored, q);
        if BITS == 5 {
            let high = &block[Self::HEADER..Self::QUANTS];
            let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
            for (i, q) in q.iter_mut().enumerate() {
                *q |= (((high >> i) & 1) as u8) << 4;
            }
        }
    }

    fn row_quants(row: &[u8], q: &mut Columns) {
        for (block, q) in row.chunks_exact(Self::BYTES).zip(q.chunks_exact_mut(STEP)) {
            Self::quants(block, q);
        }
    }

    /// The weight that a stored quant stands for.
    #[inline(always)]
    fn weight(q: u8, d: f32, m: f32) -> f32 {
        let q = if BITS == 8 { i32::from(q as i8) } else { i32::from(q) };
        let w = d * (q - Self::OFFSET) as f32;
        if MIN { w + m } else { w }
    }

    /// What is taken off a stored quant.
    const OFFSET: i32 = if MIN || BITS == 8 { 0 } else { 1 << (BITS - 1) };

    /// Mean of the square of a uniform quant about zero (`MIN`: about its mean).
    const QUANT_SQUARE: f32 = {
        let levels = (1u32 << BITS) as f32;
        (levels * levels + if MIN { -1.0 } else { 2.0 }) / 12.0
    };
}

impl<const BITS: usize, const MIN: bool> Format for Legacy<BITS, MIN> {
    fn facts(&self) -> Facts {
        Facts::of_blocks(self.name, self.suffix, self.ggml_id, STEP, Self::BYTES)
    }

    #[inline(always)]
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        let blocks = blocks.chunks_exact(Self::BYTES);
        for (block, out) in blocks.zip(out.chunks_exact_mut(STEP)) {
            let d = half_at(block, 0);
            let m = if MIN { half_at(block, 2) } else { 0.0 };
            if BITS == 4 {
                // One loop a half: bytes are widened where they lie, sixteen neighbours at a time.
                let stored = &block[Self::QUANTS..Self::BYTES];
                let (first, second) = out.split_at_mut(STEP / 2);
                for (out, q) in first.iter_mut().zip(stored) {
                    *out = Self::weight(q & 15, d, m);
                }
                for (out, q) in second.iter_mut().zip(stored) {
                    *out = Self::weight(q >> 4, d, m);
                }
                continue;
            }
            let mut q = [0; STEP];
            Self::quants(block, &mut q);
            for (out, q) in out.iter_mut().zip(q) {
                *out = Self::weight(q, d, m);
            }
        }
    }

    fn pack_unit(&self, rows: &[&[u8]; ROWS], columns: usize, out: &mut [u8]) {
        let steps = columns / STEP;
        let quants = steps * if BITS == 8 { BYTE_STEP } else { NIBBLE_STEP };
        let (plane, rest) = out.split_at_mut(quants);
        let (high_bits, scales) = rest.split_at_mut(if BITS == 5 { steps * BIT_STEP } else { 0 });
        each_row_pair(rows, Self::row_quants, |g, low, high| {
            if BITS == 8 {
                place_bytes(g, low, high, columns, plane);
                return;
            }
            place_nibbles(g, &side_by_side(low, high, 0, 4), columns, plane);
            if BITS == 5 {
                place_bits(g, &side_by_side(low, high, 4, 1), columns, high_bits);
            }
        });
        let (d, m) = scales.split_at_mut(steps * ROWS * 2);
        place_scales::<2>(rows, Self::BYTES, 0, d);
        if MIN {
            place_scales::<2>(rows, Self::BYTES, 2, m);
        }
    }

    fn synthesize(&self, sigma: f32, bits: Bits<'_>, blocks: &mut [u8]) {
        let unit = sigma / (Self::QUANT_SQUARE * SPREAD_SQUARE).sqrt();
        for block in blocks.chunks_exact_mut(Self::BYTES) {
            fill(&mut block[Self::HEADER..], bits);
            if MIN {
                let d = unit * spread(bits);
                put_half(block, 0, d);
                put_half(block, 2, -d * ((1u32 << BITS) - 1) as f32 / 2.0);
            } else {
                put_half(block, 0, unit * signed_spread(bits));
            }
        }
    }
}
