//! Rotary position embedding: what a model's keys say, and the angles that follow from it.
//!
//! ```text
//! θ_i = base^(−2i/rotary) / divisor_i                         i in 0..rotary/2, radians a position
//! linear   θ_i / factor
//! yarn     θ_i / factor · (1 − r_i) + θ_i · r_i,  r_i = 1 − clamp((i − low)/(high − low), 0, 1)
//!          low = ⌊d(β_fast)⌋, high = ⌈d(β_slow)⌉,  d(β) = rotary · ln(original/(2πβ)) / (2 ln base)
//! ```
//!
//! YaRN: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023.
//! The divisors are a tensor of the file (`llama3` scaling, LongRoPE).

use super::keys::Keys;
use crate::error::Result;
use crate::ops::Pairing;

/// How the angles of a model's original context are stretched to a longer one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Every angle times this: the reciprocal of the factor, 1 for none.
    Linear(f32),
    /// Low frequencies are stretched, high ones stay.
    Yarn {
        /// Factor of the context.
        factor: f32,
        /// Turns within the original context above which a frequency stays as it is.
        beta_fast: f32,
        /// Turns below which it is stretched in full.
        beta_slow: f32,
    },
    /// Divisors by the length of the context that the plan is for: `rope_factors_long` beyond the
    /// original context, `rope_factors_short` up to it.
    Long,
}

/// Rotary position embedding, as the keys describe it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub base: f32,
    /// Elements of a head that rotate, even.
    pub rotary: u32,
    /// Stretch of the angles.
    pub scaling: RopeScaling,
    /// Positions that the model was first made for.
    pub original: u32,
    /// Factor on sine and cosine.
    pub magnitude: f32,
    /// Which elements of a head rotate together.
    pub pairing: Pairing,
}

impl RopeConfig {
    /// Reads the keys; `context` is what the model is made for now.
    pub(super) fn read(
        keys: &Keys<'_>,
        pairing: Pairing,
        head_dim: u32,
        context: u32,
    ) -> Result<Self> {
        let key = keys.key("rope.dimension_count");
        let rotary = keys.metadata.u64_key(&key)?.unwrap_or(u64::from(head_dim));
        if rotary == 0 || rotary > u64::from(head_dim) || !rotary.is_multiple_of(2) {
            let why = format!("is {rotary}, expected an even number up to the head's {head_dim}");
            return Err(keys.bad(&key, why));
        }
        if pairing == Pairing::Adjacent && rotary != u64::from(head_dim) {
            let architecture = keys.prefix;
            let why = format!("is {rotary}, for {architecture} it must be the head's {head_dim}");
            return Err(keys.bad(&key, why));
        }
        let base = keys.positive("rope.freq_base")?.unwrap_or(10_000.0);
        let original = "rope.scaling.original_context_length";
        let original = keys.optional_count(original, u64::from(u32::MAX))?.unwrap_or(context);
        let scaling = scaling(keys)?;
        let factor = keys.positive("rope.scaling.attn_factor")?.unwrap_or(1.0);
        let magnitude = match scaling {
            RopeScaling::Yarn { factor: f, .. } => (1.0 + 0.1 * f64::from(f.max(1.0)).ln()) as f32,
            RopeScaling::Linear(_) | RopeScaling::Long => 1.0,
        };
        let (rotary, magnitude) = (rotary as u32, magnitude * factor);
        Ok(Self { base, rotary, scaling, original, magnitude, pairing })
    }

    /// The same without stretch, on another base: what local layers use.
    pub(super) fn unscaled(self, base: f32) -> Self {
        Self { base, scaling: RopeScaling::Linear(1.0), magnitude: 1.0, ..self }
    }

    /// Angle per position of each pair, `[rotary / 2]`, radians: in f64, rounded once.
    pub(super) fn frequencies(&self, divisors: &[f32]) -> Vec<f32> {
        let (base, rotary) = (f64::from(self.base), f64::from(self.rotary));
        let one = |(i, divisor): (u32, &f32)| {
            let theta = base.powf(-2.0 * f64::from(i) / rotary) / f64::from(*divisor);
            let scaled = match self.scaling {
                RopeScaling::Linear(scale) => theta * f64::from(scale),
                RopeScaling::Yarn { factor, beta_fast, beta_slow } => {
                    let keep = self.kept(f64::from(i), beta_fast.into(), beta_slow.into());
                    theta / f64::from(factor) * (1.0 - keep) + theta * keep
                }
                RopeScaling::Long => theta,
            };
            scaled as f32
        };
        (0..self.rotary / 2).zip(divisors).map(one).collect()
    }

    /// How much of frequency `i` YaRN leaves unstretched, 0 to 1.
    fn kept(&self, i: f64, beta_fast: f64, beta_slow: f64) -> f64 {
        let (rotary, original) = (f64::from(self.rotary), f64::from(self.original));
        let turns = |beta: f64| {
            rotary * (original / (std::f64::consts::TAU * beta)).ln()
                / (2.0 * f64::from(self.base).ln())
        };
        let low = turns(beta_fast).floor().max(0.0);
        let high = turns(beta_slow).ceil().min(rotary - 1.0);
        1.0 - ((i - low) / (high - low).max(0.001)).clamp(0.0, 1.0)
    }
}

fn scaling(keys: &Keys<'_>) -> Result<RopeScaling> {
    // Would change the magnitude; no architecture of the list has it.
    keys.must_be_off("rope.scaling.yarn_log_multiplier")?;
    let key = keys.key("rope.scaling.type");
    match keys.metadata.str_key(&key)? {
        Some("none") => Ok(RopeScaling::Linear(1.0)),
        None | Some("linear") => Ok(RopeScaling::Linear(1.0 / factor(keys)?)),
        Some("yarn") => Ok(RopeScaling::Yarn {
            factor: factor(keys)?,
            beta_fast: keys.positive("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
            beta_slow: keys.positive("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
        }),
        Some("longrope") => match factor(keys)? {
            1.0 => Ok(RopeScaling::Long),
            f => {
                let what = format!("a factor of {f} beside the divisors of longrope");
                Err(keys.unsupported(&key, what, "use a model with one of the two"))
            }
        },
        Some(kind) => {
            let what = format!("rope scaling \"{kind}\"");
            let instead = "supported are none, linear, yarn, longrope and rope_freqs";
            Err(keys.unsupported(&key, what, instead))
        }
    }
}

/// Factor of the context, 1 where there is none.
fn factor(keys: &Keys<'_>) -> Result<f32> {
    for rest in ["rope.scaling.factor", "rope.scale_linear"] {
        if let Some(f) = keys.positive_or_off(rest, None)? {
            return Ok(f);
        }
    }
    Ok(1.0)
}
