//! Writes a checkpoint as a GGUF file (version 3) that other engines load.

use super::metadata::{Array, StringArray, Value};
use super::{Checkpoint, TensorInfo};
use crate::error::{Error, Result};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Bytes of weights held at a time.
const CHUNK: usize = 32 << 20;

/// Writes `checkpoint` to `path`; `progress` is told (bytes of weights done, of all).
///
/// The file appears under its name only when it is complete: it grows as a neighbour with another
/// name, which is removed on error. What is there and is no file (a pipe, a device) is written to as
/// it is.
///
/// # Errors
/// [`Error::Io`] when it cannot be written; the errors of [`Checkpoint::read`].
pub fn write_gguf(
    checkpoint: &Checkpoint,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    write_gguf_while(checkpoint, path, &mut |done, total| {
        progress(done, total);
        ControlFlow::Continue(())
    })
}

/// [`write_gguf`], which `progress` may end; asked at least every 32 MiB.
///
/// # Errors
/// As there; [`Error::Interrupted`] when `progress` said stop: nothing is left behind then.
pub fn write_gguf_while(
    checkpoint: &Checkpoint,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<()> {
    let mut told = |done, total| match progress(done, total) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Interrupted),
    };
    let mut partial = Partial::create(path)?;
    let mut out = BufWriter::with_capacity(1 << 20, &partial.file);
    let writing = |e| Error::io(path, "write", e);

    let alignment = checkpoint.alignment()?;
    let header = header(checkpoint, alignment)?;
    out.write_all(&header).map_err(writing)?;
    pad(&mut out, header.len() as u64, alignment).map_err(writing)?;

    let total = checkpoint.tensors().iter().map(|t| t.bytes).sum();
    let mut done = 0;
    let mut chunk = Vec::new();
    told(done, total)?;
    for tensor in checkpoint.tensors() {
        let mut offset = 0;
        while offset < tensor.bytes {
            let now = (tensor.bytes - offset).min(CHUNK as u64);
            chunk.resize(now as usize, 0);
            checkpoint.read(tensor, offset, &mut chunk)?;
            out.write_all(&chunk).map_err(writing)?;
            offset += now;
            done += now;
            told(done, total)?;
        }
        pad(&mut out, tensor.bytes, alignment).map_err(writing)?;
    }
    out.flush().map_err(writing)?;
    drop(out);
    partial.publish(path)
}

fn pad(out: &mut impl Write, written: u64, alignment: u64) -> std::io::Result<()> {
    // An alignment is at most 65536.
    out.write_all(&vec![0; (written.next_multiple_of(alignment) - written) as usize])
}

/// A file under a temporary name, removed unless it is published; or what is no file, as it is.
struct Partial {
    name: PathBuf,
    file: File,
    published: bool,
}

impl Partial {
    fn create(path: &Path) -> Result<Self> {
        // A device or a pipe is written to as it is: a file in its place would not be it.
        if fs::metadata(path).is_ok_and(|m| !m.is_file() && !m.is_dir()) {
            let file = OpenOptions::new().write(true).open(path);
            let file = file.map_err(|e| Error::io(path, "open", e))?;
            return Ok(Self { name: path.to_owned(), file, published: true });
        }
        let Some(base) = path.file_name() else {
            return Err(Error::Usage(format!("{}: is no file name", path.display())));
        };
        let mut name = OsString::from(".");
        name.push(base);
        name.push(format!(".{}.partial", std::process::id()));
        let name = path.with_file_name(name);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&name)
            .map_err(|e| Error::io(&name, "create", e))?;
        Ok(Self { name, file, published: false })
    }

    fn publish(&mut self, path: &Path) -> Result<()> {
        if self.published {
            return Ok(());
        }
        self.file.sync_all().map_err(|e| Error::io(path, "write", e))?;
        fs::rename(&self.name, path).map_err(|e| Error::io(path, "rename to", e))?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.published {
            // The error that led here is the one to report.
            let _ = fs::remove_file(&self.name);
        }
    }
}

