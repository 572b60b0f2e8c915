//! Statistics of samples. Unit in, unit out: nothing here knows that samples are times.

/// Samples that a 99th percentile needs: below it the value is one of the largest two.
pub const P99_SAMPLES: usize = 100;

/// Modified z-score beyond which a sample is an outlier (Iglewicz and Hoaglin, "How to detect and
/// handle outliers", 1993).
const OUTLIER: f64 = 3.5;

/// Σx / n; 0 for no samples.
pub fn mean(samples: &[f64]) -> f64 {
    if samples.is_empty() { 0.0 } else { samples.iter().sum::<f64>() / samples.len() as f64 }
}

/// √(Σ(x − mean)² / (n − 1)); 0 for fewer than two samples.
pub fn standard_deviation(samples: &[f64]) -> f64 {
    if samples.len() < 2 {
        return 0.0;
    }
    let m = mean(samples);
    let squares: f64 = samples.iter().map(|x| (x - m).powi(2)).sum();
    (squares / (samples.len() - 1) as f64).sqrt()
}

/// Samples in ascending order.
#[derive(Clone, Debug, Default)]
pub struct Sorted(Vec<f64>);

impl Sorted {
    /// Sorts; samples that are not numbers are dropped.
    pub fn new(samples: impl IntoIterator<Item = f64>) -> Self {
        let mut all: Vec<f64> = samples.into_iter().filter(|x| !x.is_nan()).collect();
        all.sort_by(f64::total_cmp);
        Self(all)
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value below which the fraction `q` (0 to 1) of the samples lies: linear between the
    /// two order statistics next to `q (n − 1)`. `None` for no samples.
    pub fn quantile(&self, q: f64) -> Option<f64> {
        let last = self.0.len().checked_sub(1)?;
        let at = q.clamp(0.0, 1.0) * last as f64;
        let below = self.0[at.floor() as usize];
        let above = self.0[at.ceil() as usize];
        Some(below + (above - below) * at.fract())
    }

    /// The 0.5 quantile.
    pub fn median(&self) -> Option<f64> {
        self.quantile(0.5)
    }

    /// What is no outlier: `median ± 3.5 MAD / 0.6745`, where MAD is the median of
    /// |x − median|. Everything where MAD is 0 or there are no samples.
    pub fn ordinary(&self) -> std::ops::RangeInclusive<f64> {
        let everything = f64::NEG_INFINITY..=f64::INFINITY;
        let Some(center) = self.median() else { return everything };
        let deviations = Self::new(self.0.iter().map(|x| (x - center).abs()));
        match deviations.median() {
            Some(mad) if mad > 0.0 => {
                let reach = OUTLIER * mad / 0.6745;
                center - reach..=center + reach
            }
            _ => everything,
        }
    }

    /// Samples outside [`Sorted::ordinary`].
    pub fn outliers(&self) -> usize {
        let ordinary = self.ordinary();
        self.0.iter().filter(|x| !ordinary.contains(x)).count()
    }
}

/// What is printed about a distribution. Everything has the unit of the samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Number of samples.
    pub n: usize,
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile, with at least [`P99_SAMPLES`] samples.
    pub p99: Option<f64>,
    /// Largest.
    pub max: f64,
    /// Samples far from the median ([`Sorted::outliers`]).
    pub outliers: usize,
}

impl Summary {
    /// Summarises; `None` for no samples.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let sorted = Sorted::new(samples.iter().copied());
        Some(Self {
            n: sorted.len(),
            mean: mean(&sorted.0),
            p50: sorted.median()?,
            p90: sorted.quantile(0.9)?,
            p95: sorted.quantile(0.95)?,
            p99: sorted.quantile(0.99).filter(|_| sorted.len() >= P99_SAMPLES),
            max: *sorted.0.last()?,
            outliers: sorted.outliers(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_deviation_divides_by_n_minus_one() {
        assert_eq!(standard_deviation(&[1.0, 3.0]), 2f64.sqrt());
        assert_eq!(standard_deviation(&[7.0]), 0.0);
        assert_eq!(mean(&[]), 0.0);
    }

    #[test]
    fn quantiles_interpolate_between_order_statistics() {
        let s = Sorted::new([4.0, 1.0, 3.0, 2.0]);
        assert_eq!(s.quantile(0.0), Some(1.0));
        assert_eq!(s.median(), Some(2.5));
        assert_eq!(s.quantile(1.0), Some(4.0));
        assert_eq!(Sorted::new([]).median(), None);
    }

    #[test]
    fn p99_needs_a_hundred_samples() {
        let few: Vec<f64> = (0..99).map(f64::from).collect();
        assert_eq!(Summary::of(&few).unwrap().p99, None);
        let many: Vec<f64> = (0..101).map(f64::from).collect();
        assert_eq!(Summary::of(&many).unwrap().p99, Some(99.0));
    }

    #[test]
    fn an_outlier_is_far_from_the_median_and_moves_no_median() {
        let mut samples: Vec<f64> = (0..50).map(|i| 10.0 + f64::from(i % 5) * 0.1).collect();
        assert_eq!(Sorted::new(samples.clone()).outliers(), 0);
        samples.push(1000.0);
        let summary = Summary::of(&samples).unwrap();
        assert_eq!((summary.outliers, summary.max), (1, 1000.0));
        assert!(summary.p50 < 11.0);
        // No spread at all: nothing can be called far.
        assert_eq!(Sorted::new([1.0, 1.0, 1.0, 2.0]).outliers(), 0);
    }
}
