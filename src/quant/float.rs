//! Unquantised weights: `F32`, `F16`, `BF16`, one value a block.

use super::planes::half_of;
use super::random::{Bits, normals};
use super::tile::ROWS;
use super::{DotKind, Facts, Format};
use half::f16;

/// 32-bit IEEE float.
pub(super) struct F32;

/// `F16`, or bfloat16 if `BRAIN`.
pub(super) struct SixteenBit<const BRAIN: bool>;

pub(super) static F16: SixteenBit<false> = SixteenBit;
pub(super) static BF16: SixteenBit<true> = SixteenBit;

/// Columns of a step of the 16-bit formats.
const STEP: usize = 16;

/// Bytes of a row of a full unit, the same for all three.
const ROW_BYTES: usize = 256;

/// A row of a unit with zeros past its data.
fn padded(row: &[u8]) -> [u8; ROW_BYTES] {
    let mut whole = [0; ROW_BYTES];
    for (to, from) in whole.iter_mut().zip(row) {
        *to = *from;
    }
    whole
}

const fn facts(
    name: &'static str,
    suffix: &'static str,
    ggml_id: u32,
    bytes: usize,
    dot_kind: DotKind,
) -> Facts {
    let unit_columns = ROW_BYTES / bytes;
    Facts { name, suffix, ggml_id, block_elements: 1, block_bytes: bytes, dot_kind, unit_columns }
}

impl Format for F32 {
    fn facts(&self) -> Facts {
        facts("F32", "f32", 0, 4, DotKind::Single)
    }

    #[inline(always)]
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        for (b, out) in blocks.chunks_exact(4).zip(out) {
            *out = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        }
    }

    fn pack_unit(&self, rows: &[&[u8]; ROWS], columns: usize, out: &mut [u8]) {
        for (r, row) in rows.iter().enumerate() {
            let (row, g) = (padded(row), r % 8);
            let runs = row.chunks_exact(64).take(columns / 16);
            for (from, to) in runs.zip(out.chunks_exact_mut(1024)) {
                to[512 * (r / 8) + 64 * g..][..64].copy_from_slice(from);
            }
        }
    }

    fn synthesize(&self, sigma: f32, bits: Bits<'_>, blocks: &mut [u8]) {
        normals(sigma, bits, blocks, f32::to_le_bytes);
    }
}

impl<const BRAIN: bool> Format for SixteenBit<BRAIN> {
    fn facts(&self) -> Facts {
        let (name, suffix, id) = if BRAIN { ("BF16", "bf16", 30) } else { ("F16", "f16", 1) };
        facts(name, suffix, id, 2, DotKind::Half)
    }

    #[inline(always)]
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        for (b, out) in blocks.chunks_exact(2).zip(out) {
            *out = if BRAIN {
                f32::from_le_bytes([0, 0, b[0], b[1]])
            } else {
                half_of(u16::from_le_bytes([b[0], b[1]]))
            };
        }
    }

    /// Unit `[columns / 16, 8 g, 4 t, 4 words]`: words 0 and 1 are columns `4t, 4t + 1` of rows
    /// `g` and `g + 8`, words 2 and 3 columns `4t + 2, 4t + 3`.
    fn pack_unit(&self, rows: &[&[u8]; ROWS], columns: usize, out: &mut [u8]) {
        for g in 0..ROWS / 2 {
            let (low, high) = (padded(rows[g]), padded(rows[g + 8]));
            for (k, to) in out.chunks_exact_mut(512).take(columns / STEP).enumerate() {
                for (t, to) in to[64 * g..64 * g + 64].chunks_exact_mut(16).enumerate() {
                    let at = 2 * STEP * k + 8 * t;
                    to[..4].copy_from_slice(&low[at..at + 4]);
                    to[4..8].copy_from_slice(&high[at..at + 4]);
                    to[8..12].copy_from_slice(&low[at + 4..at + 8]);
                    to[12..].copy_from_slice(&high[at + 4..at + 8]);
                }
            }
        }
    }

    fn synthesize(&self, sigma: f32, bits: Bits<'_>, blocks: &mut [u8]) {
        if BRAIN {
            normals(sigma, bits, blocks, |v| finite_bf16(v).to_le_bytes());
        } else {
            normals(sigma, bits, blocks, |v| f16::from_f32(v).to_le_bytes());
        }
    }
}

/// The bits of the bfloat16 nearest to `v`, which is no NaN; to even between two. Without a choice,
/// so that a loop over many becomes vectors.
fn finite_bf16(v: f32) -> u16 {
    let bits = v.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn a_bfloat16_is_the_nearest_one() {
        for i in 0..1u32 << 16 {
            // Every exponent and sign, digits that lie on, about and between two neighbours.
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let v = f32::from_bits(i << 16 | low);
                if v.is_finite() {
                    assert_eq!(finite_bf16(v), bf16::from_f32(v).to_bits(), "{v:e}");
                }
            }
        }
    }
}
