//! Results as pictures: what `run -o json` and `profile -o json` wrote, drawn as SVG.

mod kernels;
mod svg;
mod tokens;

use super::compare::{self, LEVEL, MARGIN_PERCENT, Verdict};
use crate::error::{Defect, Error, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};
use svg::{Axis, Chart};

/// What to draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Time a token by depth: median, band from the 10th to the 90th percentile, and the roofline.
    Depth,
    /// The time of each token in the order of measurement, throttling and outliers marked.
    Trace,
    /// The share of tokens that took at most each time.
    Distribution,
    /// Time of each kernel of a profile.
    Kernels,
    /// Each test of a second file against the first.
    Ab,
}

/// What `files` are best drawn as.
///
/// # Errors
///
/// As [`draw`].
pub fn natural(files: &[PathBuf]) -> Result<Kind> {
    let [first, rest @ ..] = files else { return Err(nothing()) };
    if kernels::is_profile(first)? {
        return Ok(Kind::Kernels);
    }
    if !rest.is_empty() {
        return Ok(Kind::Ab);
    }
    let rows = tokens::read(files)?;
    let one_depth = rows.windows(2).all(|w| w[0].depth == w[1].depth);
    Ok(if one_depth { Kind::Trace } else { Kind::Depth })
}

/// `files` as the text of an SVG file.
///
/// # Errors
///
/// [`Error::Io`]; [`Error::InvalidModel`] for a file that is no result; [`Error::Usage`] for files
/// that do not have what `kind` shows.
pub fn draw(kind: Kind, files: &[PathBuf]) -> Result<String> {
    match (kind, files) {
        (_, []) => Err(nothing()),
        (Kind::Depth, _) => Ok(tokens::by_depth(&tokens::read(files)?)),
        (Kind::Trace, _) => Ok(tokens::trace(&tokens::read(files)?)),
        (Kind::Distribution, _) => Ok(tokens::distribution(&tokens::read(files)?)),
        (Kind::Kernels, [file]) => kernels::shares(file),
        (Kind::Ab, [base, new]) => ab(base, new),
        (Kind::Kernels, _) => Err(Error::Usage("kernels are drawn of one profile".to_owned())),
        (Kind::Ab, _) => Err(Error::Usage("ab is drawn of two files: BASE NEW".to_owned())),
    }
}

fn nothing() -> Error {
    Error::Usage("there is no result to draw".to_owned())
}

/// A row that is not what a result file holds.
fn wrong(path: &Path, at: String, why: &str) -> Error {
    Error::invalid(path, at, None, Defect::BadValue, why)
}

/// What a picture calls a file.
fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// `[number, …]`.
fn numbers(value: &Value) -> Option<Vec<f64>> {
    value.as_array()?.iter().map(Value::as_f64).collect()
}

/// The tests that both files have, ratio and interval each.
fn ab(base_file: &Path, new_file: &Path) -> Result<String> {
    let (base, new) = (compare::read(base_file)?, compare::read(new_file)?);
    let pairs: Vec<_> = new
        .iter()
        .filter_map(|n| Some((base.iter().find(|b| b.name == n.name)?, n)))
        .map(|(b, n)| compare::compare(b, n, MARGIN_PERCENT))
        .collect();
    if pairs.is_empty() {
        return Err(Error::Usage("the files have no test in common".to_owned()));
    }
    let low = pairs.iter().map(|c| c.time.interval.0).fold(0.97, f64::min);
    let high = pairs.iter().map(|c| c.time.interval.1).fold(1.03, f64::max);
    let room = (high - low) * 0.05;
    let title = format!("{} against {}: time a token", stem(new_file), stem(base_file));
    let label = format!("new / base, {} % interval; below 1 is faster", 100.0 * LEVEL);
    let x = Axis::new(&label, low - room, high + room);
    let rows = pairs.len();
    let mut chart = Chart::new(&title, x, Axis::new("", 0.0, 1.0)).rows(3 * rows);
    chart.rule(1.0);
    for (row, c) in pairs.iter().enumerate() {
        let series = match c.verdict {
            Verdict::Slower => None,
            Verdict::Faster => Some(2),
            Verdict::Same | Verdict::CannotTell(_) => Some(0),
        };
        let ends = [c.time.interval.0, c.time.value, c.time.interval.1];
        let figures =
            format!("{:.3} → {:.3} ms, × {:.3}: {}", c.ms.0, c.ms.1, c.time.value, c.verdict);
        chart.interval(row, rows, ends, series, [&c.name, &figures]);
    }
    Ok(chart.finish())
}

#[cfg(test)]
mod tests;
