//! Rotary embedding: from `rope_scaling` (or `rope_parameters`) to GGUF's keys and tensors.
//!
//! With `λ = 2π / frequency`, `low` and `high` the factors of that name and `o` the original context,
//! scaling of the kind `llama3` divides a frequency by
//!
//! ```text
//! 1                                        where λ < o / high
//! factor                                   where λ > o / low
//! 1 / ((1 − t) / factor + t), t = (o/λ − low) / (high − low)     between
//! ```
//!
//! which GGUF keeps as the tensor `rope_freqs.weight`. Source: `modeling_rope_utils` of the
//! `transformers` project; llama.cpp's converter for the names.

use super::json::Json;
use super::mapping::{Dimensions, Keys};
use crate::error::{Defect, Result};
use std::f64::consts::PI;

/// Base of the frequencies where the file does not say.
const DEFAULT_BASE: f64 = 10_000.0;

/// Puts the keys, and gives the tensors (name, `[rotary / 2]` values) that they call for.
pub(super) fn map(
    config: &Json,
    d: &Dimensions,
    keys: &mut Keys<'_>,
) -> Result<Vec<(&'static str, Vec<f32>)>> {
    let given = match config.object("rope_parameters")? {
        Some(given) => Some(given),
        None => config.object("rope_scaling")?,
    };
    // Gemma 3 has one set for windowed layers and one for the others.
    let (given, windowed) = match &given {
        Some(both) if both.contains("full_attention") => {
            (both.object("full_attention")?, both.object("sliding_attention")?)
        }
        _ => (given, None),
    };
    let of = |set: &Option<Json>, key: &str| -> Result<Option<f64>> {
        set.as_ref().map_or(Ok(None), |set| set.positive(key))
    };
    let base = match of(&given, "rope_theta")? {
        Some(base) => base,
        None => config.positive("rope_theta")?.unwrap_or(DEFAULT_BASE),
    };
    keys.number("rope.freq_base", "rope_theta", base);
    let local = match of(&windowed, "rope_theta")? {
        Some(base) => Some(base),
        None => config.positive("rope_local_base_freq")?,
    };
    if let Some(base) = local {
        keys.number("rope.freq_base_swa", "rope_local_base_freq", base);
    }
    let share = match of(&given, "partial_rotary_factor")? {
        Some(share) => share,
        None => config.positive("partial_rotary_factor")?.unwrap_or(1.0),
    };
    let rotary = (d.head_dim as f64 * share) as u64;
    if share > 1.0 || rotary < 2 || !rotary.is_multiple_of(2) {
        let why = format!("is {share}: {rotary} of a head's {} elements rotate", d.head_dim);
        return Err(config.error("partial_rotary_factor", Defect::BadValue, why));
    }
    keys.count("rope.dimension_count", "partial_rotary_factor", rotary);

    let Some(given) = given else { return Ok(Vec::new()) };
    let kind = match given.str("rope_type")? {
        Some(kind) => kind,
        None => given.str("type")?.unwrap_or("default"),
    };
    match kind {
        "default" => Ok(Vec::new()),
        "linear" => {
            keys.text("rope.scaling.type", "rope_scaling", "linear");
            keys.number("rope.scaling.factor", "factor", given.required_positive("factor")?);
            Ok(Vec::new())
        }
        "llama3" => Ok(vec![("rope_freqs.weight", llama3(&given, base, rotary)?)]),
        "yarn" => yarn(&given, d, keys).map(|()| Vec::new()),
        "longrope" | "su" => longrope(config, &given, d, rotary, keys),
        other => {
            let what = format!("rope scaling \"{}\"", other.escape_debug());
            let instead = "known are default, linear, llama3, yarn and longrope";
            Err(given.unsupported("rope_type", what, instead))
        }
    }
}

