//! CSV: an unquoted header, then every value in double quotes.

use super::{Report, plain};
use crate::bench::fields::{FIELDS, Record};
use std::io::{self, Write};

pub(super) struct Csv;

impl Report for Csv {
    fn begin(&mut self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}", FIELDS.each_ref().map(|f| f.name).join(","))
    }

    fn row(&mut self, out: &mut dyn Write, record: &Record) -> io::Result<()> {
        let values = FIELDS.each_ref().map(|f| quote(&plain(&(f.value)(record))));
        writeln!(out, "{}", values.join(","))
    }

    fn end(&mut self, _out: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }
}

fn quote(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\""))
}
