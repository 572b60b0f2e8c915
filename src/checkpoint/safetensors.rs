//! A folder of safetensors as a checkpoint: `config.json`, and one `model.safetensors` or the
//! shards that `model.safetensors.index.json` lists.
//!
//! ```text
//! file   header length u64, little-endian | header, JSON | data
//! header {"name": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [begin, end]}, …}
//! ```
//!
//! Tensors lie end to end from the start of the data to the end of the file: a gap, an overlap or
//! bytes after the last one are refused, as the format's own reader does. Names, keys and order of
//! rows become those that GGUF has; `families` says how. Nothing but the folder's own files is read.
//!
//! Source: the format's description and the crate `safetensors`, whose types and checks are used.

mod families;
mod json;
mod mapping;
mod rope;

use super::inspection::{Inspection, ListedTensor};
use super::metadata::Metadata;
use super::source::{Content, DataFile, Span};
use super::{TensorInfo, json_place, read_small_file, stands};
use crate::error::{Defect, Error, Result};
use crate::quant::QuantFormat;
use ::safetensors::tensor::{Dtype, Metadata as Header, TensorInfo as Entry};
use json::Json;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, Visitor};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::path::{Component, Path, PathBuf};

/// Most bytes of a header, as the format has it.
const HEADER_CAP: u64 = 100_000_000;
/// Most tensors of a file.
const TENSOR_CAP: usize = 65_536;
/// Most bytes of the index of the shards.
const INDEX_CAP: u64 = 64 << 20;
/// Most shards.
const SHARD_CAP: usize = 4096;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What a checkpoint is assembled from.
pub(super) struct Made {
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<TensorInfo>,
    pub(super) files: Vec<DataFile>,
    pub(super) contents: Vec<Content>,
}

/// A tensor as its file has it.
#[derive(Clone, Debug)]
struct Stored {
    name: String,
    dtype: Dtype,
    /// Outermost dimension first, elements.
    shape: Vec<u64>,
    bytes: u64,
    span: Span,
}

impl Stored {
    /// The format whose bytes these are, where this crate serves it.
    fn format(&self) -> Option<QuantFormat> {
        match self.dtype {
            Dtype::F32 => Some(QuantFormat::F32),
            Dtype::F16 => Some(QuantFormat::F16),
            Dtype::BF16 => Some(QuantFormat::Bf16),
            _ => None,
        }
    }
}

/// Opens the model in `folder` and maps it.
pub(super) fn open(folder: &Path) -> Result<Made> {
    let config = Json::config(folder)?;
    let (files, stored) = read(folder)?;
    mapping::map(folder, &config, files, stored)
}

/// Lists what stands in `folder`, under the names that it has there.
pub(super) fn inspect(folder: &Path) -> Result<Inspection> {
    let config = Json::config(folder)?;
    let (files, stored) = read(folder)?;
    let list = |t: Stored| ListedTensor {
        type_name: t.dtype.to_string(),
        format: t.format(),
        shape: t.shape.iter().rev().copied().collect(),
        bytes: Some(t.bytes),
        name: t.name,
    };
    Ok(Inspection {
        container: "safetensors".to_owned(),
        files: files.len(),
        file_bytes: files.iter().map(DataFile::bytes).sum(),
        metadata: config.metadata(),
        tensors: stored.into_iter().map(list).collect(),
    })
}

/// All files of the model and the tensors in them, each name once.
fn read(folder: &Path) -> Result<(Vec<DataFile>, Vec<Stored>)> {
    let index = folder.join(INDEX);
    let (paths, listed) = if stands(&index)? {
        shards(folder, &index)?
    } else {
        (vec![folder.join(SINGLE)], HashMap::new())
    };
    let (mut files, mut all) = (Vec::new(), Vec::new());
    let mut home: HashMap<String, usize> = HashMap::new();
    for (i, path) in paths.iter().enumerate() {
        let file = DataFile::open(path).map_err(|e| missing(folder, path, e))?;
        for (name, entry, offset) in header(path, &file)? {
            if let Some(other) = home.insert(name.clone(), i) {
                let why = format!("stands in {} too", paths[other].display());
                let at = format!("tensor {name}");
                return Err(Error::invalid(path, at, None, Defect::Duplicate, why));
            }
            let (begin, end) = entry.data_offsets;
            all.push(Stored {
                name,
                dtype: entry.dtype,
                shape: entry.shape.iter().map(|&n| n as u64).collect(),
                bytes: (end - begin) as u64,
                span: Span { file: i, offset },
            });
        }
        files.push(file);
    }
    for (name, shard) in listed {
        if home.get(&name) != Some(&shard) {
            let why = format!("{} does not have it, but {INDEX} says so", paths[shard].display());
            let at = format!("tensor {name}");
            return Err(Error::invalid(&index, at, None, Defect::MissingTensor, why));
        }
    }
    Ok((files, all))
}

