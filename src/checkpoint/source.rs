//! Where the bytes of a file's tensors stand, and how they are brought into the order that GGUF has.

use super::gguf::Bytes;
use super::map;
use crate::error::{Defect, Error, Result};
use crate::quant::QuantFormat;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A regular file that was opened once and is read by position.
#[derive(Debug)]
pub(super) struct DataFile {
    path: PathBuf,
    held: Held,
}

#[derive(Debug)]
enum Held {
    File {
        file: File,
        /// Length and time of change when it was opened.
        stamp: (u64, Option<SystemTime>),
    },
    /// The whole file, in memory of our own.
    Memory(Vec<u8>),
}

impl DataFile {
    /// Opens a regular file, without ever opening what could block.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let opening = |e| Error::io(path, "open", e);
        let irregular = || opening(io::Error::other("it is not a regular file"));
        if !std::fs::metadata(path).map_err(opening)?.is_file() {
            return Err(irregular());
        }
        let file = File::open(path).map_err(opening)?;
        let now = file.metadata().map_err(opening)?;
        if !now.is_file() {
            return Err(irregular());
        }
        let stamp = (now.len(), now.modified().ok());
        Ok(Self { path: path.to_owned(), held: Held::File { file, stamp } })
    }

    /// A file that is in memory; `path` is what errors call it.
    pub(super) fn memory(path: &Path, bytes: Vec<u8>) -> Self {
        Self { path: path.to_owned(), held: Held::Memory(bytes) }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Where its header is read from.
    pub(super) fn header(&self) -> Bytes<'_> {
        match &self.held {
            Held::File { file, .. } => Bytes::File(file),
            Held::Memory(bytes) => Bytes::Memory(bytes),
        }
    }

    /// Bytes `[offset, offset + bytes)` will be read soon.
    pub(super) fn will_read(&self, offset: u64, bytes: u64) {
        if let Held::File { file, .. } = &self.held {
            map::will_read(file, offset, bytes);
        }
    }

    /// Length when it was opened, bytes.
    pub(super) fn bytes(&self) -> u64 {
        match &self.held {
            Held::File { stamp, .. } => stamp.0,
            Held::Memory(bytes) => bytes.len() as u64,
        }
    }

    pub(super) fn verify_unchanged(&self) -> Result<()> {
        let Held::File { file, stamp } = &self.held else { return Ok(()) };
        let asking = |e| Error::io(&self.path, "check that the file did not change", e);
        let now = file.metadata().map_err(asking)?;
        if (now.len(), now.modified().ok()) != *stamp {
            return Err(asking(io::Error::other("it was rewritten while it was being read")));
        }
        Ok(())
    }

    /// Fills `out` from byte `offset` on; `what` is named in errors.
    pub(super) fn read_exact_at(&self, what: &str, offset: u64, out: &mut [u8]) -> Result<()> {
        match &self.held {
            Held::File { file, .. } => read_exact_at(&self.path, file, what, offset, out),
            Held::Memory(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let end = start.saturating_add(out.len());
                let from = bytes.get(start..end).ok_or_else(|| {
                    Error::Internal(format!("{what}: bytes {start}..{end} are not in memory"))
                })?;
                out.copy_from_slice(from);
                Ok(())
            }
        }
    }
}

/// Fills `out` from byte `offset` of `file` on; `at` is named in errors.
pub(super) fn read_exact_at(
    path: &Path,
    file: &File,
    at: &str,
    mut offset: u64,
    mut out: &mut [u8],
) -> Result<()> {
    while !out.is_empty() {
        match file.read_at(out, offset) {
            Ok(0) => {
                let why = "the file became shorter after it was opened; fetch it again";
                return Err(Error::invalid(path, at, Some(offset), Defect::Truncated, why));
            }
            Ok(n) => {
                out = &mut out[n..];
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => {
                let action = format!("read {} bytes at {offset} of {at}", out.len());
                return Err(Error::io(path, action, e));
            }
        }
    }
    Ok(())
}

/// A place in one of a checkpoint's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// Index of the file.
    pub(super) file: usize,
    /// Bytes from the start of the file.
    pub(super) offset: u64,
}

/// How a tensor's bytes come out of the files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// As they stand.
    Whole(Span),
    /// Matrices of `part_bytes` each, one after another: the experts of a layer.
    Stack { parts: Vec<Span>, part_bytes: u64 },
    /// Rows of heads, `head_rows` each, whose halves rotate together; given in the order in which
    /// neighbours do: row `2i + j` of a head is row `j · head_rows / 2 + i` of the file.
    Interleaved { span: Span, row_bytes: u64, head_rows: u64 },
    /// `f32(element) + 1`, for elements of `format`: norms that are stored as what they add to 1.
    PlusOne { span: Span, format: QuantFormat },
    /// Bytes that stand in no file.
    Made(Vec<u8>),
}

