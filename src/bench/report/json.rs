//! JSON: one array of rows, or a row a line.

use super::Report;
use crate::bench::fields::Record;
use std::io::{self, Write};

#[derive(Default)]
pub(super) struct Array {
    rows: usize,
}

impl Report for Array {
    fn begin(&mut self, out: &mut dyn Write) -> io::Result<()> {
        write!(out, "[")
    }

    fn row(&mut self, out: &mut dyn Write, record: &Record) -> io::Result<()> {
        write!(out, "{}\n  {}", if self.rows > 0 { "," } else { "" }, record.json())?;
        self.rows += 1;
        Ok(())
    }

    fn end(&mut self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "\n]")
    }
}

pub(super) struct Lines;

impl Report for Lines {
    fn begin(&mut self, _out: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }

    fn row(&mut self, out: &mut dyn Write, record: &Record) -> io::Result<()> {
        writeln!(out, "{}", record.json())
    }

    fn end(&mut self, _out: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }
}
