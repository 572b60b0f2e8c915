//! GGUF versions 2 and 3, read with every length checked before it is believed.
//!
//! ```text
//! header   "GGUF" | version u32 | tensor count u64 | key count u64        all little-endian
//! key      length u64, bytes | value type u32 | value
//! tensor   length u64, name | dimensions u32 | u64 each | type u32 | offset u64
//! data     from the next multiple of general.alignment; tensor at data start + offset
//! ```
//!
//! Stricter than the container's description where engines are: names and keys stand once,
//! offsets are the running sum of padded sizes, arrays do not nest.
//! Source: the GGUF description of the ggml project and what its reader refuses.

mod cursor;
mod types;
mod value;

use super::metadata::{Metadata, Value};
use crate::error::{Defect, Error, Result};
pub(super) use cursor::Bytes;
use cursor::Cursor;
use std::collections::HashSet;
use std::path::Path;
pub(crate) use types::GgmlType;

/// Most tensors, and most keys.
const COUNT_CAP: u64 = 65_536;
/// Most bytes of a key.
const KEY_CAP: u64 = 65_535;
/// Most bytes of a tensor name.
const NAME_CAP: u64 = 64;
/// Most elements of a tensor: far beyond any weight, low enough that a block size cannot
/// overflow 64 bits.
const ELEMENT_CAP: u64 = 1 << 42;
/// Alignment of the data section where the file does not say.
pub(super) const DEFAULT_ALIGNMENT: u64 = 32;
/// The key that says.
pub(super) const ALIGNMENT_KEY: &str = "general.alignment";

/// A tensor as the header describes it.
pub(super) struct RawTensor {
    pub(super) name: String,
    /// Type id as it stands in the file.
    pub(super) type_id: u32,
    /// The type, `None` for an id that the format does not define (only when tolerated).
    pub(super) kind: Option<GgmlType>,
    /// Innermost dimension first, elements.
    pub(super) shape: Vec<u64>,
    /// Bytes of the data, `None` where `kind` is.
    pub(super) bytes: Option<u64>,
    /// From the start of the file, bytes.
    pub(super) data_offset: u64,
}

/// Everything before the data.
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<RawTensor>,
}

/// Reads the header of a file (`file_bytes` long) and checks that the data is all there.
///
/// With `tolerate_unknown`, a tensor type id that the format does not define is listed without a
/// size instead of failing.
pub(super) fn read_header(
    path: &Path,
    bytes: Bytes<'_>,
    file_bytes: u64,
    tolerate_unknown: bool,
) -> Result<Header> {
    let mut c = Cursor::new(path, bytes, file_bytes);
    magic(&mut c)?;
    let version = version(&mut c)?;
    let tensor_count = count(&mut c, "tensor count")?;
    let key_count = count(&mut c, "key count")?;

    let mut metadata = Metadata::new(path);
    for i in 0..key_count {
        key_value(&mut c, &mut metadata, i)?;
    }
    let alignment = alignment(path, &metadata)?;

    let mut tensors = Tensors {
        path,
        alignment,
        tolerate_unknown,
        list: Vec::new(),
        names: HashSet::new(),
        end: 0,
        exact: true,
    };
    for i in 0..tensor_count {
        tensors.read(&mut c, i)?;
    }
    // Within the header's cap, so far below 2^64.
    let data_start = c.position().next_multiple_of(alignment);
    let tensors = tensors.place(data_start, file_bytes)?;
    Ok(Header { version, metadata, tensors })
}

fn magic(c: &mut Cursor<'_>) -> Result<()> {
    let at = format_args!("magic");
    let found = c.bytes4(at)?;
    if found == *b"GGUF" {
        return Ok(());
    }
    let older = ["ggml", "ggmf", "ggjt", "lmgg", "fmgg", "tjgg"]
        .iter()
        .any(|m| found.eq_ignore_ascii_case(m.as_bytes()));
    let hint = if older {
        "an older format of the same family; convert the model to GGUF"
    } else {
        "this is no GGUF file (safetensors models are given as their folder)"
    };
    let why = format!("expected \"GGUF\", found \"{}\": {hint}", found.escape_ascii());
    Err(c.error(at, 0, Defect::BadMagic, why))
}