/// Everything before the padding that precedes the data.
fn header(checkpoint: &Checkpoint, alignment: u64) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    out.extend_from_slice(b"GGUF");
    out.extend_from_slice(&3u32.to_le_bytes());
    length(&mut out, checkpoint.tensors().len());
    length(&mut out, checkpoint.metadata().len());
    for entry in checkpoint.metadata().entries() {
        string(&mut out, entry.key.as_bytes());
        value(&mut out, entry.value);
    }
    let mut offset = 0u64;
    for tensor in checkpoint.tensors() {
        tensor_info(&mut out, tensor, offset);
        offset = offset
            .checked_add(tensor.bytes)
            .and_then(|end| end.checked_next_multiple_of(alignment))
            .ok_or_else(|| Error::Internal("tensor sizes beyond 64 bits".to_owned()))?;
    }
    Ok(out)
}

fn tensor_info(out: &mut Vec<u8>, tensor: &TensorInfo, offset: u64) {
    string(out, tensor.name.as_bytes());
    out.extend_from_slice(&(tensor.shape.len() as u32).to_le_bytes());
    for size in &tensor.shape {
        out.extend_from_slice(&size.to_le_bytes());
    }
    out.extend_from_slice(&tensor.format.describe().ggml_id().to_le_bytes());
    out.extend_from_slice(&offset.to_le_bytes());
}

fn length(out: &mut Vec<u8>, count: usize) {
    out.extend_from_slice(&(count as u64).to_le_bytes());
}

fn string(out: &mut Vec<u8>, text: &[u8]) {
    length(out, text.len());
    out.extend_from_slice(text);
}

/// Type id and bytes of a value.
fn value(out: &mut Vec<u8>, value: &Value) {
    let mut scalar = |id: u32, bytes: &[u8]| {
        out.extend_from_slice(&id.to_le_bytes());
        out.extend_from_slice(bytes);
    };
    match value {
        Value::U8(x) => scalar(0, &x.to_le_bytes()),
        Value::I8(x) => scalar(1, &x.to_le_bytes()),
        Value::U16(x) => scalar(2, &x.to_le_bytes()),
        Value::I16(x) => scalar(3, &x.to_le_bytes()),
        Value::U32(x) => scalar(4, &x.to_le_bytes()),
        Value::I32(x) => scalar(5, &x.to_le_bytes()),
        Value::F32(x) => scalar(6, &x.to_le_bytes()),
        Value::Bool(x) => scalar(7, &[u8::from(*x)]),
        Value::String(x) => {
            scalar(8, &[]);
            string(out, x);
        }
        Value::Array(x) => {
            scalar(9, &[]);
            array(out, x);
        }
        Value::U64(x) => scalar(10, &x.to_le_bytes()),
        Value::I64(x) => scalar(11, &x.to_le_bytes()),
        Value::F64(x) => scalar(12, &x.to_le_bytes()),
    }
}

fn array(out: &mut Vec<u8>, array: &Array) {
    match array {
        Array::U8(v) => numbers(out, 0, v, |x| x.to_le_bytes()),
        Array::I8(v) => numbers(out, 1, v, |x| x.to_le_bytes()),
        Array::U16(v) => numbers(out, 2, v, |x| x.to_le_bytes()),
        Array::I16(v) => numbers(out, 3, v, |x| x.to_le_bytes()),
        Array::U32(v) => numbers(out, 4, v, |x| x.to_le_bytes()),
        Array::I32(v) => numbers(out, 5, v, |x| x.to_le_bytes()),
        Array::F32(v) => numbers(out, 6, v, |x| x.to_le_bytes()),
        Array::Bool(v) => numbers(out, 7, v, |x| [u8::from(x)]),
        Array::String(v) => strings(out, v),
        Array::U64(v) => numbers(out, 10, v, |x| x.to_le_bytes()),
        Array::I64(v) => numbers(out, 11, v, |x| x.to_le_bytes()),
        Array::F64(v) => numbers(out, 12, v, |x| x.to_le_bytes()),
    }
}

fn numbers<T: Copy, const N: usize>(
    out: &mut Vec<u8>,
    id: u32,
    values: &[T],
    bytes: fn(T) -> [u8; N],
) {
    out.extend_from_slice(&id.to_le_bytes());
    length(out, values.len());
    for &x in values {
        out.extend_from_slice(&bytes(x));
    }
}

fn strings(out: &mut Vec<u8>, strings: &StringArray) {
    out.extend_from_slice(&8u32.to_le_bytes());
    length(out, strings.len());
    for text in strings.iter() {
        string(out, text);
    }
}
