//! A bounded, forward-only reader over a file's header: the one place that turns bytes of an
//! untrusted file into numbers.

use super::super::read_exact_at;
use crate::error::{Defect, Error, Result};
use std::fmt::Arguments;
use std::fs::File;
use std::path::Path;

/// Most bytes of a header: magic to the last tensor info.
pub(super) const HEADER_CAP: u64 = 256 << 20;

/// Bytes copied out of the file at a time; bounds the memory used beyond the values kept.
const WINDOW: u64 = 1 << 20;

/// Where the bytes of a header are.
#[derive(Clone, Copy)]
pub(in super::super) enum Bytes<'a> {
    /// In a file, which may change at any time: they are copied before they are looked at.
    File(&'a File),
    /// In memory of our own, the whole file.
    Memory(&'a [u8]),
}

/// Reads little-endian fields in order, refusing to pass the end of the file or [`HEADER_CAP`].
pub(super) struct Cursor<'a> {
    path: &'a Path,
    bytes: Bytes<'a>,
    file_bytes: u64,
    window: Vec<u8>,
    /// Position in the file of `window[0]`.
    window_start: u64,
    /// Next byte within the window.
    next: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(path: &'a Path, bytes: Bytes<'a>, file_bytes: u64) -> Self {
        Self { path, bytes, file_bytes, window: Vec::new(), window_start: 0, next: 0 }
    }

    /// Bytes from the start of the file.
    pub(super) fn position(&self) -> u64 {
        self.window_start + self.next as u64
    }

    /// Bytes between the position and the end of the file.
    pub(super) fn left(&self) -> u64 {
        self.file_bytes - self.position()
    }

    /// An error about the field that starts at `offset`.
    pub(super) fn error(
        &self,
        at: Arguments<'_>,
        offset: u64,
        defect: Defect,
        why: impl Into<String>,
    ) -> Error {
        Error::invalid(self.path, at.to_string(), Some(offset), defect, why)
    }

    /// Fails unless the file still has `bytes` bytes.
    pub(super) fn need(&self, bytes: u64, at: Arguments<'_>) -> Result<()> {
        if bytes > self.left() {
            let why = format!(
                "needs {bytes} bytes, the file ends after {} more; fetch the file again",
                self.left()
            );
            return Err(self.error(at, self.position(), Defect::Truncated, why));
        }
        if self.position() + bytes > HEADER_CAP {
            let why = format!("the header is longer than {HEADER_CAP} bytes");
            return Err(self.error(at, self.position(), Defect::BadCount, why));
        }
        Ok(())
    }

    /// The next `count` bytes.
    pub(super) fn take(&mut self, count: usize, at: Arguments<'_>) -> Result<&[u8]> {
        self.need(count as u64, at)?;
        if self.window.len() - self.next < count {
            self.window.drain(..self.next);
            self.window_start += self.next as u64;
            self.next = 0;
            let have = self.window.len() as u64;
            let from = self.window_start + have;
            let want = (count as u64).max(WINDOW).min(self.file_bytes - self.window_start) - have;
            // `want` fits usize: it is at most `count` or the window.
            self.fill(from, want as usize)?;
        }
        let start = self.next;
        self.next += count;
        Ok(&self.window[start..self.next])
    }

    /// Appends bytes `[from, from + count)` to the window.
    fn fill(&mut self, from: u64, count: usize) -> Result<()> {
        match self.bytes {
            Bytes::File(file) => {
                let have = self.window.len();
                self.window.resize(have + count, 0);
                read_exact_at(self.path, file, "header", from, &mut self.window[have..])
            }
            Bytes::Memory(all) => {
                let from = usize::try_from(from).unwrap_or(usize::MAX);
                let end = from.saturating_add(count);
                let bytes = all.get(from..end).ok_or_else(|| {
                    Error::Internal(format!("bytes {from}..{end} of {} in memory", all.len()))
                })?;
                self.window.extend_from_slice(bytes);
                Ok(())
            }
        }
    }

    fn array<const N: usize>(&mut self, at: Arguments<'_>) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, at)?);
        Ok(out)
    }

    pub(super) fn bytes4(&mut self, at: Arguments<'_>) -> Result<[u8; 4]> {
        self.array(at)
    }

    pub(super) fn u8(&mut self, at: Arguments<'_>) -> Result<u8> {
        Ok(self.array::<1>(at)?[0])
    }

    pub(super) fn u16(&mut self, at: Arguments<'_>) -> Result<u16> {
        self.array(at).map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self, at: Arguments<'_>) -> Result<u32> {
        self.array(at).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, at: Arguments<'_>) -> Result<u64> {
        self.array(at).map(u64::from_le_bytes)
    }
}