impl Content {
    /// Fills `out` with bytes from `offset` on of tensor `name`; the caller has checked the range.
    pub(super) fn read(
        &self,
        files: &[DataFile],
        name: &str,
        offset: u64,
        out: &mut [u8],
    ) -> Result<()> {
        let what = format!("tensor {name}");
        let read = |span: Span, skip: u64, out: &mut [u8]| {
            files[span.file].read_exact_at(&what, span.offset + skip, out)
        };
        match self {
            Self::Whole(span) => read(*span, offset, out),
            Self::Stack { parts, part_bytes } => {
                pieces(*part_bytes, offset, out, |i, skip, out| read(parts[i as usize], skip, out))
            }
            Self::Interleaved { span, row_bytes, head_rows } => {
                pieces(*row_bytes, offset, out, |row, skip, out| {
                    let (head, r) = (row / head_rows, row % head_rows);
                    let source = head * head_rows + (r % 2) * (head_rows / 2) + r / 2;
                    read(*span, source * row_bytes + skip, out)
                })
            }
            Self::PlusOne { span, format } => {
                plus_one(*format, offset, out, |skip, out| read(*span, skip, out))
            }
            Self::Made(bytes) => {
                let start = offset as usize;
                out.copy_from_slice(&bytes[start..start + out.len()]);
                Ok(())
            }
        }
    }
}

/// Cuts `out`, which begins at byte `offset`, at multiples of `size`: gives `one` the index of the
/// piece, where in it to begin, and where to put it.
fn pieces(
    size: u64,
    offset: u64,
    out: &mut [u8],
    mut one: impl FnMut(u64, u64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let (mut at, mut rest) = (offset, out);
    while !rest.is_empty() {
        let skip = at % size;
        let now = usize::try_from(size - skip).unwrap_or(usize::MAX).min(rest.len());
        let (piece, after) = rest.split_at_mut(now);
        one(at / size, skip, piece)?;
        at += now as u64;
        rest = after;
    }
    Ok(())
}

/// Elements read at a time by [`plus_one`].
const ELEMENTS: usize = 4096;

/// f32 elements, each one more than its source's.
fn plus_one(
    format: QuantFormat,
    offset: u64,
    out: &mut [u8],
    mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let size = format.describe().block_bytes();
    pieces((ELEMENTS * 4) as u64, offset, out, |i, skip, out| {
        let first = (skip / 4) as usize;
        let end = (skip as usize + out.len()).div_ceil(4);
        let mut bytes = vec![0; (end - first) * size];
        read((i * ELEMENTS as u64 + first as u64) * size as u64, &mut bytes)?;
        let mut values = vec![0.0f32; end - first];
        format.decode_row(&bytes, &mut values);
        let made: Vec<u8> = values.iter().flat_map(|v| (v + 1.0).to_le_bytes()).collect();
        let start = skip as usize - first * 4;
        out.copy_from_slice(&made[start..start + out.len()]);
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> (tempfile::TempDir, [DataFile; 1]) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        std::fs::write(&path, bytes).unwrap();
        let files = [DataFile::open(&path).unwrap()];
        (folder, files)
    }

    /// Every range of `content` is that range of `whole`.
    fn check(content: &Content, files: &[DataFile], whole: &[u8]) {
        for start in 0..=whole.len() {
            for end in start..=whole.len() {
                let mut out = vec![0xEE; end - start];
                content.read(files, "x", start as u64, &mut out).unwrap();
                assert_eq!(out, whole[start..end], "{start}..{end}");
            }
        }
    }

    #[test]
    fn rows_of_a_head_come_in_the_order_in_which_neighbours_rotate() {
        // Two heads of four rows of three bytes, after one byte of something else.
        let row = |r: u8| [10 * r, 10 * r + 1, 10 * r + 2];
        let bytes = [&[99][..], &(0..8).flat_map(row).collect::<Vec<_>>()].concat();
        let (_folder, files) = file(&bytes);
        let span = Span { file: 0, offset: 1 };
        let content = Content::Interleaved { span, row_bytes: 3, head_rows: 4 };
        let whole: Vec<u8> = [0, 2, 1, 3, 4, 6, 5, 7].into_iter().flat_map(row).collect();
        check(&content, &files, &whole);
    }

    #[test]
    fn parts_are_stacked_in_order() {
        let (_folder, files) = file(&(0..20).collect::<Vec<u8>>());
        let parts = [12, 0, 6].map(|offset| Span { file: 0, offset }).to_vec();
        let whole = [12, 13, 14, 15, 0, 1, 2, 3, 6, 7, 8, 9];
        check(&Content::Stack { parts, part_bytes: 4 }, &files, &whole);
    }

    #[test]
    fn one_is_added_to_stored_norms_in_f32() {
        let values = [0.5f32, -1.0, 0.25];
        let bytes: Vec<u8> =
            values.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect();
        let (_folder, files) = file(&bytes);
        let span = Span { file: 0, offset: 0 };
        let whole: Vec<u8> = [1.5f32, 0.0, 1.25].into_iter().flat_map(f32::to_le_bytes).collect();
        check(&Content::PlusOne { span, format: QuantFormat::Bf16 }, &files, &whole);
        let many: Vec<f32> = (0..ELEMENTS + 3).map(|i| i as f32).collect();
        let (_folder, files) = file(&many.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>());
        let content = Content::PlusOne { span, format: QuantFormat::F32 };
        let mut out = vec![0; 12];
        content.read(&files, "x", 4 * (ELEMENTS as u64 - 1), &mut out).unwrap();
        let expected: Vec<u8> =
            many[ELEMENTS - 1..ELEMENTS + 2].iter().flat_map(|v| (v + 1.0).to_le_bytes()).collect();
        assert_eq!(out, expected);
    }
}
