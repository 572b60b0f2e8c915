//! Two result files, compared test by test: is the new one slower, and is that sure?
//!
//! Tokens of one repetition share its clock and its neighbours, so the repetition is what is
//! drawn anew: the interval is a bootstrap over repetitions of the ratio of the medians of the
//! repetitions' median token times. A difference must show in clock cycles too, where both runs
//! know their clocks: a GPU that ran slower is no slower program.

use super::bootstrap::ratio_of_medians;
use super::stats::{Sorted, mean};
use crate::error::{Defect, Error, Result};
use serde_json::Value;
use std::path::Path;

/// Of the interval of the ratio. Two runs that are alike are then called different in at most 1 %
/// of all cases, at any number of repetitions from [`REPETITIONS`] on: simulated, in the tests.
pub const LEVEL: f64 = 0.998;
/// Repetitions on each side without which nothing is judged: that all five of one side lie above
/// all five of the other happens by luck once in 252 times.
pub const REPETITIONS: usize = 5;
/// Differences up to so many percent are none, where nobody says otherwise.
pub const MARGIN_PERCENT: f64 = 1.0;

/// A row of a result file.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// What must agree for two rows to be compared: model type, backend, mode, test.
    pub name: String,
    /// The GPU, or the CPU where that computed.
    pub device: String,
    /// Median time a token of each repetition, ms.
    pub token_ms: Vec<f64>,
    /// Mean clock of each repetition, MHz, where all are known.
    pub clock_mhz: Option<Vec<f64>>,
}

impl Row {
    /// Median clock cycles a token of each repetition, 10³.
    fn cycles(&self) -> Option<Vec<f64>> {
        let clocks = self.clock_mhz.as_ref()?;
        Some(self.token_ms.iter().zip(clocks).map(|(ms, mhz)| ms * mhz).collect())
    }
}

/// What can be said of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The interval lies above 1, in cycles too, and the ratio beyond the margin.
    Slower,
    /// The mirror image.
    Faster,
    /// The interval lies within the margin.
    Same,
    /// Anything else.
    CannotTell(Doubt),
}

/// Why it cannot be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// Fewer than [`REPETITIONS`] on a side.
    Few,
    /// The interval is too wide.
    Wide,
    /// What time says, clock cycles do not.
    Clocks,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Slower => "SLOWER",
            Self::Faster => "faster",
            Self::Same => "same",
            Self::CannotTell(Doubt::Few) => "cannot tell: fewer than 5 repetitions",
            Self::CannotTell(Doubt::Wide) => "cannot tell: too noisy",
            Self::CannotTell(Doubt::Clocks) => "cannot tell: the clocks differ",
        })
    }
}

/// A ratio new / base and its interval of level [`LEVEL`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    /// Of the medians.
    pub value: f64,
    /// Lower and upper end.
    pub interval: (f64, f64),
}

impl Ratio {
    /// Of samples of the base and the new one.
    pub fn of(base: &[f64], new: &[f64]) -> Self {
        let median = |v: &[f64]| Sorted::new(v.iter().copied()).median().unwrap_or(f64::NAN);
        Self { value: median(new) / median(base), interval: ratio_of_medians(base, new, LEVEL) }
    }
}

/// A pair of rows, judged.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// The test.
    pub name: String,
    /// Median time a token of the base and the new one, ms.
    pub ms: (f64, f64),
    /// Of times.
    pub time: Ratio,
    /// Of clock cycles, where both clocks are known.
    pub cycles: Option<Ratio>,
    /// The verdict.
    pub verdict: Verdict,
    /// Whether a slow-down beyond the margin is not ruled out.
    pub may_be_slower: bool,
}

/// Reads the rows of a result file in JSON or JSON lines.
///
/// # Errors
/// [`Error::Io`], and [`Error::InvalidModel`] with the row that is no result.
pub fn read(path: &Path) -> Result<Vec<Row>> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, "read", e))?;
    rows(path, &String::from_utf8_lossy(&bytes))
}

/// The rows of a result file's `text`; `path` is what errors call it.
///
/// # Errors
/// [`Error::InvalidModel`] with the row that is no result.
pub fn rows(path: &Path, text: &str) -> Result<Vec<Row>> {
    let read = |(i, row)| {
        parse(row).ok_or_else(|| {
            let why = "lacks model_type, n_prompt, n_gen, n_depth or samples_ns";
            Error::invalid(path, format!("row {i}"), None, Defect::BadValue, why)
        })
    };
    parse_values(path, text)?.iter().enumerate().map(read).collect()
}

/// The objects of a file in JSON (an array) or JSON lines.
///
/// # Errors
/// [`Error::Io`], and [`Error::InvalidModel`] for other text.
pub fn values(path: &Path) -> Result<Vec<Value>> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, "read", e))?;
    parse_values(path, &String::from_utf8_lossy(&bytes))
}

