//! `out[h] = Σ_p softmax_p(scale · q[h] · keys[g(h), p]) values[g(h), p]`, `p ≤ position`,
//! `g(h) = h · kv_heads / heads`

use super::product::dot;
use super::{Arg, Buf, CacheRef, Describe, Gpu, HostMemory, Launch, Traffic, WeightId};
use rayon::prelude::*;

/// Attention of one token over the cache; the query heads of a group share keys and values.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// `[heads, head_dim]` f32.
    pub q: Buf,
    /// Keys and values, this token's included.
    pub cache: CacheRef,
    /// `[heads, head_dim]` f32.
    pub out: Buf,
    /// Partial results of the context splits, f32.
    pub partial: Buf,
    /// Query heads; a multiple of the cache's heads.
    pub heads: u32,
    /// Factor on the scores, normally `1 / sqrt(head_dim)`.
    pub scale: f32,
}

impl Attention {
    /// Query heads that share one key/value head.
    pub fn group(&self) -> u32 {
        self.heads / self.cache.kv_heads
    }

    /// Blocks of a key/value head: parts of the context, or for a short one query heads and parts.
    /// Depends on the capacity, never on the position, so that one graph serves every depth.
    pub fn splits(cache: &CacheRef, heads: u32, sms: u32) -> u32 {
        (sms / cache.kv_heads).clamp(1, Self::MOST_SPLITS).min(Self::useful(cache, heads))
    }

    /// Parts of the context at most, on any device.
    const MOST_SPLITS: u32 = 64;

    /// A part shorter than 64 positions costs more to combine than it saves; but every query head
    /// of a group may have a block of its own.
    fn useful(cache: &CacheRef, heads: u32) -> u32 {
        cache.capacity.div_ceil(64).max(heads / cache.kv_heads).max(1)
    }

    /// f32 elements of `partial`: per split and query head the weighted values, the maximum and
    /// the sum.
    pub fn partial_len(heads: u32, cache: &CacheRef) -> u32 {
        // Sized for the largest split count that any device gets, so that the layout of the
        // workspace does not depend on the device.
        Self::MOST_SPLITS.min(Self::useful(cache, heads)) * heads * (cache.head_dim + 2)
    }
}

impl Describe for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn shape(&self) -> String {
        let c = &self.cache;
        format!("[{}, {}] over {} {} heads", self.heads, c.head_dim, c.kv_heads, c.kind.name())
    }

    fn reads(&self) -> Vec<Buf> {
        vec![self.q]
    }

    fn writes(&self) -> Vec<Buf> {
        vec![self.out, self.partial]
    }

    fn weights(&self) -> Vec<WeightId> {
        vec![]
    }

    fn traffic(&self, position: u32) -> Traffic {
        let c = &self.cache;
        let per_position = 2 * u64::from(c.kv_heads * c.head_dim) * c.kind.bytes();
        let io = 8 * u64::from(self.heads * c.head_dim);
        Traffic { weights: 0, kv: per_position * (u64::from(position) + 1), activations: io }
    }

    fn launch(&self, gpu: &Gpu) -> Launch {
        let c = &self.cache;
        let splits = Self::splits(c, self.heads, gpu.sms);
        Launch {
            module: format!("attention_{}", c.kind.name()),
            kernel: format!("attention_{}", c.kind.name()),
            grid: c.kv_heads * splits,
            block: 256,
            cluster: 1,
            shared_bytes: 0,
            programmatic: true,
            args: vec![
                Arg::Step,
                Arg::Buf(self.q),
                Arg::Keys(c.layer),
                Arg::Values(c.layer),
                Arg::Buf(self.out),
                Arg::Buf(self.partial),
                Arg::Counters,
                Arg::U32(self.group()),
                Arg::U32(c.kv_heads),
                Arg::U32(c.head_dim),
                Arg::U32(c.capacity),
                Arg::U32(splits),
                Arg::F32(self.scale),
            ],
        }
    }

    fn reference(&self, mem: &mut HostMemory) {
        let q = mem.buf(self.q).to_vec();
        let (c, n) = (self.cache, mem.state.position as usize + 1);
        let (dim, capacity, group) = (c.head_dim as usize, c.capacity as usize, self.group());
        let mut out = vec![0.0f32; q.len()];
        let (keys, values) = mem.cache(c.layer);
        out.par_chunks_exact_mut(dim).enumerate().for_each(|(h, out)| {
            let base = h / group as usize * capacity * dim;
            let at = |p: usize| base + p * dim..base + (p + 1) * dim;
            let q = &q[h * dim..(h + 1) * dim];
            let mut w: Vec<f32> = (0..n).map(|p| self.scale * dot(q, &keys[at(p)])).collect();
            let max = w.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            w.iter_mut().for_each(|w| *w = (*w - max).exp());
            let sum: f64 = w.iter().map(|w| f64::from(*w)).sum();
            for (p, w) in w.iter().enumerate() {
                for (o, v) in out.iter_mut().zip(&values[at(p)]) {
                    *o += w * v;
                }
            }
            out.iter_mut().for_each(|o| *o = (f64::from(*o) / sum) as f32);
        });
        mem.buf_mut(self.out)[..out.len()].copy_from_slice(&out);
    }
}
