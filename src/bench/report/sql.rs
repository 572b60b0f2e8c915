//! SQL: a table of llama-bench's name, and an insertion a row.

use super::{Report, plain};
use crate::bench::fields::{FIELDS, Kind, Record};
use std::io::{self, Write};

#[derive(Default)]
pub(super) struct Sql {
    names: String,
}

impl Report for Sql {
    fn begin(&mut self, out: &mut dyn Write) -> io::Result<()> {
        self.names = FIELDS.each_ref().map(|f| f.name).join(", ");
        let columns = FIELDS.each_ref().map(|f| {
            let kind = match f.kind {
                Kind::Text => "TEXT",
                Kind::Integer | Kind::Bool => "INTEGER",
                Kind::Real => "REAL",
            };
            format!("  {} {kind}", f.name)
        });
        writeln!(out, "CREATE TABLE IF NOT EXISTS llama_bench (\n{}\n);\n", columns.join(",\n"))
    }

    fn row(&mut self, out: &mut dyn Write, record: &Record) -> io::Result<()> {
        let values = FIELDS.each_ref().map(|f| quote(&plain(&(f.value)(record))));
        writeln!(out, "INSERT INTO llama_bench ({}) VALUES ({});", self.names, values.join(", "))
    }

    fn end(&mut self, _out: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }
}

fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}
