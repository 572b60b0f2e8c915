//! What a step wrote, in six numbers: for debug output of every backend.

/// Range and moments of a vector, over its finite elements.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    /// Least element.
    pub min: f32,
    /// Greatest element.
    pub max: f32,
    /// `Σ x / n`.
    pub mean: f64,
    /// `√(Σ x² / n)`.
    pub rms: f64,
    /// Elements that are NaN.
    pub nans: usize,
    /// Elements that are infinite.
    pub infinities: usize,
}

impl Summary {
    /// Of `values`; zeros where none is finite.
    pub fn of(values: &[f32]) -> Self {
        let nans = values.iter().filter(|v| v.is_nan()).count();
        let infinities = values.iter().filter(|v| v.is_infinite()).count();
        let n = values.len() - nans - infinities;
        if n == 0 {
            return Self { nans, infinities, ..Self::default() };
        }
        let finite = || values.iter().copied().filter(|v| v.is_finite());
        let sum: f64 = finite().map(f64::from).sum();
        let squares: f64 = finite().map(|v| f64::from(v) * f64::from(v)).sum();
        Self {
            min: finite().fold(f32::INFINITY, f32::min),
            max: finite().fold(f32::NEG_INFINITY, f32::max),
            mean: sum / n as f64,
            rms: (squares / n as f64).sqrt(),
            nans,
            infinities,
        }
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { min, max, mean, rms, nans, infinities } = self;
        write!(
            f,
            "min {min:.4e} max {max:.4e} mean {mean:.4e} rms {rms:.4e} nan {nans} inf {infinities}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::Summary;

    #[test]
    fn a_summary_counts_what_is_not_finite_apart() {
        let s = Summary::of(&[3.0, -4.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.0]);
        assert_eq!((s.min, s.max, s.nans, s.infinities), (-4.0, 3.0, 1, 2));
        assert!(s.mean.abs() < 1e-12 && (s.rms - (26.0f64 / 3.0).sqrt()).abs() < 1e-12);
        assert_eq!(Summary::of(&[]), Summary::default());
        assert_eq!(Summary::of(&[f32::NAN]).nans, 1);
    }
}
