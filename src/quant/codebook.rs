//! Formats whose 4-bit codes stand for the values of a table: `IQ4_NL`, `IQ4_XS`, `MXFP4`.
//!
//! ```text
//! IQ4_NL   w = d·KV[c]                d, codes[16]
//! MXFP4    w = 2^(e − 128)·FP4[c]     e u8, codes[16]
//! IQ4_XS   w = (d·(sc − 32))·KV[c]    d, high u16, low[4], codes[128]; sc 6 bits per 32
//! ```
//!
//! Low nibbles of 16 codes are elements 0..16, high nibbles 16..32.

use super::planes::{
    Columns, NIBBLE_STEP, STEP, UNIT_COLUMNS, each_row_pair, half_at, nibbles, place_codes,
    place_scales,
};
use super::random::{Bits, SPREAD_SQUARE, fill, put_half, signed_spread, spread};
use super::tile::ROWS;
use super::{Facts, Format};

/// What a code stands for; whole numbers, so that the device multiplies them as signed bytes.
type Table = [i8; 16];

/// Of the `IQ4` formats.
static KV: Table = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Twice the 4-bit floats E2M1.
static FP4: Table = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// A format of blocks of 32: a scale of `SCALE` bytes, two for an f16, one for a power of two, and
/// the codes.
pub(super) struct Coded<const SCALE: usize> {
    name: &'static str,
    suffix: &'static str,
    ggml_id: u32,
    table: &'static Table,
}

pub(super) static IQ4_NL: Coded<2> =
    Coded { name: "IQ4_NL", suffix: "iq4_nl", ggml_id: 20, table: &KV };
pub(super) static MXFP4: Coded<1> =
    Coded { name: "MXFP4", suffix: "mxfp4", ggml_id: 39, table: &FP4 };

/// `IQ4_XS`.
pub(super) struct Iq4Xs;

/// `scale · table[code]` for the 32 codes of `stored` `[16]`.
#[inline(always)]
fn decode_codes(stored: &[u8], scale: f32, table: &Table, out: &mut [f32]) {
    let mut codes = [0; STEP];
    nibbles(stored, &mut codes);
    for (out, code) in out.iter_mut().zip(codes) {
        *out = scale * f32::from(table[usize::from(code)]);
    }
}

/// Mean of the square of a table's values.
fn mean_square(table: &Table) -> f32 {
    table.iter().map(|v| f32::from(*v) * f32::from(*v)).sum::<f32>() / table.len() as f32
}

/// `2^(exponent − 128)`; the two lowest are subnormal.
#[inline(always)]
fn power(exponent: u8) -> f32 {
    let e = u32::from(exponent);
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 })
}

impl<const SCALE: usize> Coded<SCALE> {
    const BYTES: usize = SCALE + STEP / 2;

    fn codes(row: &[u8], q: &mut Columns) {
        for (block, q) in row.chunks_exact(Self::BYTES).zip(q.chunks_exact_mut(STEP)) {
            nibbles(&block[SCALE..], q);
        }
    }
}

impl<const SCALE: usize> Format for Coded<SCALE> {
    fn facts(&self) -> Facts {
        Facts::of_blocks(self.name, self.suffix, self.ggml_id, STEP, Self::BYTES)
    }

    #[inline(always)]
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        let blocks = blocks.chunks_exact(Self::BYTES);
        for (block, out) in blocks.zip(out.chunks_exact_mut(STEP)) {
            let scale = if SCALE == 1 { power(block[0]) } else { half_at(block, 0) };
            decode_codes(&block[SCALE..], scale, self.table, out);
        }
    }

    fn pack_unit(&self, rows: &[&[u8]; ROWS], columns: usize, out: &mut [u8]) {
        let (plane, scales) = out.split_at_mut(columns / STEP * NIBBLE_STEP);
        each_row_pair(rows, Self::codes, |g, low, high| place_codes(g, low, high, columns, plane));
        place_scales::<SCALE>(rows, Self::BYTES, 0, scales);
    }

    fn synthesize(&self, sigma: f32, bits: Bits<'_>, blocks: &mut [u8]) {
        let unit = sigma / (mean_square(self.table) * SPREAD_SQUARE).sqrt();
        for block in blocks.chunks_exact_mut(Self::BYTES) {
            fill(&mut block[SCALE..], bits);
            if SCALE == 1 {
                block[0] = nearby_power(unit * spread(bits), bits);
            } else {
                put_half(block, 0, unit * signed_spread(bits));
            }
        }
    }
}

