//! A model's named tensors and metadata, whatever they come from: GGUF files, a folder of
//! safetensors, or seeded random weights of a real model's shape that exist only as a rule.
//!
//! ```text
//! GGUF, one file or several ── headers, checked ──▶ Checkpoint ── read(tensor, offset) ──▶ weights
//! folder of safetensors ────── names and keys mapped ──▶ │         of any range
//! SHAPE:QUANT ──────────────── table ──────────────────▶ │
//!                                     write_gguf ◀───────┘  a file that other engines load
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
mod inspection;
mod map;
mod metadata;
mod safetensors;
mod source;
mod split;
mod synthetic;
mod write;

pub use inspection::{Inspection, ListedTensor};
pub use metadata::{Array, Entry, Metadata, StringArray, Value};
pub use synthetic::SyntheticSpec;
pub use write::{write_gguf, write_gguf_while};

use crate::error::{Defect, Error, Result};
use crate::quant::QuantFormat;
use source::{Content, DataFile, Span};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

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
    Files {
        files: Vec<DataFile>,
        /// Of each tensor.
        contents: Vec<Content>,
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

/// The refusal of a tensor whose type is not served.
fn unserved(path: &Path, tensor: &str, kind: &str) -> Error {
    let names: Vec<_> = QuantFormat::ALL.iter().map(|f| f.name()).collect();
    Error::Unsupported {
        path: path.to_owned(),
        at: format!("tensor {tensor}"),
        what: format!("tensor type {kind}"),
        instead: format!("use a file with only {}", names.join(", ")),
    }
}

impl Checkpoint {
    /// Opens a model: a GGUF file, any part of a split one, or a folder with `config.json` and
    /// safetensors. Reads and checks what stands before the weights; they stay where they are.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read or is no regular file; [`Error::InvalidModel`] for
    /// every way in which it is malformed, or a part is missing; [`Error::Unsupported`] for a
    /// tensor of a type that this crate does not serve, or a folder whose `config.json` asks for
    /// what cannot be mapped to the names and keys of GGUF.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            let made = safetensors::open(path)?;
            let source = Source::Files { files: made.files, contents: made.contents };
            return Ok(Self::assemble(path.to_owned(), made.metadata, made.tensors, source));
        }
        Self::of_parts(path, split::open(path, false)?)
    }

    /// A GGUF file that is in memory; `path` is what errors call it. Nothing that happens to a
    /// file can change what is read from it.
    ///
    /// # Errors
    /// [`Error::InvalidModel`] and [`Error::Unsupported`] as [`open`](Self::open).
    pub fn from_gguf(path: &Path, bytes: Vec<u8>) -> Result<Self> {
        Self::of_parts(path, split::single(DataFile::memory(path, bytes), false)?)
    }

    /// Takes files whose tensors are all of types that are served.
    fn of_parts(path: &Path, parts: split::Parts) -> Result<Self> {
        let mut tensors = Vec::with_capacity(parts.tensors.len());
        let mut contents = Vec::with_capacity(parts.tensors.len());
        for (index, (file, t)) in parts.tensors.into_iter().enumerate() {
            let (Some(format), Some(bytes)) = (QuantFormat::from_ggml_id(t.type_id), t.bytes)
            else {
                let kind = t.kind.map_or("of an unknown id", |k| k.name);
                return Err(unserved(parts.files[file].path(), &t.name, kind));
            };
            tensors.push(TensorInfo { name: t.name, format, shape: t.shape, bytes, index });
            contents.push(Content::Whole(Span { file, offset: t.data_offset }));
        }
        let source = Source::Files { files: parts.files, contents };
        Ok(Self::assemble(path.to_owned(), parts.metadata, tensors, source))
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

    /// Lists what a model's files hold, tolerating tensor types that this crate does not serve,
    /// ids that the format does not define, and a split model whose parts do not fit together
    /// (then the one file is listed).
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::InvalidModel`] as [`open`](Self::open).
    pub fn inspect_only(path: &Path) -> Result<Inspection> {
        if path.is_dir() {
            return safetensors::inspect(path);
        }
        let parts = match split::open(path, true) {
            Err(Error::InvalidModel { defect: Defect::BadSplit, .. }) => split::alone(path)?,
            other => other?,
        };
        let list = |(_, t): (usize, gguf::RawTensor)| ListedTensor {
            name: t.name,
            type_name: t.kind.map_or_else(|| format!("type {}", t.type_id), |k| k.name.to_owned()),
            format: QuantFormat::from_ggml_id(t.type_id),
            shape: t.shape,
            bytes: t.bytes,
        };
        Ok(Inspection {
            container: format!("GGUF {}", parts.version),
            files: parts.files.len(),
            file_bytes: parts.files.iter().map(DataFile::bytes).sum(),
            metadata: parts.metadata,
            tensors: parts.tensors.into_iter().map(list).collect(),
        })
    }

    /// Lists what this checkpoint holds, as [`inspect_only`](Self::inspect_only) lists files.
    pub fn inspect(&self) -> Inspection {
        let list = |t: &TensorInfo| ListedTensor {
            name: t.name.clone(),
            type_name: t.format.name().to_owned(),
            format: Some(t.format),
            shape: t.shape.clone(),
            bytes: Some(t.bytes),
        };
        let (container, files, file_bytes) = match &self.source {
            Source::Synthetic(_) => ("synthetic", 0, 0),
            Source::Files { files, .. } => {
                ("files", files.len(), files.iter().map(DataFile::bytes).sum())
            }
        };
        Inspection {
            container: container.to_owned(),
            files,
            file_bytes,
            metadata: self.metadata.clone(),
            tensors: self.tensors.iter().map(list).collect(),
        }
    }

    /// The file or folder, or for synthetic weights what they were asked for as: `llama-3.2-1b:q4_k_m`.
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
            Source::Files { files, contents } => {
                contents[info.index].read(files, &info.name, offset, out)
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
        if let Source::Files { files, contents } = &self.source
            && let Some(Content::Whole(span)) = contents.get(info.index)
        {
            files[span.file].will_read(span.offset.saturating_add(offset), bytes);
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

    /// Checks that each file is still the one whose header was read: same length, same time of
    /// change. To be asked after the last weight was read.
    ///
    /// # Errors
    /// [`Error::Io`] when it changed or cannot be asked.
    pub fn verify_unchanged(&self) -> Result<()> {
        match &self.source {
            Source::Files { files, .. } => files.iter().try_for_each(DataFile::verify_unchanged),
            Source::Synthetic(_) => Ok(()),
        }
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

/// Whether there is a file or folder at `path`.
///
/// # Errors
/// [`Error::Io`] when the system does not tell, as of a link that leads to itself.
pub(crate) fn stands(path: &Path) -> Result<bool> {
    path.try_exists().map_err(|e| Error::io(path, "look for it", e))
}

/// The byte of `text` at which JSON stops being what it should be.
pub(crate) fn json_place(text: &[u8], error: &serde_json::Error) -> u64 {
    // Lines and columns count from 1, columns in bytes; both are 0 for an empty text.
    let lines = text.split_inclusive(|b| *b == b'\n').take(error.line().saturating_sub(1));
    let before: usize = lines.map(<[u8]>::len).sum();
    (before + error.column().saturating_sub(1)) as u64
}

/// The bytes of a small file beside a model, refused when it has more than `cap`.
///
/// # Errors
/// [`Error::Io`] when it cannot be read, [`Defect::BadCount`] when it is too large.
pub(crate) fn read_small_file(path: &Path, cap: u64) -> Result<Vec<u8>> {
    let file = DataFile::open(path)?;
    if file.bytes() > cap {
        let why = format!("has {} bytes, at most {cap} are read", file.bytes());
        return Err(Error::invalid(path, "file", None, Defect::BadCount, why));
    }
    // At most `cap`, which fits memory.
    let mut bytes = vec![0; file.bytes() as usize];
    file.read_exact_at("file", 0, &mut bytes)?;
    Ok(bytes)
}
