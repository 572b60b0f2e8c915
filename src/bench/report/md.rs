//! Markdown: llama-bench's columns, then ours to the right of t/s.

use super::Report;
use crate::bench::compare::LEVEL;
use crate::bench::fields::{BUILD_COMMIT, Record};
use crate::bench::stats::standard_deviation;
use std::io::{self, Write};

/// A column: title, width (negative: left-aligned), text.
type Column = (&'static str, i32, fn(&Record) -> String);

const BEFORE: [Column; 4] = [
    ("model", -30, |r| r.setup.model.kind.clone()),
    ("size", 10, |r| size(r.setup.model.bytes)),
    ("params", 10, |r| parameters(r.setup.model.parameters)),
    ("backend", -10, |r| r.setup.backend.to_uppercase()),
];
const ON_GPU: Column = ("ngl", 3, |_| "99".to_owned());
const ON_CPU: Column = ("threads", 7, |r| r.setup.threads.to_string());
const KV: [Column; 2] =
    [("type_k", 6, |r| r.setup.kv.clone()), ("type_v", 6, |r| r.setup.kv.clone())];
const AFTER: [Column; 12] = [
    ("mode", -10, |r| r.setup.mode.clone()),
    ("test", 15, |r| r.measurement.test.to_string()),
    ("t/s", 20, speed),
    ("p50 ms", 10, |r| milliseconds(r.latency().map(|s| s.p50))),
    ("p90 ms", 10, |r| milliseconds(r.latency().map(|s| s.p90))),
    ("p95 ms", 10, |r| milliseconds(r.latency().map(|s| s.p95))),
    ("p99 ms", 10, |r| milliseconds(r.latency().and_then(|s| s.p99))),
    ("max ms", 10, |r| milliseconds(r.latency().map(|s| s.max))),
    ("clock", 6, |r| if r.measurement.device_clock { "device" } else { "host" }.to_owned()),
    ("GB/s", 10, |r| format!("{:.1}", r.gigabytes_per_second())),
    ("% of ceiling", 12, |r| known(r.percent_of_ceiling(), 1)),
    ("J/token", 10, |r| known(r.joules_per_token(), 3)),
];

/// The table's columns depend on the first row: the rows of a run share a backend and a cache.
#[derive(Default)]
pub(super) struct Markdown {
    columns: Vec<Column>,
    /// What stands under the table.
    notes: Vec<String>,
}

impl Report for Markdown {
    fn begin(&mut self, _out: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }

    fn row(&mut self, out: &mut dyn Write, record: &Record) -> io::Result<()> {
        if self.columns.is_empty() {
            self.columns.extend(BEFORE);
            self.columns.push(if record.on_gpu() { ON_GPU } else { ON_CPU });
            if record.setup.kv != "f16" {
                self.columns.extend(KV);
            }
            self.columns.extend(AFTER);
            line(out, self.columns.iter().map(|(title, width, _)| pad(title, *width)))?;
            line(out, self.columns.iter().map(|(_, width, _)| rule(*width)))?;
        }
        for note in notes(record) {
            if !self.notes.contains(&note) {
                self.notes.push(note);
            }
        }
        line(out, self.columns.iter().map(|(_, width, text)| pad(&text(record), *width)))
    }

    fn end(&mut self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "\nbuild: {BUILD_COMMIT} (0)")?;
        self.notes.iter().try_for_each(|note| writeln!(out, "{note}"))
    }
}

/// What a row says below the table: once for all rows what is of the run, by test the rest.
fn notes(r: &Record) -> Vec<String> {
    let (m, load) = (&r.measurement, &r.setup.load);
    let (test, mode) = (m.test, &r.setup.mode);
    let mut notes = vec![format!(
        "load, {mode}: weights {:.2} s, kernels {:.2} s, capture {:.4} s",
        load.load_seconds, load.jit_seconds, load.capture_seconds
    )];
    if let Some(m) = &load.memory {
        let [weights, kv, workspace, other, taken] =
            [m.weights, m.kv, m.workspace, m.other, m.taken].map(|b| b as f64 / f64::from(1 << 20));
        notes.push(format!(
            "memory, {mode}: {taken:.1} MiB taken, {:.2} % more than weights {weights:.1} + cache {kv:.1} \
             + workspace {workspace:.1} + other {other:.1}",
            m.excess_percent()
        ));
    }
    if let Some(ceiling) = r.setup.ceiling_gb_s {
        notes.push(format!("ceiling: {ceiling:.0} GB/s, read in this run"));
    }
    if m.test.n_prompt > 0 {
        notes.push(format!("{test}, {mode}: first token after {} ms", milliseconds(r.ttft_ms())));
    }
    if let Some(o) = &r.overhead {
        let relaunch =
            o.relaunch_us.map(|us| format!(", {us:.2} us from one token's graph to the next"));
        let host = o.host_us;
        notes.push(format!(
            "{test}, {mode}: host {host:.2} us a token{}",
            relaunch.unwrap_or_default()
        ));
    }
    if let Some(p) = &r.pair {
        let (low, high) = p.ratio.interval;
        let (value, level, against) = (p.ratio.value, 100.0 * LEVEL, &p.against);
        notes.push(format!(
            "{test}: {mode} / {against} = {value:.3} ({level} % interval {low:.3} to {high:.3}, \
             {} pairs)",
            p.n
        ));
    }
    if let Some(conditions) = m.conditions() {
        let remarks = conditions.remarks();
        if !remarks.is_empty() {
            notes.push(format!("{test}, {mode}: NOT QUIET: {}", remarks.join("; ")));
        }
    }
    notes
}

fn line(out: &mut dyn Write, cells: impl Iterator<Item = String>) -> io::Result<()> {
    let cells: Vec<_> = cells.collect();
    writeln!(out, "| {} |", cells.join(" | "))
}

fn pad(text: &str, width: i32) -> String {
    let columns = width.unsigned_abs() as usize;
    if width < 0 { format!("{text:<columns$}") } else { format!("{text:>columns$}") }
}

/// The row under the titles: a colon stands on the side that a column is aligned to.
fn rule(width: i32) -> String {
    let columns = width.unsigned_abs() as usize;
    if width < 0 { "-".repeat(columns) } else { format!("{}:", "-".repeat(columns - 1)) }
}

fn size(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib < 1024.0 { format!("{mib:.2} MiB") } else { format!("{:.2} GiB", mib / 1024.0) }
}

fn parameters(n: u64) -> String {
    let millions = n as f64 / 1e6;
    if millions < 1e3 { format!("{millions:.2} M") } else { format!("{:.2} B", millions / 1e3) }
}

fn speed(r: &Record) -> String {
    let deviation = standard_deviation(&r.measurement.tokens_per_second());
    format!("{:.2} ± {deviation:.2}", r.tokens_per_second())
}

fn milliseconds(ms: Option<f64>) -> String {
    known(ms, 3)
}

fn known(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |v| format!("{v:.decimals$}"))
}
