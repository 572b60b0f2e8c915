//! Two result files, compared test by test: is the new one slower, and is that sure?
//!
//! Tokens of one repetition share its clock and its neighbours, so the repetition is what is
//! drawn anew: the interval is a percentile bootstrap (Efron, 1979) over repetitions of the ratio
//! of the medians of the repetitions' median token times.

use super::stats::Sorted;
use crate::error::{Defect, Error, Result};
use serde_json::Value;
use std::path::Path;

/// Draws of the bootstrap.
const DRAWS: usize = 4000;
/// Repetitions without which nothing is judged.
const REPETITIONS: usize = 3;

/// A row of a result file.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// What must agree for two rows to be compared: model type, backend, mode, test.
    pub name: String,
    /// Median time a token of each repetition, ms.
    pub token_ms: Vec<f64>,
}

/// What can be said of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The whole interval is beyond the bound.
    Slower,
    /// The whole interval is below 1.
    Faster,
    /// No regression beyond the bound, and not faster.
    Same,
    /// The interval holds the bound, or there are too few repetitions: it cannot be told.
    Noisy,
}

/// A pair of rows, judged.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// The test.
    pub name: String,
    /// Median time a token of the base, ms.
    pub base_ms: f64,
    /// Median time a token of the new one, ms.
    pub new_ms: f64,
    /// new / base.
    pub ratio: f64,
    /// 95 % interval of the ratio.
    pub interval: (f64, f64),
    /// The verdict.
    pub verdict: Verdict,
}

/// Reads the rows of a result file in JSON or JSON lines.
///
/// # Errors
/// [`Error::Io`], and [`Error::InvalidModel`] with the row that is no result.
pub fn read(path: &Path) -> Result<Vec<Row>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, "read", e))?;
    rows(path, &text)
}

/// The rows of a result file's `text`; `path` is what errors call it.
///
/// # Errors
/// [`Error::InvalidModel`] with the row that is no result.
pub fn rows(path: &Path, text: &str) -> Result<Vec<Row>> {
    let wrong = |at: String, why: String| Error::invalid(path, at, None, Defect::BadValue, why);
    let rows: Vec<Value> = serde_json::from_str(text)
        .or_else(|_| text.lines().map(serde_json::from_str).collect())
        .map_err(|e| wrong("JSON".to_owned(), format!("{e}; expected the output of -o json")))?;
    let read = |(i, row)| {
        parse(row).ok_or_else(|| {
            let why = "lacks model_type, n_prompt, n_gen, n_depth or samples_ns";
            wrong(format!("row {i}"), why.to_owned())
        })
    };
    rows.iter().enumerate().map(read).collect()
}

fn parse(row: &Value) -> Option<Row> {
    let number = |key: &str| row.get(key)?.as_u64();
    let (prompt, generated) = (number("n_prompt")?, number("n_gen")?);
    let steps = prompt.checked_add(generated).filter(|n| *n > 0)? as f64;
    let model = row.get("model_type")?.as_str()?;
    let x = row.get("x");
    let ours = |key: &str| x.and_then(|x| x.get(key)).and_then(Value::as_str);
    let backend = ours("backend").or_else(|| row.get("backends").and_then(Value::as_str));
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
    valid.then(|| Row {
        name: format!(
            "{model}, {} {}, pp{prompt} tg{generated} d{depth}",
            backend.unwrap_or("-"),
            ours("mode").unwrap_or("-")
        ),
        token_ms,
    })
}

/// Judges `new` against `base`: `percent` is the slow-down that counts.
pub fn compare(base: &Row, new: &Row, percent: f64) -> Comparison {
    let median = |v: &[f64]| Sorted::new(v.iter().copied()).median().unwrap_or(f64::NAN);
    let (base_ms, new_ms) = (median(&base.token_ms), median(&new.token_ms));
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut draw = |from: &[f64]| {
        let one = |_: &f64| {
            // Marsaglia's xorshift64 (2003): the same draws in every run.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            from[(state % from.len().max(1) as u64) as usize]
        };
        median(&from.iter().map(one).collect::<Vec<_>>())
    };
    let ratios = Sorted::new((0..DRAWS).map(|_| draw(&new.token_ms) / draw(&base.token_ms)));
    let at = |q| ratios.quantile(q).unwrap_or(f64::NAN);
    let interval = (at(0.025), at(0.975));
    let bound = 1.0 + percent / 100.0;
    let few = base.token_ms.len().min(new.token_ms.len()) < REPETITIONS;
    let verdict = match interval {
        _ if few => Verdict::Noisy,
        (low, _) if low > bound => Verdict::Slower,
        (_, high) if high > bound => Verdict::Noisy,
        (_, high) if high < 1.0 => Verdict::Faster,
        _ => Verdict::Same,
    };
    Comparison {
        name: new.name.clone(),
        base_ms,
        new_ms,
        ratio: new_ms / base_ms,
        interval,
        verdict,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(token_ms: &[f64]) -> Row {
        Row { name: "t".to_owned(), token_ms: token_ms.to_vec() }
    }

    fn verdict(base: &[f64], new: &[f64]) -> Verdict {
        compare(&row(base), &row(new), 2.0).verdict
    }

    const BASE: [f64; 5] = [1.0, 1.001, 0.999, 1.002, 0.998];

    #[test]
    fn a_verdict_needs_the_whole_interval() {
        assert_eq!(verdict(&BASE, &BASE), Verdict::Same);
        assert_eq!(verdict(&BASE, &BASE.map(|x| x * 1.1)), Verdict::Slower);
        assert_eq!(verdict(&BASE, &BASE.map(|x| x * 0.9)), Verdict::Faster);
        // Slower by less than counts.
        assert_eq!(verdict(&BASE, &BASE.map(|x| x * 1.01)), Verdict::Same);
        assert_eq!(verdict(&BASE, &[0.9, 1.3, 1.0, 1.2, 0.8]), Verdict::Noisy);
    }

    #[test]
    fn two_repetitions_prove_nothing() {
        assert_eq!(verdict(&BASE, &[2.0, 2.0]), Verdict::Noisy);
    }

    #[test]
    fn rows_of_llama_bench_are_read_too() {
        let theirs = json!({
            "model_type": "llama 1B Q4_0", "backends": "CUDA", "n_prompt": 0, "n_gen": 10,
            "n_depth": 0, "samples_ns": [20_000_000, 30_000_000],
        });
        assert_eq!(parse(&theirs).unwrap().token_ms, [2.0, 3.0]);
        let mut ours = theirs;
        ours["x"] = json!({"mode": "graph", "token_gaps_ns": [[1_000_000, 3_000_000, 2_000_000]]});
        assert_eq!(parse(&ours).unwrap().token_ms, [2.0]);
        ours["n_gen"] = json!(0);
        assert_eq!(parse(&ours), None);
    }
}
