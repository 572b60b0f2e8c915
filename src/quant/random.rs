//! Seeded random weights: uniform quants, and scales that bring them to a wanted deviation.

use half::f16;

/// An endless source of uniform 32-bit words.
pub(super) type Bits<'a> = &'a mut dyn FnMut() -> u32;

/// Mean of the square of [`spread`].
pub(super) const SPREAD_SQUARE: f32 = 13.0 / 12.0;

/// Mean of the square of a sum of four uniform bytes about its mean.
const BYTE_SUM_SQUARE: f32 = 4.0 * 65535.0 / 12.0;

/// Fills `bytes` with whole words of `bits`, little-endian.
pub(super) fn fill(bytes: &mut [u8], bits: Bits<'_>) {
    for chunk in bytes.chunks_mut(4) {
        chunk.copy_from_slice(&bits().to_le_bytes()[..chunk.len()]);
    }
}

/// Uniform in [0.5, 1.5): makes neighbouring scales differ, so that a kernel that takes the wrong
/// one is seen.
pub(super) fn spread(bits: Bits<'_>) -> f32 {
    0.5 + (bits() >> 8) as f32 / (1 << 24) as f32
}

/// [`spread`] with a random sign: cancels the mean of quants that are not symmetric about zero.
pub(super) fn signed_spread(bits: Bits<'_>) -> f32 {
    let word = bits();
    let magnitude = 0.5 + (word >> 8) as f32 / (1 << 24) as f32;
    if word & 1 == 0 { magnitude } else { -magnitude }
}

/// Approximately normal with mean 0 and deviation `sigma`: the sum of four uniform bytes.
pub(super) fn normal(sigma: f32, bits: Bits<'_>) -> f32 {
    let sum: i32 = bits().to_le_bytes().into_iter().map(i32::from).sum();
    (sum - 510) as f32 * (sigma / BYTE_SUM_SQUARE.sqrt())
}

/// Writes `value` as f16 at byte `at` of `block`.
pub(super) fn put_half(block: &mut [u8], at: usize, value: f32) {
    block[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}