/// Exponent (plus 128) of one of the two powers of two about `scale`, by chance such that the mean
/// of its square is that of `scale`.
fn nearby_power(scale: f32, bits: Bits<'_>) -> u8 {
    let below = (scale.to_bits() >> 23) as u8;
    let ratio = scale / f32::from_bits(u32::from(below) << 23);
    let chance = (ratio * ratio - 1.0) / 3.0;
    let up = (bits() >> 8) as f32 / (1 << 24) as f32;
    // The f32 exponent is biased by 127.
    below.saturating_add(1 + u8::from(up < chance))
}

impl Iq4Xs {
    const CODES: usize = 8;
    const BYTES: usize = Self::CODES + UNIT_COLUMNS / 2;

    /// The codes of the block that `row` begins with; a row past the matrix leaves `q` alone.
    fn codes(row: &[u8], q: &mut Columns) {
        let Some(stored) = row.get(Self::CODES..Self::BYTES) else { return };
        for (stored, q) in stored.chunks_exact(STEP / 2).zip(q.chunks_exact_mut(STEP)) {
            nibbles(stored, q);
        }
    }

    /// The 6-bit scale of sub-block `j`.
    #[inline(always)]
    fn scale(block: &[u8], j: usize) -> u8 {
        let high = u16::from_le_bytes([block[2], block[3]]);
        let low = (block[4 + j / 2] >> (4 * (j % 2))) & 15;
        low | ((((high >> (2 * j)) & 3) as u8) << 4)
    }
}

impl Format for Iq4Xs {
    fn facts(&self) -> Facts {
        Facts::of_blocks("IQ4_XS", "iq4_xs", 23, UNIT_COLUMNS, Self::BYTES)
    }

    #[inline(always)]
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        let blocks = blocks.chunks_exact(Self::BYTES);
        for (block, out) in blocks.zip(out.chunks_exact_mut(UNIT_COLUMNS)) {
            let d = half_at(block, 0);
            let codes = block[Self::CODES..].chunks_exact(STEP / 2);
            for (j, (codes, out)) in codes.zip(out.chunks_exact_mut(STEP)).enumerate() {
                let scale = d * (i32::from(Self::scale(block, j)) - 32) as f32;
                decode_codes(codes, scale, &KV, out);
            }
        }
    }

    /// Codes; then the scales of lane `4g + t`, sub-blocks `t` and `t + 4` of row `g`, then of row
    /// `g + 8`: their low nibbles in a u16, their upper two bits in a byte; then `d` a row.
    fn pack_unit(&self, rows: &[&[u8]; ROWS], columns: usize, out: &mut [u8]) {
        let (plane, rest) = out.split_at_mut(UNIT_COLUMNS / STEP * NIBBLE_STEP);
        let (lows, rest) = rest.split_at_mut(64);
        let (highs, halves) = rest.split_at_mut(32);
        each_row_pair(rows, Self::codes, |g, low, high| place_codes(g, low, high, columns, plane));
        let scale = |row: &[u8], j| if row.is_empty() { 0 } else { Self::scale(row, j) };
        for lane in 0..32 {
            let (g, t) = (lane / 4, lane % 4);
            let fields = [(g, t), (g, t + 4), (g + 8, t), (g + 8, t + 4)];
            let fields = fields.map(|(row, j)| scale(rows[row], j));
            lows[2 * lane] = (fields[0] & 15) | (fields[1] << 4);
            lows[2 * lane + 1] = (fields[2] & 15) | (fields[3] << 4);
            highs[lane] = (0..4).fold(0, |all, i| all | (fields[i] >> 4 << (2 * i)));
        }
        place_scales::<2>(rows, Self::BYTES, 0, halves);
    }

    fn synthesize(&self, sigma: f32, bits: Bits<'_>, blocks: &mut [u8]) {
        // Scales uniform in −32..32.
        const SCALE_SQUARE: f32 = 4098.0 / 12.0;
        let unit = sigma / (SCALE_SQUARE * mean_square(&KV) * SPREAD_SQUARE).sqrt();
        for block in blocks.chunks_exact_mut(Self::BYTES) {
            fill(&mut block[2..], bits);
            put_half(block, 0, unit * signed_spread(bits));
        }
    }
}
