//! A profile: rows `{label, kernel, time_us, bytes}`, one a step of the plan.

use super::svg::{Axis, Chart};
use super::wrong;
use crate::bench::compare::values;
use crate::error::{Error, Result};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// The rows of a profile, and the read ceiling, GB/s, if the file tells it: either an array of
/// rows, or `{"rows": [...], "ceiling_gb_per_s": …}`.
fn rows(path: &Path) -> Result<(Vec<Value>, Option<f64>)> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, "read", e))?;
    let object = serde_json::from_str::<Value>(&text).ok().filter(Value::is_object);
    let Some(mut object) = object.filter(|o| o.get("rows").is_some()) else {
        return Ok((values(path)?, None));
    };
    let ceiling = object.get("ceiling_gb_per_s").and_then(Value::as_f64);
    match object.get_mut("rows").map(Value::take) {
        Some(Value::Array(rows)) => Ok((rows, ceiling)),
        _ => Err(wrong(path, "rows".to_owned(), "is no array")),
    }
}

/// Whether the first row of `path` is one of a profile.
pub(super) fn is_profile(path: &Path) -> Result<bool> {
    let (rows, _) = rows(path)?;
    Ok(rows.first().is_some_and(|row| row.get("kernel").is_some() && row.get("time_us").is_some()))
}

/// Launches, time and bytes of all steps that run one kernel.
#[derive(Default)]
struct Sum {
    launches: u32,
    us: f64,
    bytes: f64,
}

/// A bar a kernel, the longest first: time, share of all, and speed.
pub(super) fn shares(path: &Path) -> Result<String> {
    let (rows, ceiling) = rows(path)?;
    let mut sums = BTreeMap::<String, Sum>::new();
    for (i, row) in rows.iter().enumerate() {
        let read = || {
            let us = row.get("time_us")?.as_f64().filter(|us| us.is_finite() && *us >= 0.0)?;
            Some((row.get("kernel")?.as_str()?, us, row.get("bytes")?.as_f64()?))
        };
        let (kernel, us, bytes) = read().ok_or_else(|| {
            wrong(path, format!("row {i}"), "lacks label, kernel, time_us or bytes")
        })?;
        let sum = sums.entry(kernel.to_owned()).or_default();
        sum.launches += 1;
        sum.us += us;
        sum.bytes += bytes;
    }
    let all: f64 = sums.values().map(|s| s.us).sum();
    if all <= 0.0 {
        return Err(Error::Usage(format!("{}: no kernel took any time", path.display())));
    }
    let mut sums: Vec<(String, Sum)> = sums.into_iter().collect();
    sums.sort_by(|a, b| b.1.us.total_cmp(&a.1.us));
    let longest = sums.first().map_or(1.0, |(_, s)| s.us);
    let title = format!("Kernels of a token: {all:.1} µs in all");
    // Behind the longest bar there is room for its figures.
    let x = Axis::new("time a token, µs", 0.0, longest * 2.1);
    let rows = sums.len();
    let mut chart = Chart::new(&title, x, Axis::new("", 0.0, 1.0)).rows(rows);
    for (i, (kernel, s)) in sums.iter().enumerate() {
        let speed = s.bytes / s.us.max(1e-9) / 1e3;
        let of_ceiling = ceiling
            .map_or_else(String::new, |c| format!(", {:.0} % of the ceiling", 100.0 * speed / c));
        let figures =
            format!("{:.1} µs, {:.1} %, {speed:.0} GB/s{of_ceiling}", s.us, 100.0 * s.us / all);
        chart.bar(i, rows, s.us, &format!("{kernel} × {}", s.launches), &figures);
    }
    Ok(chart.finish())
}
