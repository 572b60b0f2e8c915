//! Placing quants into the planes of a unit ([`super::tile`]).
//!
//! Every integer format reads its two rows of a fragment, `g` and `g + 8`, into one byte a column
//! and then calls the planes it has. Seen from a lane, the four 32-bit words of a fragment are
//! register `r = 2·half + row`: columns `16·half + 4t + b` of the step, rows `g` (0) and `g + 8` (1).

use super::tile::{COLUMN_STEP, ROWS};
use half::f16;

/// Columns of a full unit of the integer formats.
pub(super) const UNIT_COLUMNS: usize = 256;

/// Columns of one `mma.m16n8k32` step.
pub(super) const STEP: usize = 32;

/// Bytes of a step in the nibble plane.
pub(super) const NIBBLE_STEP: usize = 256;

/// Bytes of a step in the byte plane.
pub(super) const BYTE_STEP: usize = 512;

/// Bytes of a step in the one-bit plane.
pub(super) const BIT_STEP: usize = 64;

/// One byte a column, zeros past the row's data.
pub(super) type Columns = [u8; UNIT_COLUMNS];

/// The f16 at byte `at` of `block`, as f32.
#[inline(always)]
pub(super) fn half_at(block: &[u8], at: usize) -> f32 {
    let h = u16::from_le_bytes([block[at], block[at + 1]]);
    if h & 0x7C00 == 0x7C00 { not_finite(h) } else { finite(h) }
}

/// A finite f16: the same digits 112 exponents lower, moved up by an exact product. Unlike the
/// conversion of `half` it asks for no processor feature, which a loop over blocks would feel.
#[inline(always)]
fn finite(h: u16) -> f32 {
    let low = f32::from_bits(u32::from(h & 0x7FFF) << 13) * f32::from_bits((127 + 112) << 23);
    f32::from_bits(low.to_bits() | u32::from(h & 0x8000) << 16)
}

/// Out of line: as a choice between two values it would cost every block what the product costs.
#[cold]
#[inline(never)]
fn not_finite(h: u16) -> f32 {
    f16::from_bits(h).to_f32()
}

/// Any f16 as f32, by choices between values: for a loop over many of them.
#[inline(always)]
pub(super) fn half_of(h: u16) -> f32 {
    let infinity = if h & 0x7C00 == 0x7C00 { 0x7F80_0000 } else { 0 };
    let quiet = if h & 0x7FFF > 0x7C00 { 0x0040_0000 } else { 0 };
    f32::from_bits(finite(h).to_bits() | infinity | quiet)
}

/// Calls `place(g, row g, row g + 8)` for g in 0..8 with the rows' quants as `read` spreads them.
/// A row that is shorter than the unit keeps zeros at its end.
pub(super) fn each_row_pair(
    rows: &[&[u8]; ROWS],
    read: impl Fn(&[u8], &mut Columns),
    mut place: impl FnMut(usize, &Columns, &Columns),
) {
    let (mut low, mut high) = ([0; UNIT_COLUMNS], [0; UNIT_COLUMNS]);
    for g in 0..ROWS / 2 {
        low.fill(0);
        high.fill(0);
        read(rows[g], &mut low);
        read(rows[g + 8], &mut high);
        place(g, &low, &high);
    }
}

/// The 4-bit quants of `stored`: low nibbles are the first half of `q`, high ones the second.
#[inline(always)]
pub(super) fn nibbles(stored: &[u8], q: &mut [u8]) {
    let (first, second) = q.split_at_mut(stored.len());
    for ((first, second), byte) in first.iter_mut().zip(second).zip(stored) {
        *first = byte & 15;
        *second = byte >> 4;
    }
}

/// The two rows' bits from `from` up, `count` of them, side by side in one byte a column:
/// row `g` in the low `count` bits, row `g + 8` above.
pub(super) fn side_by_side(low: &Columns, high: &Columns, from: u32, count: u32) -> Columns {
    let mask = (1u8 << count) - 1;
    let mut both = [0; UNIT_COLUMNS];
    for ((both, low), high) in both.iter_mut().zip(low).zip(high) {
        *both = ((low >> from) & mask) | (((high >> from) & mask) << count);
    }
    both
}