fn version(c: &mut Cursor<'_>) -> Result<u32> {
    let at = format_args!("version");
    let offset = c.position();
    let version = c.u32(at)?;
    let why = match version {
        2 | 3 => return Ok(version),
        1 => "version 1 has 32-bit counts; convert the model again".to_owned(),
        v if v & 0xFFFF == 0 && v != 0 => {
            format!("{v:#010x} is a big-endian file; only little-endian ones are read")
        }
        0 => "version 0 does not exist".to_owned(),
        v => format!("version {v} is newer than 3, the last one known"),
    };
    Err(c.error(at, offset, Defect::BadVersion, why))
}

fn count(c: &mut Cursor<'_>, what: &str) -> Result<u64> {
    let offset = c.position();
    let count = c.u64(format_args!("{what}"))?;
    if count > COUNT_CAP {
        let why = format!("{count} is over the limit of {COUNT_CAP}");
        return Err(c.error(format_args!("{what}"), offset, Defect::BadCount, why));
    }
    Ok(count)
}

fn key_value(c: &mut Cursor<'_>, metadata: &mut Metadata, i: u64) -> Result<()> {
    let offset = c.position();
    let at = format_args!("key {i}");
    let key = value::string(c, KEY_CAP, Defect::BadKey, at)?;
    let bad = match key.iter().find(|b| !(b' '..=b'~').contains(b)) {
        _ if key.is_empty() => Some("the key is empty".to_owned()),
        Some(b) => Some(format!("byte {b:#04x} in \"{}\"; keys are ASCII", key.escape_ascii())),
        None => None,
    };
    if let Some(why) = bad {
        return Err(c.error(at, offset, Defect::BadKey, why));
    }
    let key = String::from_utf8_lossy(&key).into_owned();
    if metadata.contains(&key) {
        let at = format_args!("{key}");
        return Err(c.error(at, offset, Defect::Duplicate, "the key stands twice"));
    }
    let kind_offset = c.position();
    let kind = c.u32(format_args!("{key}"))?;
    let value_offset = c.position();
    let value = value::read(c, kind, kind_offset, format_args!("{key}"))?;
    metadata.push(key, Some(value_offset), value);
    Ok(())
}

/// `general.alignment` of the metadata, bytes.
pub(super) fn alignment(path: &Path, metadata: &Metadata) -> Result<u64> {
    let Some(entry) = metadata.entry(ALIGNMENT_KEY) else { return Ok(DEFAULT_ALIGNMENT) };
    let bad = |defect, why| Err(Error::invalid(path, ALIGNMENT_KEY, entry.offset, defect, why));
    match *entry.value {
        Value::U32(a) if a.is_power_of_two() && (8..=65_536).contains(&a) => Ok(u64::from(a)),
        Value::U32(a) => {
            bad(Defect::BadAlignment, format!("{a} is no power of two between 8 and 65536"))
        }
        ref other => bad(Defect::BadType, format!("is {}, must be u32", other.type_name())),
    }
}

/// Tensor infos under construction.
struct Tensors<'a> {
    path: &'a Path,
    alignment: u64,
    tolerate_unknown: bool,
    list: Vec<RawTensor>,
    names: HashSet<String>,
    /// Where the next tensor must start, bytes from the start of the data.
    end: u64,
    /// False after a tensor of unknown size: the next offset is then taken as it is.
    exact: bool,
}