fn parse_values(path: &Path, text: &str) -> Result<Vec<Value>> {
    if text.trim().is_empty() {
        let why = "the file is empty; expected the output of -o json";
        return Err(Error::invalid(path, "JSON", None, Defect::Truncated, why));
    }
    serde_json::from_str(text)
        .or_else(|_| text.lines().map(serde_json::from_str).collect())
        .map_err(|e| {
            let why = format!("{e}; expected the output of -o json");
            Error::invalid(path, "JSON", None, Defect::BadValue, why)
        })
}

fn parse(row: &Value) -> Option<Row> {
    let number = |key: &str| row.get(key)?.as_u64();
    let (prompt, generated) = (number("n_prompt")?, number("n_gen")?);
    let steps = prompt.checked_add(generated).filter(|n| *n > 0)? as f64;
    let text = |key: &str| row.get(key).and_then(Value::as_str);
    let model = text("model_type")?;
    let x = row.get("x");
    let ours = |key: &str| x.and_then(|x| x.get(key)).and_then(Value::as_str);
    let backend = ours("backend").or_else(|| text("backends"));
    let depth = number("n_depth")?;
    let numbers =
        |v: &Value| -> Option<Vec<f64>> { v.as_array()?.iter().map(Value::as_f64).collect() };
    let gaps = x.and_then(|x| x.get("token_gaps_ns")).and_then(Value::as_array);
    let medians = gaps.and_then(|repetitions| -> Option<Vec<f64>> {
        repetitions.iter().map(|r| Some(Sorted::new(numbers(r)?).median()? / 1e6)).collect()
    });
    let token_ms = match medians {
        Some(medians) => medians,
        None => numbers(row.get("samples_ns")?)?.iter().map(|ns| ns / 1e6 / steps).collect(),
    };
    let valid = !token_ms.is_empty() && token_ms.iter().all(|ms| ms.is_finite() && *ms > 0.0);
    let clock_mhz = (|| -> Option<Vec<f64>> {
        let repetitions = x?.get("telemetry")?.get("repetitions")?.as_array()?;
        let one = |r: &Value| {
            let clocks = numbers(r.get("sm_mhz")?)?;
            (!clocks.is_empty()).then(|| mean(&clocks))
        };
        let clocks: Vec<f64> = repetitions.iter().map(one).collect::<Option<_>>()?;
        let valid = clocks.len() == token_ms.len() && clocks.iter().all(|mhz| *mhz > 0.0);
        valid.then_some(clocks)
    })();
    let gpu = text("gpu_info").filter(|gpu| !gpu.is_empty());
    valid.then(|| Row {
        name: format!(
            "{model}, {} {}, pp{prompt} tg{generated} d{depth}",
            backend.unwrap_or("-"),
            ours("mode").unwrap_or("-")
        ),
        device: gpu.or_else(|| text("cpu_info")).unwrap_or_default().to_owned(),
        clock_mhz,
        token_ms,
    })
}

/// Judges `new` against `base`; differences up to `margin` percent are none.
pub fn compare(base: &Row, new: &Row, margin: f64) -> Comparison {
    let median = |row: &Row| Sorted::new(row.token_ms.iter().copied()).median();
    let time = Ratio::of(&base.token_ms, &new.token_ms);
    let cycles = base.cycles().zip(new.cycles()).map(|(base, new)| Ratio::of(&base, &new));
    let few = base.token_ms.len().min(new.token_ms.len()) < REPETITIONS;
    let beyond = 1.0 + margin / 100.0;
    let above = |r: &Ratio| r.interval.0 > 1.0;
    let below = |r: &Ratio| r.interval.1 < 1.0;
    let verdict = if few {
        Verdict::CannotTell(Doubt::Few)
    } else if above(&time) && time.value > beyond {
        if cycles.as_ref().is_none_or(above) {
            Verdict::Slower
        } else {
            Verdict::CannotTell(Doubt::Clocks)
        }
    } else if below(&time) && time.value < 1.0 / beyond {
        if cycles.as_ref().is_none_or(below) {
            Verdict::Faster
        } else {
            Verdict::CannotTell(Doubt::Clocks)
        }
    } else if time.interval.0 >= 1.0 / beyond && time.interval.1 <= beyond {
        Verdict::Same
    } else {
        Verdict::CannotTell(Doubt::Wide)
    };
    Comparison {
        name: new.name.clone(),
        ms: (median(base).unwrap_or(f64::NAN), median(new).unwrap_or(f64::NAN)),
        may_be_slower: few || time.interval.1 > beyond,
        time,
        cycles,
        verdict,
    }
}

#[cfg(test)]
mod tests;