fn missing(folder: &Path, path: &Path, error: Error) -> Error {
    match error {
        Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            let why = if path.ends_with(SINGLE) && !folder.join(INDEX).exists() {
                format!("the folder has neither {SINGLE} nor {INDEX}")
            } else {
                format!("the file is missing; {INDEX} lists it")
            };
            Error::invalid(path, "file", None, Defect::BadSplit, why)
        }
        other => other,
    }
}

/// Paths of the shards, and the shard of every tensor that the index lists.
fn shards(folder: &Path, index: &Path) -> Result<(Vec<PathBuf>, HashMap<String, usize>)> {
    let json = Json::read(index, INDEX_CAP)?;
    let map = json.strings_of("weight_map")?;
    let names: BTreeSet<&str> = map.values().copied().collect();
    if names.is_empty() || names.len() > SHARD_CAP {
        let why = format!("lists {} files, expected 1 to {SHARD_CAP}", names.len());
        return Err(json.error("weight_map", Defect::BadCount, why));
    }
    for name in &names {
        let mut parts = Path::new(name).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
        if !plain || !name.ends_with(".safetensors") || name.contains(['/', '\\', '\0']) {
            let shown = name.escape_debug();
            let why = format!("names \"{shown}\": a shard is a .safetensors file of this folder");
            return Err(json.error("weight_map", Defect::BadName, why));
        }
    }
    let places: HashMap<&str, usize> = names.iter().enumerate().map(|(i, n)| (*n, i)).collect();
    let listed = map.iter().map(|(tensor, file)| ((*tensor).to_owned(), places[file])).collect();
    Ok((names.iter().map(|name| folder.join(name)).collect(), listed))
}

/// The tensors of one file in the order of their data, with where each begins in the file.
fn header(path: &Path, file: &DataFile) -> Result<Vec<(String, Entry, u64)>> {
    let invalid =
        |at: &str, offset, defect, why: String| Error::invalid(path, at, Some(offset), defect, why);
    let bytes = file.bytes();
    if bytes < 8 {
        let why = format!("the file has {bytes} bytes, the header's length alone is 8");
        return Err(invalid("header length", bytes, Defect::Truncated, why));
    }
    let mut length = [0; 8];
    file.read_exact_at("header length", 0, &mut length)?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_CAP {
        let why = format!("{length} is over the limit of {HEADER_CAP} bytes");
        return Err(invalid("header length", 0, Defect::BadCount, why));
    }
    if length > bytes - 8 {
        let why = format!("needs {length} bytes, the file ends after {} more", bytes - 8);
        return Err(invalid("header", 8, Defect::Truncated, why));
    }
    // At most HEADER_CAP.
    let mut text = vec![0; length as usize];
    file.read_exact_at("header", 8, &mut text)?;
    if text.first() != Some(&b'{') {
        let found = text.first().map_or("nothing".to_owned(), |b| format!("byte {b:#04x}"));
        let why = format!("begins with {found}, expected a JSON object");
        return Err(invalid("header", 8, Defect::BadMagic, why));
    }
    let text = std::str::from_utf8(&text).map_err(|e| {
        let why = "the header is not UTF-8".to_owned();
        invalid("header", 8 + e.valid_up_to() as u64, Defect::BadString, why)
    })?;
    let data = 8 + length;
    let entries = place(path, text, entries(path, text)?, bytes - data)?;
    let placed = |(name, entry): (String, Entry)| {
        let offset = data + entry.data_offsets.0 as u64;
        (name, entry, offset)
    };
    Ok(entries.into_iter().map(placed).collect())
}

/// A key as it stands in the text: borrowed from it, unless it is written with escapes.
#[derive(Deserialize, PartialEq, Eq, Hash)]
struct Key<'t>(#[serde(borrow)] Cow<'t, str>);

/// The byte of the file at which the header `text` names `tensor`; that of the header for a name
/// written with escapes.
fn named_at(text: &str, tensor: &str) -> u64 {
    let keys = serde_json::from_str::<HashMap<Key<'_>, IgnoredAny>>(text).unwrap_or_default();
    match keys.keys().find(|key| key.0 == tensor) {
        // Behind the header's length; the name begins behind its quote.
        Some(Key(Cow::Borrowed(name))) => {
            8 + (name.as_ptr().addr() - text.as_ptr().addr()).saturating_sub(1) as u64
        }
        _ => 8,
    }
}

