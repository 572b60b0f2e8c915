//! A model's named tensors and metadata, whatever they come from: a GGUF file, or seeded random
//! weights of a real model's shape that exist only as a rule.
//!
//! ```text
//! GGUF file ── header, checked ──▶ Checkpoint ── read(tensor, offset) ──▶ weights of any range
//! SHAPE:QUANT ── table ─────────▶     │
//!                                     └── write_gguf ──▶ a file that other engines load
//! ```
//!
//! A file may be cut, rewritten or removed by others at any time: every byte is copied by a positioned
//! read, checked against the extent that the header was found to have, and no page of a map is ever
//! looked at. So the outcome is an error or bytes of our own, never a signal. Whether all of them are of
//! one version of the file, [`Checkpoint::verify_unchanged`] tells after the last read, as far as
//! length and time of change tell it.
//!
//! Nothing here knows what a model does with its weights: the meaning of keys is `arch`'s.

mod gguf;
mod map;
mod metadata;
mod synthetic;
mod write;

pub use metadata::{Array, Entry, Metadata, StringArray, Value};
pub use synthetic::SyntheticSpec;
pub use write::{write_gguf, write_gguf_while};

use crate::error::{Defect, Error, Result};
use crate::quant::QuantFormat;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorInfo {
    /// Name, as GGUF names it.
    pub name: String,
    /// Weight format.
    pub format: QuantFormat,
    /// Elements per dimension, innermost first: `[columns, rows, …]`, 1 to 4 of them.
    pub shape: Vec<u64>,
    /// Size of the data, bytes.
    pub bytes: u64,
    /// Place in the checkpoint's list.
    index: usize,
}

impl TensorInfo {
    /// Elements of a row: the input features of a matrix.
    pub fn columns(&self) -> u64 {
        self.shape.first().copied().unwrap_or(0)
    }

    /// Rows, over all outer dimensions: the output features of a matrix, 1 for a vector.
    pub fn rows(&self) -> u64 {
        self.shape.iter().skip(1).product()
    }
}

/// Where the bytes of the tensors come from.
#[derive(Debug)]
enum Source {
    File {
        file: File,
        /// Length and time of change when the header was read.
        stamp: (u64, Option<SystemTime>),
        /// Start of each tensor, bytes from the start of the file.
        offsets: Vec<u64>,
    },
    /// The whole file, in memory of our own.
    Memory {
        bytes: Vec<u8>,
        /// Start of each tensor.
        offsets: Vec<u64>,
    },
    Synthetic(synthetic::Weights),
}

/// Named tensors and metadata.
#[derive(Debug)]
pub struct Checkpoint {
    metadata: Metadata,
    path: PathBuf,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    source: Source,
}

/// A tensor as [`Checkpoint::inspect_only`] lists it, of any type.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListedTensor {
    /// Name.
    pub name: String,
    /// Name of the type, `type 77` for an id that the format does not define.
    pub type_name: String,
    /// The type, where this crate serves it.
    pub format: Option<QuantFormat>,
    /// Elements per dimension, innermost first.
    pub shape: Vec<u64>,
    /// Size of the data, bytes; `None` for a type that the format does not define.
    pub bytes: Option<u64>,
}

/// What a model file holds, also where this crate cannot run it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Inspection {
    /// Version of the container.
    pub version: u32,
    /// Size of the file, bytes.
    pub file_bytes: u64,
    /// Keys and values.
    pub metadata: Metadata,
    /// Tensors in file order.
    pub tensors: Vec<ListedTensor>,
}

/// What is offered instead of a tensor type that is not served.
fn served_types() -> String {
    let names: Vec<_> = QuantFormat::ALL.iter().map(|f| f.name()).collect();
    format!("use a file with only {}", names.join(", "))
}

