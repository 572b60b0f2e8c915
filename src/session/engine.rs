//! What a session asks of whoever computes: the CPU reference or a CUDA device.

use super::{Chosen, DeviceInfo, EngineStats};
use crate::error::Result;
use half::f16;
use std::io::Write;
use std::ops::ControlFlow;

/// A plan bound to memory, ready to compute positions one after another.
///
/// The session has checked what it passes on: positions are below the capacity, token ids below
/// the vocabulary.
pub(crate) trait Engine {
    /// What it runs on.
    fn info(&self) -> &DeviceInfo;
    /// `cuda` or `cpu`.
    fn backend(&self) -> &'static str;
    /// `graph`, `eager` or `reference`.
    fn mode(&self) -> &'static str;
    /// Counters since it was made.
    fn stats(&self) -> EngineStats;
    /// The next step computes `position`.
    fn seek(&mut self, position: u32) -> Result<()>;
    /// Inputs of `position..`, in place of what was forced before; every other position takes the
    /// token chosen before it.
    fn force(&mut self, position: u32, tokens: &[u32]) -> Result<()>;
    /// Computes `steps` positions; `sink` sees each chosen token once, in order, and may stop.
    /// Gives the steps that count: after a stop the next step computes the position after the
    /// last one that the sink has seen.
    fn run(&mut self, steps: u32, sink: &mut dyn FnMut(Chosen) -> ControlFlow<()>) -> Result<u32>;
    /// Logits of the last step, `[vocab]`.
    fn logits(&mut self) -> Result<Vec<f32>>;
    /// Fills positions `0..positions` of all caches with [`fill_row`].
    fn fill_cache(&mut self, positions: u32, seed: u64) -> Result<()>;
    /// Keys and values of a layer, `[kv_heads, capacity, head_dim]` each.
    fn cache(&mut self, layer: u32) -> Result<(Vec<f32>, Vec<f32>)>;
    /// Readings of the clock in the last step, `[steps][blocks][8]`; empty where none are kept.
    fn trace(&mut self) -> Result<Vec<u32>>;
    /// Debug lines go to `out` from here on; the log until then.
    fn debug_to(&mut self, out: Box<dyn Write + Send>);
}

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

/// Seeded cache contents of one head at one position, `[head_dim]`: uniform with mean 0 and
/// variance 1, rounded to f16, so that a cache of either element type holds the same values.
///
/// ```text
/// key    k = mix(mix(seed) + (layer · 2 + half) · 2^32 + head)
/// row    r = mix(k + position)
/// out[i]   = f16(((mix(r + i) >> 40) / 2^24 − 1/2) · √12)
/// ```
pub(crate) fn fill_row(
    seed: u64,
    layer: u32,
    half: CacheHalf,
    head: u32,
    position: u32,
    out: &mut [f32],
) {
    let half = u64::from(half == CacheHalf::Values);
    let which = ((u64::from(layer) * 2 + half) << 32) | u64::from(head);
    let row = mix64(mix64(mix64(seed).wrapping_add(which)).wrapping_add(u64::from(position)));
    for (i, out) in (0u64..).zip(out) {
        // 24 bits: exact in f32, as on a device.
        let uniform = (mix64(row.wrapping_add(i)) >> 40) as f32 / 16_777_216.0;
        *out = f16::from_f32((uniform - 0.5) * 3.464_101_6).to_f32();
    }
}

#[cfg(test)]
mod tests {
    use super::{CacheHalf, fill_row};

    #[test]
    fn seeded_cache_rows_have_unit_variance_are_f16_and_differ_by_every_coordinate() {
        let row = |seed, layer, half, head, position| {
            let mut out = vec![0.0; 64];
            fill_row(seed, layer, half, head, position, &mut out);
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
