//! Formats of super-blocks of 256: `Q4_K`, `Q5_K`, `Q6_K`.
//!
//! ```text
//! Q4_K, Q5_K   w = (d·sc)·q − dmin·mn    d, dmin, scales[12], [qh[32]], qs[128]
//! Q6_K         w = (d·sc)·(q − 32)       ql[128], qh[64], scales i8[16], d
//! ```
//!
//! `sc` and `mn` are 6-bit, one per 32 weights; the scales of `Q6_K` one per 16.

use super::planes::{
    BIT_STEP, Columns, NIBBLE_STEP, SIX_BITS, STEP, UNIT_COLUMNS, each_row_pair, half_at, nibbles,
    place_bit_pairs, place_bits, place_nibbles, place_scales, place_six_bits, place_sixteen,
    side_by_side,
};
use super::random::{Bits, SPREAD_SQUARE, fill, put_half, signed_spread, spread};
use super::tile::ROWS;
use super::{Facts, Format};

/// Elements of a super-block.
const ELEMENTS: usize = UNIT_COLUMNS;

/// Steps of a unit, which is always a full one.
const STEPS: usize = ELEMENTS / STEP;

/// Where the packed scales of `Q4_K` and `Q5_K` begin and end.
const SCALES: (usize, usize) = (4, 16);

/// `Q4_K` and `Q5_K`: `BITS` is 4 or 5.
pub(super) struct WithMinima<const BITS: usize> {
    name: &'static str,
    suffix: &'static str,
    ggml_id: u32,
}

/// `Q6_K`.
pub(super) struct SixBit;

pub(super) static Q4K: WithMinima<4> = WithMinima { name: "Q4_K", suffix: "q4_k", ggml_id: 12 };
pub(super) static Q5K: WithMinima<5> = WithMinima { name: "Q5_K", suffix: "q5_k", ggml_id: 13 };
pub(super) static Q6K: SixBit = SixBit;

/// The 6-bit (scale, minimum) of sub-block `j` of 8 out of the 12 bytes.
#[inline(always)]
fn scale_and_minimum(scales: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        let low = scales[j + 4];
        ((low & 15) | (scales[j - 4] >> 6 << 4), (low >> 4) | (scales[j] >> 6 << 4))
    }
}

impl<const BITS: usize> WithMinima<BITS> {
    const QUANTS: usize = SCALES.1 + if BITS == 5 { ELEMENTS / 8 } else { 0 };
    const BYTES: usize = SCALES.1 + BITS * ELEMENTS / 8;

    /// The quants of the block that `row` begins with; a row past the matrix leaves `q` alone.
    #[inline(always)]
    fn quants(row: &[u8], q: &mut Columns) {
        let Some(block) = row.get(..Self::BYTES) else { return };
        let pairs = block[Self::QUANTS..].chunks_exact(STEP);
        for (stored, q) in pairs.zip(q.chunks_exact_mut(2 * STEP)) {
            nibbles(stored, q);
        }
        if BITS == 5 {
            let high = &block[SCALES.1..Self::QUANTS];
            for (j, q) in q.chunks_exact_mut(STEP).enumerate() {
                for (q, high) in q.iter_mut().zip(high) {
                    *q |= ((high >> j) & 1) << 4;
                }
            }
        }
    }
}

impl<const BITS: usize> Format for WithMinima<BITS> {
    fn facts(&self) -> Facts {
        Facts::of_blocks(self.name, self.suffix, self.ggml_id, ELEMENTS, Self::BYTES)
    }

    #[inline(always)]
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        let blocks = blocks.chunks_exact(Self::BYTES);
        for (block, out) in blocks.zip(out.chunks_exact_mut(ELEMENTS)) {
            let (d, dmin) = (half_at(block, 0), half_at(block, 2));
            let mut q = [0; ELEMENTS];
            Self::quants(block, &mut q);
            let parts = out.chunks_exact_mut(STEP).zip(q.chunks_exact(STEP));
            for (j, (out, q)) in parts.enumerate() {
                let (sc, mn) = scale_and_minimum(&block[SCALES.0..SCALES.1], j);
                let (scale, minimum) = (d * f32::from(sc), dmin * f32::from(mn));
                for (out, q) in out.iter_mut().zip(q) {
                    *out = scale * f32::from(*q) - minimum;
                }
            }
        }
    }

    fn pack_unit(&self, rows: &[&[u8]; ROWS], _columns: usize, out: &mut [u8]) {
        let (plane, rest) = out.split_at_mut(STEPS * NIBBLE_STEP);
        let (high_bits, scales) = rest.split_at_mut(if BITS == 5 { STEPS * BIT_STEP } else { 0 });
        each_row_pair(rows, Self::quants, |g, low, high| {
            place_nibbles(g, &side_by_side(low, high, 0, 4), ELEMENTS, plane);
            if BITS == 5 {
                place_bits(g, &side_by_side(low, high, 4, 1), ELEMENTS, high_bits);
            }
        });
        let (fields, halves) = scales.split_at_mut(SIX_BITS);
        let four = |row: &[u8], t: usize| {
            let scales = &row[SCALES.0..SCALES.1];
            let ((sc, mn), (sc4, mn4)) =
                (scale_and_minimum(scales, t), scale_and_minimum(scales, t + 4));
            [sc, mn, sc4, mn4]
        };
        place_six_bits(rows, four, fields);
        place_scales::<4>(rows, Self::BYTES, 0, halves);
    }

    fn synthesize(&self, sigma: f32, bits: Bits<'_>, blocks: &mut [u8]) {
        // Scales and minima are independent and uniform in 32..64, so that a kernel that swaps
        // them is seen; dmin = mean(q)·d then makes w/d = sc·(q − mean) + mean·(sc − mn).
        const FIELD_VARIANCE: f32 = 1023.0 / 12.0;
        const FIELD_SQUARE: f32 = 47.5 * 47.5 + FIELD_VARIANCE;
        let levels = (1u32 << BITS) as f32;
        let mean = (levels - 1.0) / 2.0;
        let variance =
            FIELD_SQUARE * (levels * levels - 1.0) / 12.0 + mean * mean * 2.0 * FIELD_VARIANCE;
        let unit = sigma / (variance * SPREAD_SQUARE).sqrt();
        for block in blocks.chunks_exact_mut(Self::BYTES) {
            fill(&mut block[SCALES.0..], bits);
            for byte in &mut block[SCALES.0..SCALES.0 + 8] {
                // The top bit of the field here (32) and of the one whose upper bits are here.
                *byte |= 0xa0;
            }
            let d = unit * spread(bits);
            put_half(block, 0, d);
            put_half(block, 2, d * mean);
        }
    }
}

