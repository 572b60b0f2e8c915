//! `next` is drawn with `p_i ∝ e^{logits[i] / T}` among the most probable tokens, then token and
//! position advance
//!
//! ```text
//! w[i]   = ⌊2^40 · 2^{(logits[i] − max) · log₂e / T}⌋                     the weights
//! kept   = { i : logits[i] ≥ the top_k-th largest logit }                 top-k
//!        ∩ { i : logits[i] ≥ the largest t with Σ_{logits ≥ t} w ≥ top_p Σ_{top-k} w }   top-p
//!        ∩ { i : w[i] ≥ min_p · 2^40 }                                    min-p
//! r      = ⌊Σ_kept w · u / 2^64⌋,  u = Philox4x32-10(seed, position)
//! next   = the first kept i, in order of ids, with Σ_{kept j ≤ i} w[j] > r
//! ```
//!
//! Weights and sums are integers, so that no order of additions changes them, and the exponential
//! is a fixed sequence of f32 operations: from the same logits, seed and position a device draws
//! the token that the CPU draws. Tokens of equal logits at a cut are all kept.

use super::{Arg, Buf, Describe, Gpu, HostMemory, Launch, Traffic, WeightId};
use crate::error::{Error, Result};

/// The weight of the largest logit: 2^40.
const BEST: u64 = 1 << 40;
/// Fractions are passed in units of 2^-31.
const FRACTION_BITS: u32 = 31;
/// Coefficients of the Taylor series of 2^f, highest first: `ln(2)^k / k!`. On |f| ≤ 1/2 the rest
/// is below 2e-7, as the rounding is.
const EXP2: [f32; 7] = [
    0.000_154_035_3,
    0.001_333_355_8,
    0.009_618_129,
    0.055_504_11,
    0.240_226_5,
    std::f32::consts::LN_2,
    1.0,
];

/// How the next token is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Temperature T, 0.001 to 1000.
    pub temperature: f32,
    /// Only this many most probable tokens; 0 is all.
    pub top_k: u32,
    /// Only the most probable tokens that have this probability together, 0 to 1.
    pub top_p: f32,
    /// Only tokens at least this fraction as probable as the most probable one, 0 to 1.
    pub min_p: f32,
    /// Seed: with the position it decides the draw.
    pub seed: u64,
}

impl Sampling {
    /// `self`, if every number is within its range.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] that names the range.
    pub fn checked(self) -> Result<Self> {
        let fraction = 0.0..=1.0;
        // Comparisons that are false for what is not a number.
        if !(0.001..=1000.0).contains(&self.temperature) {
            let what = "a temperature of sampling is 0.001 to 1000; 0 does not sample";
            return Err(Error::Usage(what.to_owned()));
        }
        if !fraction.contains(&self.top_p) || !fraction.contains(&self.min_p) {
            return Err(Error::Usage("top-p and min-p are numbers from 0 to 1".to_owned()));
        }
        Ok(self)
    }

    /// `log₂e / T`.
    fn scale(&self) -> f32 {
        std::f32::consts::LOG2_E / self.temperature
    }

    /// The token after `position`, from `logits` `[vocab]`; `None` when one is not finite, or
    /// there are none.
    pub fn choose(&self, logits: &[f32], position: u32) -> Option<u32> {
        if logits.is_empty() || logits.iter().any(|l| !l.is_finite()) {
            return None;
        }
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let scale = self.scale();
        // (key, weight) of each token.
        let all: Vec<(u32, u64)> =
            logits.iter().map(|&l| (key(l), weight(l, best, scale))).collect();
        let mut ranked = all.clone();
        ranked.sort_unstable_by(|a, b| b.cmp(a));
        let mut lowest = 0;
        if self.top_k > 0
            && let Some((cut, _)) = ranked.get(self.top_k as usize - 1)
        {
            lowest = *cut;
        }
        if self.top_p < 1.0 {
            let mass = ranked.iter().filter(|(key, _)| *key >= lowest).map(|(_, w)| w).sum();
            let target = part(mass, fixed(self.top_p)).max(1);
            let mut reached = 0;
            for (key, w) in &ranked {
                reached += w;
                if reached >= target {
                    lowest = lowest.max(*key);
                    break;
                }
            }
        }
        let least = part(BEST, fixed(self.min_p));
        let kept = |&(key, w): &(u32, u64)| if key >= lowest && w >= least { w } else { 0 };
        let mass: u64 = all.iter().map(kept).sum();
        let r = ((u128::from(mass) * u128::from(random(self.seed, position))) >> 64) as u64;
        let mut below = 0;
        let found = all.iter().map(kept).position(|w| {
            below += w;
            below > r
        });
        found.map(|i| i as u32)
    }
}