impl Tensors<'_> {
    fn read(&mut self, c: &mut Cursor<'_>, i: u64) -> Result<()> {
        let name = self.name(c, i)?;
        let shape = shape(c, &name)?;
        let at = format_args!("tensor {name}");

        let offset = c.position();
        let type_id = c.u32(at)?;
        let kind = types::by_id(type_id);
        if kind.is_none() && !self.tolerate_unknown {
            let why = format!("type id {type_id} is {}", types::why_unknown(type_id));
            return Err(c.error(at, offset, Defect::UnknownType, why));
        }
        let bytes = kind.map(|kind| byte_size(c, &name, &shape, kind, offset)).transpose()?;

        let offset = c.position();
        let data_offset = c.u64(at)?;
        let bad = |why| Err(c.error(at, offset, Defect::BadOffset, why));
        if data_offset % self.alignment != 0 {
            return bad(format!("{data_offset} is no multiple of {}", self.alignment));
        }
        if data_offset != self.end && (self.exact || data_offset < self.end) {
            return bad(format!(
                "data starts at {data_offset}, must follow the tensor before it at {}",
                self.end
            ));
        }
        self.exact = bytes.is_some();
        self.end = data_offset
            .checked_add(bytes.unwrap_or(0))
            .and_then(|end| end.checked_next_multiple_of(self.alignment))
            .ok_or_else(|| {
                let why = "the sum of all tensor sizes is beyond 64 bits";
                c.error(at, offset, Defect::SizeOverflow, why)
            })?;
        self.names.insert(name.clone());
        self.list.push(RawTensor { name, type_id, kind, shape, bytes, data_offset });
        Ok(())
    }

    fn name(&self, c: &mut Cursor<'_>, i: u64) -> Result<String> {
        let offset = c.position();
        let at = format_args!("name of tensor {i}");
        let bytes = value::string(c, NAME_CAP, Defect::BadName, at)?;
        let legal = |b: &u8| b.is_ascii_graphic() && !matches!(b, b'/' | b'\\');
        if bytes.is_empty() || !bytes.iter().all(legal) || bytes.windows(2).any(|w| w == b"..") {
            let why = format!(
                "\"{}\": names are printable ASCII without spaces, slashes or \"..\"",
                bytes.escape_ascii()
            );
            return Err(c.error(at, offset, Defect::BadName, why));
        }
        let name = String::from_utf8_lossy(&bytes).into_owned();
        if self.names.contains(&name) {
            let at = format_args!("tensor {name}");
            return Err(c.error(at, offset, Defect::Duplicate, "the tensor stands twice"));
        }
        Ok(name)
    }

    /// Makes offsets absolute and checks that the file holds the data.
    fn place(mut self, data_start: u64, file_bytes: u64) -> Result<Vec<RawTensor>> {
        for t in &mut self.list {
            let at = || format!("tensor {}", t.name);
            let bytes = t.bytes.unwrap_or(0);
            let start = data_start.checked_add(t.data_offset);
            let Some((start, end)) = start.and_then(|s| Some((s, s.checked_add(bytes)?))) else {
                let why = format!("offset {} is beyond 64 bits", t.data_offset);
                return Err(Error::invalid(self.path, at(), None, Defect::BadOffset, why));
            };
            if end > file_bytes {
                let why = format!(
                    "data is bytes {start}..{end}, the file has {file_bytes}; fetch it again"
                );
                let offset = Some(file_bytes);
                return Err(Error::invalid(self.path, at(), offset, Defect::Truncated, why));
            }
            t.data_offset = start;
        }
        let end = data_start.saturating_add(self.end);
        if file_bytes > end && self.exact && !self.list.is_empty() {
            // llama.cpp accepts it too; a signature or a note may stand there.
            log::warn!(
                "{}: {} bytes after the last tensor are ignored",
                self.path.display(),
                file_bytes - end
            );
        }
        Ok(self.list)
    }
}

fn shape(c: &mut Cursor<'_>, name: &str) -> Result<Vec<u64>> {
    let at = format_args!("tensor {name}");
    let start = c.position();
    let dimensions = c.u32(at)?;
    if !(1..=4).contains(&dimensions) {
        let why = format!("{dimensions} dimensions; a weight has 1 to 4");
        return Err(c.error(at, start, Defect::BadShape, why));
    }
    let mut shape = Vec::with_capacity(4);
    let mut elements = 1u64;
    for d in 0..dimensions {
        let offset = c.position();
        let size = c.u64(at)?;
        if size == 0 || i64::try_from(size).is_err() {
            let why = format!("dimension {d} is {size}");
            return Err(c.error(at, offset, Defect::BadShape, why));
        }
        elements = match elements.checked_mul(size) {
            Some(n) if n <= ELEMENT_CAP => n,
            _ => {
                let why = format!("dimension {d} is {size}: more than 2^42 elements in all");
                return Err(c.error(at, offset, Defect::SizeOverflow, why));
            }
        };
        shape.push(size);
    }
    Ok(shape)
}

/// `columns / elements per block · bytes per block · rows`, bytes.
fn byte_size(
    c: &Cursor<'_>,
    name: &str,
    shape: &[u64],
    kind: GgmlType,
    offset: u64,
) -> Result<u64> {
    let at = format_args!("tensor {name}");
    let columns = shape[0];
    if !columns.is_multiple_of(kind.elements) {
        let why = format!(
            "a row of {columns} is no multiple of {}'s block of {}",
            kind.name, kind.elements
        );
        return Err(c.error(at, offset, Defect::BadShape, why));
    }
    shape[1..]
        .iter()
        .try_fold(columns / kind.elements, |n, &d| n.checked_mul(d))
        .and_then(|blocks| blocks.checked_mul(kind.bytes))
        .ok_or_else(|| c.error(at, offset, Defect::SizeOverflow, "its size is beyond 64 bits"))
}