fn llama3(given: &Json, base: f64, rotary: u64) -> Result<Vec<f32>> {
    let factor = given.required_positive("factor")?;
    let low = given.required_positive("low_freq_factor")?;
    let high = given.required_positive("high_freq_factor")?;
    let original = given.required_positive("original_max_position_embeddings")?;
    if high <= low {
        let why = format!("is {high}, must be above low_freq_factor, {low}");
        return Err(given.error("high_freq_factor", Defect::BadValue, why));
    }
    let divisor = |i: u64| {
        let wavelength = 2.0 * PI * base.powf(2.0 * i as f64 / rotary as f64);
        if wavelength < original / high {
            1.0
        } else if wavelength > original / low {
            factor
        } else {
            let t = (original / wavelength - low) / (high - low);
            1.0 / ((1.0 - t) / factor + t)
        }
    };
    Ok((0..rotary / 2).map(|i| divisor(i) as f32).collect())
}

fn yarn(given: &Json, d: &Dimensions, keys: &mut Keys<'_>) -> Result<()> {
    for key in ["mscale", "mscale_all_dim"] {
        if given.contains(key) {
            return Err(given.unsupported(key, "a magnitude set so", "use a model without it"));
        }
    }
    if given.bool("truncate")? == Some(false) {
        return Err(given.unsupported("truncate", "the value false", "use a model without it"));
    }
    let key = "original_max_position_embeddings";
    let original = given.u64(key)?.unwrap_or(d.context);
    let factor = match given.positive("factor")? {
        Some(factor) => factor,
        None => d.context as f64 / original.max(1) as f64,
    };
    keys.text("rope.scaling.type", "rope_scaling", "yarn");
    keys.number("rope.scaling.factor", "factor", factor);
    keys.count("rope.scaling.original_context_length", key, original);
    if let Some(magnitude) = given.positive("attention_factor")? {
        // GGUF's readers multiply what follows from the factor by the key.
        let implied = 0.1 * factor.max(1.0).ln() + 1.0;
        keys.number("rope.scaling.attn_factor", "attention_factor", magnitude / implied);
    }
    for (key, name, default) in [
        ("beta_fast", "rope.scaling.yarn_beta_fast", 32.0),
        ("beta_slow", "rope.scaling.yarn_beta_slow", 1.0),
    ] {
        let beta = given.positive(key)?.unwrap_or(default);
        keys.number(name, key, beta);
    }
    Ok(())
}

fn longrope(
    config: &Json,
    given: &Json,
    d: &Dimensions,
    rotary: u64,
    keys: &mut Keys<'_>,
) -> Result<Vec<(&'static str, Vec<f32>)>> {
    let key = "original_max_position_embeddings";
    let original = match given.u64(key)? {
        Some(n) => n,
        None => config.required_u64(key)?,
    };
    if original < 2 {
        return Err(config.error(key, Defect::BadValue, format!("is {original}")));
    }
    let factor = match given.positive("factor")? {
        Some(factor) => factor,
        None => d.context as f64 / original as f64,
    };
    let magnitude = match given.positive("attention_factor")? {
        Some(magnitude) => magnitude,
        None if factor <= 1.0 => 1.0,
        None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
    };
    keys.text("rope.scaling.type", "rope_scaling", "longrope");
    keys.count("rope.scaling.original_context_length", key, original);
    keys.number("rope.scaling.attn_factor", "attention_factor", magnitude);
    let table = |key: &'static str, name| {
        let values = given.f64s(key)?.ok_or_else(|| given.missing(key))?;
        let sane = values.iter().all(|x| x.is_finite() && *x > 0.0);
        if values.len() as u64 != rotary / 2 || !sane {
            let why = format!("has {} values, expected {} above 0", values.len(), rotary / 2);
            return Err(given.error(key, Defect::BadValue, why));
        }
        Ok((name, values.into_iter().map(|x| x as f32).collect()))
    };
    Ok(vec![
        table("long_factor", "rope_factors_long.weight")?,
        table("short_factor", "rope_factors_short.weight")?,
    ])
}
