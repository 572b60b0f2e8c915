//! Asks the system for a file's pages ahead of the positioned reads that copy them.
//!
//! The map is never looked at: a page past the end of a file that was cut would kill the process
//! (SIGBUS), also when the length was checked just before. What is read, is read by position.

use memmap2::{Advice, MmapOptions};
use std::fs::File;

/// Bytes `[offset, offset + bytes)` of `file` will be read soon.
pub(super) fn will_read(file: &File, offset: u64, bytes: u64) {
    let Ok(length) = usize::try_from(bytes) else { return };
    if length == 0 {
        return;
    }
    // A hint: what fails here fails again, and is told, when the bytes are read.
    if let Ok(map) = MmapOptions::new().offset(offset).len(length).map_raw_read_only(file) {
        let _ = map.advise(Advice::WillNeed);
    }
}
