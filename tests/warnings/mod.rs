//! What the library warns about: the lines that it logs in the calling thread.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use log::{LevelFilter, Log, Metadata, Record};
use std::cell::RefCell;

thread_local! {
    static LINES: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

struct Lines;

impl Log for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &Record<'_>) {
        LINES.with_borrow_mut(|lines| lines.push(format!("{}: {}", record.level(), record.args())));
    }
    fn flush(&self) {}
}

/// What `work` gives, and what was logged meanwhile.
pub(crate) fn of<T>(work: impl FnOnce() -> T) -> (T, Vec<String>) {
    // The second test of a process finds it there.
    if log::set_logger(&Lines).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
    LINES.with_borrow_mut(Vec::clear);
    let value = work();
    (value, LINES.take())
}