/// In units of 2^-31, rounded.
fn fixed(fraction: f32) -> u32 {
    (f64::from(fraction) * f64::from(1u32 << FRACTION_BITS)).round() as u32
}

/// `⌊mass · fraction / 2^31⌋`, in steps that 64 bits hold: a mass is below 2^58.
fn part(mass: u64, fraction: u32) -> u64 {
    let fraction = u64::from(fraction);
    let low_bits = (1u64 << FRACTION_BITS) - 1;
    (mass >> FRACTION_BITS) * fraction + (((mass & low_bits) * fraction) >> FRACTION_BITS)
}

/// A number whose order is that of finite floats; the zeros are one.
fn key(logit: f32) -> u32 {
    let bits = (logit + 0.0).to_bits();
    if bits >> 31 == 0 { bits | 0x8000_0000 } else { !bits }
}

/// `⌊2^40 · 2^((logit − best) · scale)⌋` up to the rounding of f32; 0 below 2^-40.
fn weight(logit: f32, best: f32, scale: f32) -> u64 {
    let y = (logit - best) * scale;
    if y < -40.0 {
        return 0;
    }
    let n = y.round_ties_even();
    let f = y - n;
    let power = EXP2.into_iter().reduce(|sum, c| sum * f + c).unwrap_or(1.0);
    // 2^23 · 2^f, then the rest of the scale and 2^n.
    let mantissa = (power * 8_388_608.0) as u64;
    (mantissa << 17) >> (-n) as u32
}

