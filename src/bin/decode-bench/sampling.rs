//! The next token from logits, on the host: the most probable one, or a draw.
//!
//! A draw depends on the seed and the position only, so a text can be continued, repeated or
//! checked from any place.

/// How to choose.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sampler {
    /// Temperature T: p ∝ exp(logit / T); 0 takes the largest logit.
    pub(crate) temperature: f32,
    /// Only this many most probable tokens; 0 is all.
    pub(crate) top_k: usize,
    /// Only the most probable tokens that have this probability together.
    pub(crate) top_p: f32,
    /// Seed.
    pub(crate) seed: u64,
}

impl Sampler {
    /// Whether no draw is made.
    pub(crate) fn is_greedy(&self) -> bool {
        self.temperature <= 0.0
    }

    /// The token after `position`, from `logits` `[vocab]`.
    pub(crate) fn choose(&self, logits: &[f32], position: u32) -> u32 {
        let k = if self.top_k == 0 || self.is_greedy() { logits.len() } else { self.top_k };
        let ranked = top(logits, if self.is_greedy() { 1 } else { k });
        let Some(&(best, largest)) = ranked.first() else { return 0 };
        if self.is_greedy() {
            return best;
        }
        let weight = |logit: f32| f64::from((logit - largest) / self.temperature).exp();
        let weights: Vec<f64> = ranked.iter().map(|&(_, logit)| weight(logit)).collect();
        let all: f64 = weights.iter().sum();
        let mut kept = 0;
        let mut mass = 0.0;
        while kept < weights.len() && (kept == 0 || mass < f64::from(self.top_p) * all) {
            mass += weights[kept];
            kept += 1;
        }
        let mut left = uniform(self.seed, position) * mass;
        for (&(id, _), weight) in ranked.iter().zip(&weights).take(kept) {
            left -= weight;
            if left < 0.0 {
                return id;
            }
        }
        ranked[kept - 1].0
    }
}

/// The `n` largest logits with their ids, largest first; of equal ones the smaller id first.
pub(crate) fn top(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let n = n.min(all.len());
    if n < all.len() {
        all.select_nth_unstable_by(n, order);
        all.truncate(n);
    }
    all.sort_unstable_by(order);
    all
}

/// A number in [0, 1) for each seed and position: the finaliser of splitmix64 (Steele, Lea,
/// Flood, 2014) over both.
fn uniform(seed: u64, position: u32) -> f64 {
    let mix = |x: u64| {
        let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    };
    (mix(mix(seed) ^ u64::from(position)) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [0.0, 3.0, 1.0, 3.0, 2.0];

    fn sampler(temperature: f32, top_k: usize, top_p: f32) -> Sampler {
        Sampler { temperature, top_k, top_p, seed: 7 }
    }

    #[test]
    fn greedy_takes_the_first_of_equal_logits() {
        assert_eq!(sampler(0.0, 40, 0.95).choose(&LOGITS, 0), 1);
        assert_eq!(top(&LOGITS, 3), [(1, 3.0), (3, 3.0), (4, 2.0)]);
        assert_eq!(top(&LOGITS, 99).len(), 5);
    }

    #[test]
    fn a_draw_depends_on_seed_and_position_only() {
        let s = sampler(1.0, 0, 1.0);
        let draws: Vec<u32> = (0..200).map(|p| s.choose(&LOGITS, p)).collect();
        let again: Vec<u32> = (0..200).map(|p| s.choose(&LOGITS, p)).collect();
        assert_eq!(draws, again);
        let other = Sampler { seed: 8, ..s };
        assert_ne!(draws, (0..200).map(|p| other.choose(&LOGITS, p)).collect::<Vec<_>>());
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let s = sampler(1.0, 0, 1.0);
        let n = 20_000;
        let mut seen = [0.0; 5];
        (0..n).for_each(|p| seen[s.choose(&LOGITS, p) as usize] += 1.0 / f64::from(n));
        let all = decode_graph::verify::logsumexp(&LOGITS);
        for (logit, share) in LOGITS.iter().zip(seen) {
            assert!(((f64::from(*logit) - all).exp() - share).abs() < 0.01, "{seen:?}");
        }
    }

    #[test]
    fn top_k_and_top_p_leave_the_rest_out() {
        let ids = |s: Sampler| (0..500).map(|p| s.choose(&LOGITS, p)).collect::<Vec<_>>();
        assert!(ids(sampler(1.0, 2, 1.0)).iter().all(|id| [1, 3].contains(id)));
        // The two largest have 0.8 of the probability together.
        assert!(ids(sampler(1.0, 0, 0.7)).iter().all(|id| [1, 3].contains(id)));
        assert!(ids(sampler(1.0, 0, 0.01)).iter().all(|id| *id == 1));
    }
}