impl SixBit {
    const HIGH: usize = 128;
    const SCALES: usize = 192;
    const D: usize = 208;
    const BYTES: usize = 210;

    /// The quants 0..64 of the block that `row` begins with; a row past the matrix leaves `q` alone.
    #[inline(always)]
    fn quants(row: &[u8], q: &mut Columns) {
        let Some(block) = row.get(..Self::BYTES) else { return };
        let low = block[..Self::HIGH].chunks_exact(64);
        let high = block[Self::HIGH..Self::SCALES].chunks_exact(32);
        for ((low, high), q) in low.zip(high).zip(q.chunks_exact_mut(128)) {
            for (part, q) in q.chunks_exact_mut(32).enumerate() {
                let low = &low[32 * (part % 2)..][..32];
                for ((q, low), high) in q.iter_mut().zip(low).zip(high) {
                    *q = ((low >> (part / 2 * 4)) & 15) | (((high >> (2 * part)) & 3) << 4);
                }
            }
        }
    }
}

impl Format for SixBit {
    fn facts(&self) -> Facts {
        Facts::of_blocks("Q6_K", "q6_k", 14, ELEMENTS, Self::BYTES)
    }

    #[inline(always)]
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        let blocks = blocks.chunks_exact(Self::BYTES);
        for (block, out) in blocks.zip(out.chunks_exact_mut(ELEMENTS)) {
            let d = half_at(block, Self::D);
            let mut q = [0; ELEMENTS];
            Self::quants(block, &mut q);
            let scales = &block[Self::SCALES..Self::D];
            let parts = out.chunks_exact_mut(16).zip(q.chunks_exact(16));
            for ((out, q), scale) in parts.zip(scales) {
                let scale = d * f32::from(*scale as i8);
                for (out, q) in out.iter_mut().zip(q) {
                    *out = scale * (i32::from(*q) - 32) as f32;
                }
            }
        }
    }

    fn pack_unit(&self, rows: &[&[u8]; ROWS], _columns: usize, out: &mut [u8]) {
        let (plane, rest) = out.split_at_mut(STEPS * NIBBLE_STEP);
        let (high_bits, rest) = rest.split_at_mut(1024);
        let (scales, halves) = rest.split_at_mut(256);
        each_row_pair(rows, Self::quants, |g, low, high| {
            place_nibbles(g, &side_by_side(low, high, 0, 4), ELEMENTS, plane);
            place_bit_pairs(g, &side_by_side(low, high, 4, 2), high_bits);
        });
        place_sixteen(rows, Self::SCALES, scales);
        place_scales::<2>(rows, Self::BYTES, Self::D, halves);
    }

    fn synthesize(&self, sigma: f32, bits: Bits<'_>, blocks: &mut [u8]) {
        // Magnitudes uniform in 64..128, either sign; quants uniform in −32..32.
        const SCALE_SQUARE: f32 = 95.5 * 95.5 + 4095.0 / 12.0;
        const QUANT_SQUARE: f32 = 4098.0 / 12.0;
        let unit = sigma / (SCALE_SQUARE * QUANT_SQUARE * SPREAD_SQUARE).sqrt();
        for block in blocks.chunks_exact_mut(Self::BYTES) {
            fill(&mut block[..Self::D], bits);
            for scale in &mut block[Self::SCALES..Self::D] {
                let magnitude = (64 | (*scale & 63)) as i8;
                *scale = if *scale & 128 == 0 { magnitude } else { -magnitude } as u8;
            }
            put_half(block, Self::D, unit * signed_spread(bits));
        }
    }
}