/// 64 bits for each seed and position: the first two words of Philox4x32-10 (Salmon, Moraes,
/// Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011).
fn random(seed: u64, position: u32) -> u64 {
    let [low, high, ..] = philox([position, 0, 0, 0], [seed as u32, (seed >> 32) as u32]);
    u64::from(high) << 32 | u64::from(low)
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let [a, b] = [(counter[0], 0xD251_1F53u32), (counter[2], 0xCD9E_8D57)]
            .map(|(x, m)| u64::from(x) * u64::from(m));
        let (high_a, high_b) = ((a >> 32) as u32, (b >> 32) as u32);
        counter = [high_b ^ counter[1] ^ key[0], b as u32, high_a ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// Draws the next token and advances the step state, in place of [`Argmax`](super::Argmax).
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// `[vocab]` f32.
    pub logits: Buf,
    /// Elements.
    pub vocab: u32,
    /// How.
    pub sampling: Sampling,
}

impl Describe for Sample {
    fn name(&self) -> &'static str {
        "sample"
    }

    fn shape(&self) -> String {
        format!("[{}]", self.vocab)
    }

    fn reads(&self) -> Vec<Buf> {
        vec![self.logits]
    }

    fn writes(&self) -> Vec<Buf> {
        vec![]
    }

    fn weights(&self) -> Vec<WeightId> {
        vec![]
    }

    fn traffic(&self, _position: u32) -> Traffic {
        // Once; further passes find the logits in L2.
        Traffic { weights: 0, kv: 0, activations: 4 * u64::from(self.vocab) }
    }

    fn launch(&self, _gpu: &Gpu) -> Launch {
        let s = &self.sampling;
        Launch {
            module: "sample".into(),
            kernel: "sample".into(),
            // One block: its passes meet at barriers.
            grid: 1,
            block: 1024,
            cluster: 1,
            shared_bytes: 0,
            programmatic: true,
            args: vec![
                Arg::Step,
                Arg::Buf(self.logits),
                Arg::Forced,
                Arg::Ring,
                Arg::U32(self.vocab),
                Arg::F32(s.scale()),
                Arg::U32(s.top_k),
                Arg::U32(fixed(s.top_p)),
                Arg::U32(fixed(s.min_p)),
                Arg::U32(s.seed as u32),
                Arg::U32((s.seed >> 32) as u32),
            ],
        }
    }

    fn reference(&self, mem: &mut HostMemory) {
        let chosen = self.sampling.choose(mem.buf(self.logits), mem.state.position);
        mem.state.finite = chosen.is_some();
        mem.state.next = chosen.unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [0.0, 3.0, 1.0, 3.0, 2.0];

    fn sampling(top_k: u32, top_p: f32, min_p: f32) -> Sampling {
        Sampling { temperature: 1.0, top_k, top_p, min_p, seed: 7 }
    }

    fn draws(s: Sampling, n: u32) -> Vec<u32> {
        (0..n).map(|p| s.choose(&LOGITS, p).unwrap()).collect()
    }

    #[test]
    fn philox_gives_the_published_numbers() {
        // Known answers of Random123 1.14, `kat_vectors`.
        let zeros = [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8];
        assert_eq!(philox([0; 4], [0; 2]), zeros);
        let ones = [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd];
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), ones);
    }

    #[test]
    fn a_draw_depends_on_seed_and_position_only() {
        let s = sampling(0, 1.0, 0.0);
        assert_eq!(draws(s, 200), draws(s, 200));
        assert_ne!(draws(s, 200), draws(Sampling { seed: 8, ..s }, 200));
        assert_ne!(draws(s, 200), draws(Sampling { seed: 7 | 1 << 40, ..s }, 200));
    }

    #[test]
    fn draws_follow_the_probabilities_at_any_temperature() {
        for temperature in [0.5f32, 1.0, 3.0] {
            let s = Sampling { temperature, ..sampling(0, 1.0, 0.0) };
            let n = 20_000;
            let mut seen = [0.0; 5];
            draws(s, n).into_iter().for_each(|id| seen[id as usize] += 1.0 / f64::from(n));
            let p = LOGITS.map(|l| f64::from(l / temperature).exp());
            let all: f64 = p.iter().sum();
            for (p, share) in p.iter().zip(seen) {
                assert!((p / all - share).abs() < 0.01, "{temperature}: {seen:?}");
            }
        }
    }

    #[test]
    fn weights_are_the_exponential_to_the_rounding_of_f32() {
        for i in 0..4000 {
            let logit = -0.007 * i as f32;
            let exact = (f64::from(logit) * std::f64::consts::LOG2_E).exp2() * BEST as f64;
            let found = weight(logit, 0.0, std::f32::consts::LOG2_E) as f64;
            assert!((found - exact).abs() <= 4e-6 * exact + 1.0, "{logit}: {found} {exact}");
        }
        assert_eq!(weight(5.0, 5.0, 1.0), BEST);
        assert_eq!(weight(f32::MIN, f32::MAX, 1.0), 0);
    }

    #[test]
    fn each_cut_leaves_the_rest_out() {
        let only = |s, kept: &[u32]| {
            let seen = draws(s, 500);
            assert!(seen.iter().all(|id| kept.contains(id)), "{s:?}: {seen:?}");
            assert!(kept.iter().all(|id| seen.contains(id)), "{s:?}: {seen:?}");
        };
        only(sampling(0, 1.0, 0.0), &[0, 1, 2, 3, 4]);
        only(sampling(2, 1.0, 0.0), &[1, 3]);
        // Of equal logits at the cut all are kept.
        only(sampling(1, 1.0, 0.0), &[1, 3]);
        only(sampling(3, 1.0, 0.0), &[1, 3, 4]);
        only(sampling(99, 1.0, 0.0), &[0, 1, 2, 3, 4]);
        // The two largest have 0.77 of the probability together.
        only(sampling(0, 0.7, 0.0), &[1, 3]);
        only(sampling(0, 0.8, 0.0), &[1, 3, 4]);
        only(sampling(0, 0.0, 0.0), &[1, 3]);
        // Of the three that top-k leaves, the two largest have 0.84.
        only(sampling(3, 0.8, 0.0), &[1, 3]);
        // e^-1 = 0.37, e^-2 = 0.14.
        only(sampling(0, 1.0, 0.3), &[1, 3, 4]);
        only(sampling(0, 1.0, 1.0), &[1, 3]);
    }

    #[test]
    fn keys_are_ordered_as_floats_are() {
        let ascending = [f32::MIN, -1.5, -1e-30, -0.0, 1e-30, 2.0, f32::MAX];
        assert!(ascending.windows(2).all(|w| key(w[0]) < key(w[1])));
        assert_eq!(key(-0.0), key(0.0));
    }

    #[test]
    fn logits_that_are_not_finite_choose_nothing() {
        let s = sampling(0, 1.0, 0.0);
        assert_eq!(s.choose(&[0.0, f32::NAN], 0), None);
        assert_eq!(s.choose(&[0.0, f32::INFINITY], 0), None);
        assert_eq!(s.choose(&[], 0), None);
    }

    #[test]
    fn numbers_outside_their_range_are_refused() {
        let good = sampling(0, 1.0, 0.0);
        assert!(good.checked().is_ok());
        for bad in [
            Sampling { temperature: 0.0, ..good },
            Sampling { temperature: f32::NAN, ..good },
            Sampling { temperature: f32::INFINITY, ..good },
            Sampling { top_p: -0.1, ..good },
            Sampling { min_p: 1.1, ..good },
            Sampling { min_p: f32::NAN, ..good },
        ] {
            assert!(matches!(bad.checked(), Err(Error::Usage(_))), "{bad:?}");
        }
    }

    #[test]
    fn a_part_of_a_mass_is_exact_in_64_bits() {
        for (mass, fraction) in [(BEST, 1u32 << 31), (u64::MAX >> 6, 1 << 31), (12_345, 99), (0, 7)]
        {
            let exact = (u128::from(mass) * u128::from(fraction)) >> 31;
            assert_eq!(u128::from(part(mass, fraction)), exact);
        }
    }
}