/// Checks that the tensors lie end to end over all `data` bytes; gives them in that order.
fn place(
    path: &Path,
    text: &str,
    mut entries: Vec<(String, Entry)>,
    data: u64,
) -> Result<Vec<(String, Entry)>> {
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut end = 0;
    for (name, entry) in &entries {
        let bad = |defect, why| {
            let at = Some(named_at(text, name));
            Err(Error::invalid(path, format!("tensor {name}"), at, defect, why))
        };
        let (from, to) = entry.data_offsets;
        if from != end || to < from {
            let why =
                format!("data is bytes {from}..{to}, must follow the tensor before it at {end}");
            return bad(Defect::BadOffset, why);
        }
        if to as u64 > data {
            let why = format!("data is bytes {from}..{to}, the file has {data}; fetch it again");
            return bad(Defect::Truncated, why);
        }
        let bits = entry.shape.iter().try_fold(entry.dtype.bitsize(), |n, &d| n.checked_mul(d));
        match bits {
            None => {
                let why = format!("the size of {:?} is beyond 64 bits", entry.shape);
                return bad(Defect::SizeOverflow, why);
            }
            Some(bits) if bits % 8 != 0 => {
                let (shape, dtype) = (&entry.shape, entry.dtype);
                let why = format!("{shape:?} of {dtype} are {bits} bits, no whole bytes");
                return bad(Defect::BadShape, why);
            }
            Some(bits) if bits / 8 != to - from => {
                let (shape, dtype) = (&entry.shape, entry.dtype);
                let why =
                    format!("{shape:?} of {dtype} are {bits} bits, its data {} bytes", to - from);
                return bad(Defect::ShapeMismatch, why);
            }
            Some(_) => end = to,
        }
    }
    if end as u64 != data {
        let why = format!("{} bytes after the last tensor belong to none", data - end as u64);
        let at = Some(8 + (text.len() + end) as u64);
        return Err(Error::invalid(path, "data", at, Defect::BadOffset, why));
    }
    // The crate's own reading of the same rules has the last word.
    Header::new(None, entries.clone()).map_err(|e| {
        Error::invalid(path, "header", Some(8), Defect::BadOffset, format!("is refused: {e}"))
    })?;
    Ok(entries)
}

/// The entries of a header in the order of the text, each name once.
fn entries(path: &Path, text: &str) -> Result<Vec<(String, Entry)>> {
    // What a visitor finds beyond JSON's own rules: it can only return serde's error.
    let found: RefCell<Option<(Defect, String)>> = RefCell::default();
    let mut json = serde_json::Deserializer::from_str(text);
    let read = Entries { found: &found }.deserialize(&mut json);
    read.and_then(|entries| json.end().map(|()| entries)).map_err(|e| {
        // Behind the header's length.
        let offset = 8 + json_place(text.as_bytes(), &e);
        let (defect, at) = found.take().unwrap_or((Defect::BadType, "header".to_owned()));
        let why = e.to_string();
        // Of an entry's parts only its type is one of several names.
        let defect = if why.starts_with("unknown variant") { Defect::UnknownType } else { defect };
        Error::invalid(path, at, Some(offset), defect, why)
    })
}

/// Reads the object of a header.
struct Entries<'a> {
    found: &'a RefCell<Option<(Defect, String)>>,
}

impl<'de> DeserializeSeed<'de> for Entries<'_> {
    type Value = Vec<(String, Entry)>;

    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<Self::Value, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_> {
    type Value = Vec<(String, Entry)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let at = |defect, at: String| *self.found.borrow_mut() = Some((defect, at));
        let (mut entries, mut names) = (Vec::new(), HashSet::new());
        while let Some(name) = map.next_key::<String>()? {
            if !names.insert(name.clone()) {
                at(Defect::Duplicate, format!("tensor {name}"));
                return Err(A::Error::custom("the name stands twice"));
            }
            if entries.len() == TENSOR_CAP {
                at(Defect::BadCount, "header".to_owned());
                return Err(A::Error::custom(format!("more than {TENSOR_CAP} tensors")));
            }
            if name == "__metadata__" {
                at(Defect::BadType, name);
                map.next_value::<BTreeMap<String, String>>()?;
            } else {
                at(Defect::BadType, format!("tensor {name}"));
                entries.push((name, map.next_value::<Entry>()?));
            }
            self.found.take();
        }
        Ok(entries)
    }
}
