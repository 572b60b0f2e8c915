//! Times of tokens: by depth, one by one, and as a distribution.

use super::svg::{Axis, COLOURS, Chart, Stroke};
use super::{numbers, wrong};
use crate::bench::compare::values;
use crate::bench::stats::Sorted;
use crate::error::Result;
use serde_json::Value;
use std::path::PathBuf;

/// Tokens of a trace, at most: the first ones.
const TRACED: usize = 4000;

/// What a reading of the device stands for, ms.
const READ_EVERY_MS: f64 = crate::bench::telemetry::EVERY.as_millis() as f64;

/// A row of a result file, as far as it is drawn.
pub(super) struct Row {
    /// Model, and mode where there is one.
    name: String,
    test: String,
    pub(super) depth: f64,
    /// Times of tokens of each repetition, ms.
    tokens: Vec<Vec<f64>>,
    /// From the begin of each repetition to its first token, ms.
    first: Vec<f64>,
    /// Bytes a token over the read ceiling, ms.
    roofline: Option<f64>,
    /// When each repetition was throttled, ms after its begin.
    throttled: Vec<Vec<f64>>,
}

impl Row {
    fn sorted(&self) -> Sorted {
        Sorted::new(self.tokens.iter().flatten().copied())
    }
}

/// The rows of all files; where several files are drawn, each row's name also says its file's.
pub(super) fn read(files: &[PathBuf]) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for path in files {
        for (i, value) in values(path)?.iter().enumerate() {
            let mut row = parse(value).ok_or_else(|| {
                wrong(path, format!("row {i}"), "has no token times: run -o json writes them")
            })?;
            if files.len() > 1 {
                row.name.push_str(&format!(", {}", super::stem(path)));
            }
            rows.push(row);
        }
    }
    if rows.is_empty() { Err(super::nothing()) } else { Ok(rows) }
}

fn parse(row: &Value) -> Option<Row> {
    let x = row.get("x")?;
    let ms = |ns: Vec<f64>| -> Vec<f64> { ns.into_iter().map(|ns| ns / 1e6).collect() };
    let tokens: Vec<Vec<f64>> = x
        .get("token_gaps_ns")?
        .as_array()?
        .iter()
        .map(|r| numbers(r).map(ms))
        .collect::<Option<_>>()?;
    if tokens.iter().all(Vec::is_empty) {
        return None;
    }
    let first = x.get("first_token_ns").and_then(numbers).map(ms);
    let bytes = x.get("bytes_per_token").and_then(Value::as_f64);
    let ceiling = x.get("ceiling_gb_per_s").and_then(Value::as_f64);
    let throttled = |r: &Value| -> Option<Vec<f64>> {
        let at = numbers(r.get("at_ms")?)?;
        let reasons = r.get("throttle")?.as_array()?;
        let any = |v: &Value| v.as_array().is_some_and(|reasons| !reasons.is_empty());
        Some(at.into_iter().zip(reasons).filter(|(_, r)| any(r)).map(|(at, _)| at).collect())
    };
    let spans = x.get("telemetry").and_then(|t| t.get("repetitions")).and_then(Value::as_array);
    let mode = x.get("mode").and_then(Value::as_str).unwrap_or_default();
    Some(Row {
        name: format!("{} {mode}", row.get("model_type")?.as_str()?).trim().to_owned(),
        test: x.get("test").and_then(Value::as_str).unwrap_or_default().to_owned(),
        depth: row.get("n_depth")?.as_f64()?,
        first: first.unwrap_or_default(),
        roofline: bytes.zip(ceiling).map(|(bytes, gb_s)| bytes / (gb_s * 1e6)),
        throttled: spans.map(|s| s.iter().filter_map(throttled).collect()).unwrap_or_default(),
        tokens,
    })
}

/// The names that occur, in order, each once.
fn names(rows: &[Row]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for row in rows {
        if !names.contains(&&*row.name) {
            names.push(&row.name);
        }
    }
    names
}

pub(super) fn by_depth(rows: &[Row]) -> String {
    let quantile = |row: &Row, q| row.sorted().quantile(q).unwrap_or(0.0);
    let high = rows.iter().map(|r| quantile(r, 0.9)).fold(0.0, f64::max);
    let deepest = rows.iter().map(|r| r.depth).fold(0.0, f64::max);
    let x = Axis::new("depth: positions before the first token", 0.0, deepest);
    let y = Axis::new("time a token, ms", 0.0, high * 1.1);
    let title = "Time a token by depth: median, 10th to 90th percentile";
    let names = names(rows);
    let mut chart = Chart::new(title, x, y);
    let mut rooflines: Vec<Vec<(f64, f64)>> = Vec::new();
    for (n, name) in names.into_iter().enumerate() {
        let mut own: Vec<&Row> = rows.iter().filter(|r| r.name == name).collect();
        own.sort_by(|a, b| a.depth.total_cmp(&b.depth));
        let line = |of: &dyn Fn(&Row) -> Option<f64>| -> Vec<(f64, f64)> {
            own.iter().filter_map(|r| Some((r.depth, of(r)?))).collect()
        };
        let at = |q| line(&move |r| r.sorted().quantile(q));
        chart.band(n, &at(0.1), &at(0.9));
        chart.line(n, Stroke::Line, at(0.5));
        for (x, y) in at(0.5) {
            chart.dot(Some(n), 3.5, x, y);
        }
        chart.name(n, Stroke::Line, name);
        let roofline = line(&|r| r.roofline);
        // Modes of one model share it.
        if !roofline.is_empty() && !rooflines.contains(&roofline) {
            chart.line(n, Stroke::Dashed, roofline.iter().copied());
            if rooflines.is_empty() {
                let what = "roofline: weights and cache at the read ceiling";
                chart.name(n, Stroke::Dashed, what);
            }
            rooflines.push(roofline);
        }
    }
    chart.finish()
}

