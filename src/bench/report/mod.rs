//! Result rows as text. A format is a file: what comes before the rows, a row, what comes after.

mod csv;
mod json;
mod md;
mod sql;

use super::fields::Record;
use serde_json::Value;
use std::io::{self, Write};

/// How rows are printed. Each row is complete when it is written, so that an interrupted run
/// leaves a whole file once the end is.
pub trait Report {
    /// What comes before the first row.
    ///
    /// # Errors
    /// Those of the writer.
    fn begin(&mut self, out: &mut dyn Write) -> io::Result<()>;
    /// A row.
    ///
    /// # Errors
    /// Those of the writer.
    fn row(&mut self, out: &mut dyn Write, record: &Record) -> io::Result<()>;
    /// What comes after the last row.
    ///
    /// # Errors
    /// Those of the writer.
    fn end(&mut self, out: &mut dyn Write) -> io::Result<()>;
}

/// The formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A Markdown table.
    Md,
    /// A JSON array of objects.
    Json,
    /// An object a line.
    Jsonl,
    /// Comma-separated values, all quoted.
    Csv,
    /// Statements for SQLite.
    Sql,
}

impl Format {
    /// A report in this format.
    pub fn report(self) -> Box<dyn Report> {
        match self {
            Self::Md => Box::new(md::Markdown::default()),
            Self::Json => Box::new(json::Array::default()),
            Self::Jsonl => Box::new(json::Lines),
            Self::Csv => Box::new(csv::Csv),
            Self::Sql => Box::new(sql::Sql::default()),
        }
    }
}

/// A value where there are no types: booleans 0 and 1, reals with six decimals.
fn plain(value: &Value) -> String {
    match value {
        Value::Bool(b) => u8::from(*b).to_string(),
        Value::Number(n) if n.is_f64() => format!("{:.6}", n.as_f64().unwrap_or(f64::NAN)),
        Value::String(s) => s.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod script;
#[cfg(test)]
pub(super) mod tests;
