//! Seeded contents of a cache, the same on every backend: uniform with mean 0 and variance 1, rounded
//! to f16, so that a cache of either element type holds the same values.
//!
//! ```text
//! stream s = mix(seed) + (layer · 2 + half) · 2^32
//! row    r = mix(mix(s + head) + position)
//! value    = f16(((mix(r + i) >> 40) / 2^24 − 1/2) · √12)     one rounding to f32, one to f16
//! ```
//!
//! Neither the capacity nor the number of heads enters: a longer cache begins like a shorter one.
//! A device computes the same (`ptx/probe.cu`).

use half::f16;

/// The two halves of a layer's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CacheHalf {
    /// Keys.
    Keys,
    /// Values.
    Values,
}

/// Increment of splitmix64: 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finaliser of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
/// generators", 2014) after one increment.
fn mix64(x: u64) -> u64 {
    let x = x.wrapping_add(GOLDEN);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Where the values of half a layer's cache come from: `mix(seed) + (layer · 2 + half) · 2^32`.
pub(crate) fn stream(seed: u64, layer: u32, half: CacheHalf) -> u64 {
    let half = u64::from(half == CacheHalf::Values);
    mix64(seed).wrapping_add((u64::from(layer) * 2 + half) << 32)
}

/// Cache contents of one head at one position, `[head_dim]`.
pub(crate) fn fill_row(stream: u64, head: u32, position: u32, out: &mut [f32]) {
    let head = mix64(stream.wrapping_add(u64::from(head)));
    let row = mix64(head.wrapping_add(u64::from(position)));
    for (i, out) in (0u64..).zip(out) {
        // 24 bits and their distance from a half: exact in f32.
        let uniform = (mix64(row.wrapping_add(i)) >> 40) as f32 / 16_777_216.0;
        *out = f16::from_f32((uniform - 0.5) * 3.464_101_6).to_f32();
    }
}

#[cfg(test)]
mod tests {
    use super::{CacheHalf, fill_row, stream};

    #[test]
    fn seeded_cache_rows_have_unit_variance_are_f16_and_differ_by_every_coordinate() {
        let row = |seed, layer, half, head, position| {
            let mut out = vec![0.0; 64];
            fill_row(stream(seed, layer, half), head, position, &mut out);
            out
        };
        let base = row(1, 2, CacheHalf::Keys, 3, 4);
        assert_eq!(base, row(1, 2, CacheHalf::Keys, 3, 4));
        for other in [
            row(2, 2, CacheHalf::Keys, 3, 4),
            row(1, 3, CacheHalf::Keys, 3, 4),
            row(1, 2, CacheHalf::Values, 3, 4),
            row(1, 2, CacheHalf::Keys, 4, 4),
            row(1, 2, CacheHalf::Keys, 3, 5),
        ] {
            let same = base.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!(same <= 2, "{same} of 64 values are equal");
        }
        let all: Vec<f32> = (0..100).flat_map(|p| row(7, 0, CacheHalf::Keys, 0, p)).collect();
        assert!(all.iter().all(|v| half::f16::from_f32(*v).to_f32() == *v));
        let mean = all.iter().sum::<f32>() / all.len() as f32;
        let variance = all.iter().map(|v| v * v).sum::<f32>() / all.len() as f32;
        assert!(mean.abs() < 0.05 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
    }
}
