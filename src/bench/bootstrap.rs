//! Percentile bootstrap (Efron, "Bootstrap methods: another look at the jackknife", 1979): how
//! sure is a statistic, from the samples alone.

use super::stats::Sorted;

/// Times that the samples are drawn anew.
const DRAWS: usize = 2000;

/// A sequence that is the same in every run: splitmix64 (Steele, Lea, Flood, 2014).
#[derive(Clone, Copy, Debug)]
pub struct Draws(u64);

impl Draws {
    /// The sequence of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// As many of `from` as it has, with replacement, into `to`.
    fn resample(&mut self, from: &[f64], to: &mut Vec<f64>) {
        to.clear();
        // The bias of a remainder by a count of samples is below 2^-32.
        to.extend(from.iter().map(|_| from[(self.bits() % from.len() as u64) as usize]));
    }
}

/// The interval that holds the fraction `level` of `statistic` over samples drawn anew; the
/// statistic gets one redrawn set for each of `sets`. NaN for an empty set.
fn interval<const N: usize>(
    sets: [&[f64]; N],
    level: f64,
    statistic: impl Fn(&mut [Vec<f64>; N]) -> f64,
) -> (f64, f64) {
    if sets.iter().any(|s| s.is_empty()) {
        return (f64::NAN, f64::NAN);
    }
    let mut draws = Draws::new(1);
    let mut drawn: [Vec<f64>; N] = std::array::from_fn(|_| Vec::new());
    let values = Sorted::new((0..DRAWS).map(|_| {
        drawn.iter_mut().zip(sets).for_each(|(to, from)| draws.resample(from, to));
        statistic(&mut drawn)
    }));
    let at = |q| values.quantile(q).unwrap_or(f64::NAN);
    (at((1.0 - level) / 2.0), at((1.0 + level) / 2.0))
}

/// Middle of the order statistics; the samples end up in another order.
fn median(samples: &mut [f64]) -> f64 {
    let n = samples.len();
    let (below, middle, _) = samples.select_nth_unstable_by(n / 2, f64::total_cmp);
    if n % 2 == 1 {
        return *middle;
    }
    (below.iter().copied().fold(f64::NEG_INFINITY, f64::max) + *middle) / 2.0
}

/// Of median(`new`) / median(`base`).
pub fn ratio_of_medians(base: &[f64], new: &[f64], level: f64) -> (f64, f64) {
    interval([base, new], level, |[base, new]| median(new) / median(base))
}

/// Of the median of `samples`.
pub fn of_median(samples: &[f64], level: f64) -> (f64, f64) {
    interval([samples], level, |[samples]| median(samples))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_that_of_the_sorted_samples() {
        for n in 1..9 {
            let mut draws = Draws::new(n);
            let samples: Vec<f64> = (0..n).map(|_| (draws.bits() % 10) as f64).collect();
            let sorted = Sorted::new(samples.clone()).median().unwrap();
            assert_eq!(median(&mut samples.clone()), sorted, "{samples:?}");
        }
    }

    #[test]
    fn an_interval_holds_the_statistic_and_narrows_with_more_samples() {
        let samples = |n: u64| (0..n).map(|i| 100.0 + (i * 7 % 10) as f64).collect::<Vec<_>>();
        let width = |n| {
            let (low, high) = of_median(&samples(n), 0.95);
            assert!(low <= 104.5 && 104.5 <= high, "{low} {high}");
            high - low
        };
        assert!(width(400) < width(20));
        let (low, high) = ratio_of_medians(&samples(50), &samples(50), 0.99);
        assert!(low < 1.0 && 1.0 < high);
        assert!(of_median(&[], 0.9).0.is_nan());
    }
}
