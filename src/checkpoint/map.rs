//! Copies ranges of a file out of short-lived memory maps: the only `unsafe` of the checkpoint.
//!
//! No reference to mapped bytes is ever formed and no map outlives one copy, so nothing in the
//! crate depends on the file staying as it is. Weights do not pass here: they are read by position.

#![allow(unsafe_code)]

use crate::error::{Defect, Error, Result};
use memmap2::MmapOptions;
use std::fs::File;
use std::path::Path;

/// Appends bytes `[offset, offset + bytes)` of `file` to `out`.
///
/// The length of the file is asked for again just before the map is touched: a page past the end
/// of a file that was cut meanwhile would kill the process (SIGBUS).
///
/// # Errors
/// [`Defect::Truncated`] when the file no longer has the range; [`Error::Io`] when it cannot be
/// mapped.
pub(super) fn copy_range(
    path: &Path,
    file: &File,
    offset: u64,
    bytes: usize,
    out: &mut Vec<u8>,
) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let reading = |e| Error::io(path, format!("map {bytes} bytes at {offset}"), e);
    let map =
        MmapOptions::new().offset(offset).len(bytes).map_raw_read_only(file).map_err(reading)?;
    let now = file.metadata().map_err(reading)?.len();
    if offset.checked_add(bytes as u64).is_none_or(|end| end > now) {
        return Err(Error::invalid(
            path,
            "file",
            Some(now),
            Defect::Truncated,
            "the file became shorter while it was being read; fetch it again",
        ));
    }
    out.reserve(bytes);
    let start = out.len();
    let from = map.as_ptr();
    let to = out.spare_capacity_mut().as_mut_ptr().cast::<u8>();
    // SAFETY: `map` holds `bytes` readable bytes (checked against the file's length just above)
    // and lives to the end of this function; `to` is spare capacity of at least `bytes` bytes
    // reserved above; the two cannot overlap. Another process may change the file during the
    // copy: no reference to the mapped bytes exists, and every byte value is a valid `u8`.
    unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
    // SAFETY: the copy above initialised `bytes` bytes from `start` on, within the capacity.
    unsafe { out.set_len(start + bytes) };
    Ok(())
}
