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

/// Values that [`normals`] makes at a time.
const PIECE: usize = 64;

/// Fills `blocks` `[n, N]` with values that are approximately normal with mean 0 and deviation
/// `sigma`, each as `bytes_of` writes it: the sum of the four bytes of a word.
///
/// Words are drawn for a piece at a time: the draws cannot become vectors, the arithmetic does.
pub(super) fn normals<const N: usize>(
    sigma: f32,
    bits: Bits<'_>,
    blocks: &mut [u8],
    bytes_of: impl Fn(f32) -> [u8; N],
) {
    let unit = sigma / BYTE_SUM_SQUARE.sqrt();
    let mut words = [0; PIECE];
    for piece in blocks.chunks_mut(PIECE * N) {
        let values = piece.as_chunks_mut::<N>().0;
        let words = &mut words[..values.len()];
        words.iter_mut().for_each(|word| *word = bits());
        for (value, word) in values.iter_mut().zip(words) {
            let pairs = (*word & 0x00ff_00ff) + (*word >> 8 & 0x00ff_00ff);
            let sum = (pairs & 0xffff) + (pairs >> 16);
            *value = bytes_of((sum as i32 - 510) as f32 * unit);
        }
    }
}

/// Writes `value` as f16 at byte `at` of `block`.
pub(super) fn put_half(block: &mut [u8], at: usize, value: f32) {
    block[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}