impl Checkpoint {
    /// Opens a GGUF file: reads and checks its header; the weights stay where they are.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read or is no regular file; [`Error::InvalidModel`] for
    /// every way in which it is malformed; [`Error::Unsupported`] for a folder, one part of a
    /// split model, or a tensor of a type that this crate does not serve.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, stamp) = open_regular(path)?;
        refuse_split_name(path)?;
        let header = gguf::read_header(path, gguf::Bytes::File(&file), stamp.0, false)?;
        Self::of_header(path, header, |offsets| Source::File { file, stamp, offsets })
    }

    /// A GGUF file that is in memory; `path` is what errors call it. Nothing that happens to a
    /// file can change what is read from it.
    ///
    /// # Errors
    /// [`Error::InvalidModel`] and [`Error::Unsupported`] as [`open`](Self::open).
    pub fn from_gguf(path: &Path, bytes: Vec<u8>) -> Result<Self> {
        let length = bytes.len() as u64;
        let header = gguf::read_header(path, gguf::Bytes::Memory(&bytes), length, false)?;
        Self::of_header(path, header, |offsets| Source::Memory { bytes, offsets })
    }

    /// Takes a header whose tensors are all of types that are served.
    fn of_header(
        path: &Path,
        header: gguf::Header,
        source: impl FnOnce(Vec<u64>) -> Source,
    ) -> Result<Self> {
        if header.metadata.u64_key("split.count")?.is_some_and(|n| n > 1) {
            return Err(split(path, "split.count", "one part of a split model"));
        }
        let mut tensors = Vec::with_capacity(header.tensors.len());
        let mut offsets = Vec::with_capacity(header.tensors.len());
        for (index, t) in header.tensors.into_iter().enumerate() {
            let (Some(format), Some(bytes)) = (QuantFormat::from_ggml_id(t.type_id), t.bytes)
            else {
                let kind = t.kind.map_or("of an unknown id", |k| k.name);
                return Err(Error::Unsupported {
                    path: path.to_owned(),
                    at: format!("tensor {}", t.name),
                    what: format!("tensor type {kind}"),
                    instead: served_types(),
                });
            };
            tensors.push(TensorInfo { name: t.name, format, shape: t.shape, bytes, index });
            offsets.push(t.data_offset);
        }
        Ok(Self::assemble(path.to_owned(), header.metadata, tensors, source(offsets)))
    }

    /// Weights of a real model's shape, seeded random, made when they are read.
    ///
    /// # Errors
    /// [`Error::Internal`] when the table of shapes does not fit the weight formats.
    pub fn synthetic(spec: &SyntheticSpec) -> Result<Self> {
        let path = PathBuf::from(spec.to_string());
        let made = synthetic::build(spec, &path)?;
        Ok(Self::assemble(path, made.metadata, made.tensors, Source::Synthetic(made.weights)))
    }

    fn assemble(
        path: PathBuf,
        metadata: Metadata,
        tensors: Vec<TensorInfo>,
        source: Source,
    ) -> Self {
        let by_name = tensors.iter().map(|t| (t.name.clone(), t.index)).collect();
        Self { metadata, path, tensors, by_name, source }
    }

    /// Lists what a GGUF file holds, tolerating tensor types that this crate does not serve and
    /// ids that the format does not define.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::InvalidModel`] as [`open`](Self::open), [`Error::Unsupported`]
    /// only for a folder.
    pub fn inspect_only(path: &Path) -> Result<Inspection> {
        let (file, (file_bytes, _)) = open_regular(path)?;
        let header = gguf::read_header(path, gguf::Bytes::File(&file), file_bytes, true)?;
        let list = |t: gguf::RawTensor| ListedTensor {
            name: t.name,
            type_name: t.kind.map_or_else(|| format!("type {}", t.type_id), |k| k.name.to_owned()),
            format: QuantFormat::from_ggml_id(t.type_id),
            shape: t.shape,
            bytes: t.bytes,
        };
        Ok(Inspection {
            version: header.version,
            file_bytes,
            metadata: header.metadata,
            tensors: header.tensors.into_iter().map(list).collect(),
        })
    }

    /// The file, or for synthetic weights what they were asked for as: `llama-3.2-1b:q4_k_m`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the weights are made up.
    pub fn is_synthetic(&self) -> bool {
        matches!(self.source, Source::Synthetic(_))
    }

    /// Keys and values.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// `general.architecture`.
    ///
    /// # Errors
    /// As [`Metadata::required_str`].
    pub fn architecture(&self) -> Result<&str> {
        self.metadata.required_str("general.architecture")
    }

    /// Alignment of tensor data in a file, bytes.
    fn alignment(&self) -> Result<u64> {
        gguf::alignment(&self.path, &self.metadata)
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// Fills `out` with bytes `[offset, offset + out.len())` of a tensor's data.
    ///
    /// May be called from any number of threads at once. From a file: positioned reads, repeated
    /// while they are short or interrupted. Synthetic: the same bytes for the same range, always.
    ///
    /// # Errors
    /// [`Defect::Truncated`] when the file has become shorter, [`Error::Io`] when it cannot be
    /// read, [`Error::Usage`] when the range is not inside the tensor or the tensor is another
    /// checkpoint's.
    pub fn read(&self, info: &TensorInfo, offset: u64, out: &mut [u8]) -> Result<()> {
        if self.tensors.get(info.index) != Some(info) {
            let path = self.path.display();
            return Err(Error::Usage(format!("{path}: tensor {} is not of this file", info.name)));
        }
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > info.bytes) {
            return Err(Error::Usage(format!(
                "{}: tensor {}: {} bytes at {offset} are outside its {} bytes",
                self.path.display(),
                info.name,
                out.len(),
                info.bytes
            )));
        }
        match &self.source {
            Source::File { file, offsets, .. } => {
                let at = format!("tensor {}", info.name);
                read_exact_at(&self.path, file, &at, offsets[info.index] + offset, out)
            }
            Source::Memory { bytes, offsets } => {
                // Within the file: checked when its header was read.
                let from = (offsets[info.index] + offset) as usize;
                out.copy_from_slice(&bytes[from..from + out.len()]);
                Ok(())
            }
            Source::Synthetic(weights) => {
                weights.fill(info.index, offset, out);
                Ok(())
            }
        }
    }

    /// Bytes `[offset, offset + bytes)` of a tensor's data will be read soon: a file's pages are asked
    /// for meanwhile. Changes nothing but the time.
    pub fn will_read(&self, info: &TensorInfo, offset: u64, bytes: u64) {
        if let Source::File { file, offsets, .. } = &self.source
            && let Some(start) = offsets.get(info.index)
        {
            map::will_read(file, start.saturating_add(offset), bytes);
        }
    }

    /// All bytes of a tensor's data, `[info.bytes]`.
    ///
    /// # Errors
    /// As [`read`](Self::read); [`Error::Usage`] when the tensor is larger than the address space
    /// or the memory left.
    pub fn read_all(&self, info: &TensorInfo) -> Result<Vec<u8>> {
        let too_large = || {
            let (path, name, bytes) = (self.path.display(), &info.name, info.bytes);
            Error::Usage(format!("{path}: tensor {name}: no memory for its {bytes} bytes"))
        };
        let bytes = usize::try_from(info.bytes).map_err(|_| too_large())?;
        let mut out = Vec::new();
        out.try_reserve_exact(bytes).map_err(|_| too_large())?;
        out.resize(bytes, 0);
        self.read(info, 0, &mut out)?;
        Ok(out)
    }

    /// Checks that the file is still the one whose header was read: same length, same time of
    /// change. To be asked after the last weight was read.
    ///
    /// # Errors
    /// [`Error::Io`] when it changed or cannot be asked.
    pub fn verify_unchanged(&self) -> Result<()> {
        let Source::File { file, stamp, .. } = &self.source else { return Ok(()) };
        let asking = |e| Error::io(&self.path, "check that the file did not change", e);
        let now = file.metadata().map_err(asking)?;
        if (now.len(), now.modified().ok()) != *stamp {
            return Err(asking(io::Error::other("it was rewritten while it was being read")));
        }
        Ok(())
    }
}