fn word(bytes: &[u8], index: usize) -> u32 {
    let b = &bytes[4 * index..4 * index + 4];
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

fn put(out: &mut [u8], index: usize, word: u32) {
    out[4 * index..4 * index + 4].copy_from_slice(&word.to_le_bytes());
}

/// Nibble plane `[columns / 64, 8 g, 4 t, 4 j]` of u32: word `j` of lane `4g + t` of a pair of
/// steps holds columns `16j + 4t + b`, both rows of each in byte `b`.
/// `both` is [`side_by_side`] with 4 bits each.
pub(super) fn place_nibbles(g: usize, both: &Columns, columns: usize, plane: &mut [u8]) {
    let pairs = both[..columns].chunks_exact(COLUMN_STEP);
    for (from, to) in pairs.zip(plane.chunks_exact_mut(2 * NIBBLE_STEP)) {
        let to = &mut to[64 * g..64 * g + 64];
        for t in 0..4 {
            for j in 0..4 {
                put(to, 4 * t + j, word(from, 4 * j + t));
            }
        }
    }
}

/// Code plane `[columns / 32, 8 g, 4 t, 2]` of u32: word `half` of lane `4g + t` holds columns
/// `16·half + 4t + b`, nibble `b` of row `g` and nibble `4 + b` of row `g + 8`: the selectors of two
/// byte permutes.
pub(super) fn place_codes(
    g: usize,
    low: &Columns,
    high: &Columns,
    columns: usize,
    plane: &mut [u8],
) {
    let four = |codes: &[u8]| codes.iter().rev().fold(0, |all, c| (all << 4) | u32::from(*c));
    let fours = low[..columns].chunks_exact(4).zip(high.chunks_exact(4));
    for (i, (low, high)) in fours.enumerate() {
        let (s, half, t) = (i / 8, i / 4 % 2, i % 4);
        let at = s * NIBBLE_STEP + 32 * g;
        put(&mut plane[at..], 2 * t + half, four(low) | (four(high) << 16));
    }
}

/// Byte plane `[columns / 32, 8 g, 4 t, 4 r]` of u32: the registers of the fragment as they are.
pub(super) fn place_bytes(
    g: usize,
    low: &Columns,
    high: &Columns,
    columns: usize,
    plane: &mut [u8],
) {
    let steps = low[..columns].chunks_exact(STEP).zip(high.chunks_exact(STEP));
    for ((low, high), to) in steps.zip(plane.chunks_exact_mut(BYTE_STEP)) {
        let to = &mut to[64 * g..64 * g + 64];
        for t in 0..4 {
            for half in 0..2 {
                put(to, 4 * t + 2 * half, word(low, 4 * half + t));
                put(to, 4 * t + 2 * half + 1, word(high, 4 * half + t));
            }
        }
    }
}

/// One-bit plane `[columns / 64, 8 g, 4 t]` of u32: bit `8b + 4k + r` belongs to byte `b` of
/// register `r` of step `k` of the pair. `both` is [`side_by_side`] with 1 bit each.
pub(super) fn place_bits(g: usize, both: &Columns, columns: usize, plane: &mut [u8]) {
    let pairs = both[..columns].chunks_exact(COLUMN_STEP);
    for (from, to) in pairs.zip(plane.chunks_exact_mut(2 * BIT_STEP)) {
        for t in 0..4 {
            let all = (0..4).fold(0, |all, j| all | (word(from, 4 * j + t) << (2 * j)));
            put(to, 4 * g + t, all);
        }
    }
}

/// Two-bit plane `[2, 8 g, 4 t, 4 steps]` of u32 of a full unit: bits `8b + 2r` and up belong to
/// byte `b` of register `r`. `both` is [`side_by_side`] with 2 bits each.
pub(super) fn place_bit_pairs(g: usize, both: &Columns, plane: &mut [u8]) {
    for (s, from) in both.chunks_exact(STEP).enumerate() {
        let to = &mut plane[s / 4 * 512 + 64 * g..][..64];
        for t in 0..4 {
            put(to, 4 * t + s % 4, word(from, t) | (word(from, 4 + t) << 4));
        }
    }
}

/// Plane `[blocks of a row, 8 g, 2 rows]` of the `N` bytes at byte `at` of each block.
pub(super) fn place_scales<const N: usize>(
    rows: &[&[u8]; ROWS],
    block_bytes: usize,
    at: usize,
    plane: &mut [u8],
) {
    for (r, row) in rows.iter().enumerate() {
        let place = N * (2 * (r % 8) + r / 8);
        for (s, to) in plane.chunks_exact_mut(ROWS * N).enumerate() {
            let scale = row.get(s * block_bytes + at..s * block_bytes + at + N).unwrap_or(&[0; N]);
            to[place..place + N].copy_from_slice(scale);
        }
    }
}

/// Plane `[8 g, 4 t, 2 rows, 4 i]` of one byte a sub-block of 16: sub-block `4i + t` of the block
/// that each row is has byte `at + 4i + t`.
pub(super) fn place_sixteen(rows: &[&[u8]; ROWS], at: usize, plane: &mut [u8]) {
    for (r, row) in rows.iter().enumerate() {
        let scales = row.get(at..at + 16).unwrap_or(&[0; 16]);
        for (j, scale) in scales.iter().enumerate() {
            plane[8 * (4 * (r % 8) + j % 4) + 4 * (r / 8) + j / 4] = *scale;
        }
    }
}

/// Bytes of the planes of [`place_six_bits`].
pub(super) const SIX_BITS: usize = 192;

/// Planes of four 6-bit fields a row and lane, `fields(row, t)`: `[8 g, 4 t, 4]` bytes with the
/// field of row `g` and, above it, bits 4 and 5 of that of row `g + 8`; then `[8 g, 4 t]` u16 with
/// the latter's low nibbles in the order 0, 2, 1, 3. A row past the matrix has zeros.
pub(super) fn place_six_bits(
    rows: &[&[u8]; ROWS],
    fields: impl Fn(&[u8], usize) -> [u8; 4],
    planes: &mut [u8],
) {
    let (words, nibbles) = planes.split_at_mut(128);
    let of = |row: &[u8], t| if row.is_empty() { [0; 4] } else { fields(row, t) };
    for g in 0..ROWS / 2 {
        for t in 0..4 {
            let (low, high, lane) = (of(rows[g], t), of(rows[g + 8], t), 4 * g + t);
            for i in 0..4 {
                words[4 * lane + i] = low[i] | (high[i] >> 4 << 6);
            }
            let n = high.map(|field| field & 15);
            nibbles[2 * lane] = n[0] | (n[2] << 4);
            nibbles[2 * lane + 1] = n[1] | (n[3] << 4);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{f16, half_at, half_of};

    #[test]
    fn every_half_converts_as_ieee_says() {
        for h in 0..=u16::MAX {
            let want = f16::from_bits(h).to_f32().to_bits();
            assert_eq!(half_at(&h.to_le_bytes(), 0).to_bits(), want, "{h:#06x}");
            assert_eq!(half_of(h).to_bits(), want, "{h:#06x}");
        }
    }
}