pub(super) fn trace(rows: &[Row]) -> String {
    // One test is one picture: the first of the file.
    let row = &rows[0];
    let sorted = row.sorted();
    let all = sorted.len().min(TRACED);
    let top = sorted.quantile(1.0).unwrap_or(0.0);
    let title = format!("Each token of {}, {}", row.name, row.test);
    let x = Axis::new("token, in the order of measurement", 0.0, all as f64);
    let mut chart = Chart::new(&title, x, Axis::new("time a token, ms", 0.0, top * 1.08));
    let ordinary = sorted.ordinary();
    let (mut at, mut outliers, mut throttled) = (0usize, 0, 0);
    for (r, tokens) in row.tokens.iter().enumerate() {
        if at >= all {
            break;
        }
        if at > 0 {
            chart.rule(at as f64);
        }
        // When each token was there, ms after the begin of the repetition.
        let mut clock = row.first.get(r).copied().unwrap_or(0.0);
        let ends: Vec<f64> = tokens
            .iter()
            .map(|ms| {
                clock += ms;
                clock
            })
            .collect();
        for when in row.throttled.get(r).into_iter().flatten() {
            let token = at + ends.partition_point(|end| end < when);
            // Until about the next reading.
            let next = at + ends.partition_point(|end| *end < when + READ_EVERY_MS);
            chart.warn(token.max(throttled) as f64, next as f64);
            throttled = next;
        }
        let points = tokens.iter().zip(at..).map(|(ms, i)| (i as f64, *ms));
        chart.line(0, Stroke::Thin, points.clone().take(all - at));
        for (i, ms) in points.take(all - at).filter(|(_, ms)| !ordinary.contains(ms)) {
            chart.dot(Some(1), 3.5, i, ms);
            outliers += 1;
        }
        at += tokens.len();
    }
    chart.name(0, Stroke::Line, "token (a vertical line begins a repetition)");
    if outliers > 0 {
        chart.name(1, Stroke::Line, &format!("{outliers} outliers"));
    }
    if throttled > 0 {
        chart.name_warning("throttled");
    }
    chart.finish()
}

pub(super) fn distribution(rows: &[Row]) -> String {
    let left_out = rows.len().saturating_sub(COLOURS);
    let rows: Vec<(&Row, Sorted)> = rows.iter().take(COLOURS).map(|r| (r, r.sorted())).collect();
    let quantile = |q| rows.iter().filter_map(move |(_, s)| s.quantile(q));
    let low = quantile(0.0).fold(f64::INFINITY, f64::min);
    let (p99, max) = (quantile(0.99).fold(0.0, f64::max), quantile(1.0).fold(0.0, f64::max));
    // A few stragglers must not squeeze the rest together: they are told, not shown.
    let median = quantile(0.5).fold(0.0, f64::max);
    let high = max.min(p99 + (p99 - median).max(0.01 * p99));
    let beyond = if max > high { format!("; slowest {max:.3} ms") } else { String::new() };
    let others =
        if left_out > 0 { format!("; {left_out} more tests left out") } else { String::new() };
    let title = format!("Share of tokens by time; dots: p50, p90, p99{beyond}{others}");
    let room = (high - low) * 0.03;
    let x = Axis::new("time a token, ms", low - room, high + room);
    let y = Axis::new("share of tokens that took at most this, %", 0.0, 100.0);
    let mut chart = Chart::new(&title, x, y);
    for (n, (row, sorted)) in rows.iter().enumerate() {
        let share = |i: usize| i as f64 / 200.0;
        let points = (0..=200).filter_map(|i| Some((sorted.quantile(share(i))?, 100.0 * share(i))));
        chart.line(n, Stroke::Line, points.filter(|(ms, _)| *ms <= high));
        for q in [0.5, 0.9, 0.99] {
            if let Some(ms) = sorted.quantile(q) {
                chart.dot(Some(n), 4.0, ms, 100.0 * q);
            }
        }
        let many = rows.iter().any(|(other, _)| other.name != row.name);
        let name = if many { format!("{} {}", row.name, row.test) } else { row.test.clone() };
        chart.name(n, Stroke::Line, &name);
    }
    chart.finish()
}