macro_rules! metadata_getters {
    ($($name:ident -> $result:ty),* $(,)?) => {
        /// Getters of [`Metadata`], for short.
        impl Checkpoint {
            $(
                #[doc = concat!("[`Metadata::", stringify!($name), "`].")]
                ///
                /// # Errors
                /// As there.
                pub fn $name(&self, key: &str) -> Result<$result> {
                    self.metadata.$name(key)
                }
            )*
        }
    };
}

metadata_getters! {
    u64_key -> Option<u64>,
    f32_key -> Option<f32>,
    bool_key -> Option<bool>,
    str_key -> Option<&str>,
    strings_key -> Option<&StringArray>,
    str_array_key -> Option<Vec<&str>>,
    i32_array_key -> Option<Vec<i32>>,
    f32_array_key -> Option<Vec<f32>>,
    bool_array_key -> Option<&[bool]>,
    u64_array_key -> Option<Vec<u64>>,
    required_u64 -> u64,
    required_f32 -> f32,
    required_bool -> bool,
    required_str -> &str,
    required_strings -> &StringArray,
}

/// Opens a regular file, without ever opening what could block; gives its length and time of
/// change.
fn open_regular(path: &Path) -> Result<(File, (u64, Option<SystemTime>))> {
    let opening = |e| Error::io(path, "open", e);
    let kind = std::fs::metadata(path).map_err(opening)?;
    if kind.is_dir() {
        return Err(Error::Unsupported {
            path: path.to_owned(),
            at: "folder".to_owned(),
            what: "reading safetensors folders".to_owned(),
            instead: "give a GGUF file".to_owned(),
        });
    }
    let irregular = || opening(io::Error::other("it is not a regular file"));
    if !kind.is_file() {
        return Err(irregular());
    }
    let file = File::open(path).map_err(opening)?;
    let now = file.metadata().map_err(opening)?;
    if !now.is_file() {
        return Err(irregular());
    }
    Ok((file, (now.len(), now.modified().ok())))
}

fn split(path: &Path, at: impl Into<String>, what: impl Into<String>) -> Error {
    Error::Unsupported {
        path: path.to_owned(),
        at: at.into(),
        what: what.into(),
        instead: "merge the parts into one file first (gguf-split --merge)".to_owned(),
    }
}

/// Refuses `NAME-00001-of-00003.gguf`, saying which parts are missing beside it.
fn refuse_split_name(path: &Path) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let Some((stem, part, parts)) = split_name(&name) else { return Ok(()) };
    let missing = (1..=parts)
        .find(|i| !path.with_file_name(format!("{stem}-{i:05}-of-{parts:05}.gguf")).exists())
        .map(|i| format!("; part {i} of {parts} is missing beside it"))
        .unwrap_or_default();
    Err(split(path, "file name", format!("part {part} of {parts} of a split model{missing}")))
}

/// Stem, part and number of parts of a split file's name; `None` for a model in one file.
fn split_name(name: &str) -> Option<(&str, u32, u32)> {
    let five = |digits: &str| {
        (digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit()))
            .then(|| digits.parse().ok())
            .flatten()
    };
    let (rest, parts) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, part) = rest.rsplit_once('-')?;
    let (part, parts): (u32, u32) = (five(part)?, five(parts)?);
    (parts > 1).then_some((stem, part, parts))
}

fn read_exact_at(
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
