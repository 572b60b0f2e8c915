//! A model in one GGUF file, or in several: `NAME-00001-of-00003.gguf` and its siblings.
//!
//! Every part is a GGUF file with tensors of its own. `split.no` (from 0), `split.count` and
//! `split.tensors.count` say where it belongs; the model's other keys stand in the first part.
//! Source: what gguf-split of the llama.cpp project writes.

use super::gguf::{self, Header, RawTensor};
use super::metadata::Metadata;
use super::source::DataFile;
use crate::error::{Defect, Error, Result};
use std::collections::HashMap;
use std::path::Path;

/// What all parts hold together.
pub(super) struct Parts {
    /// Version of the container, of the first part.
    pub(super) version: u32,
    /// The keys of the first part, without those of the split.
    pub(super) metadata: Metadata,
    pub(super) files: Vec<DataFile>,
    /// Each with the index of its file.
    pub(super) tensors: Vec<(usize, RawTensor)>,
}

const NO: &str = "split.no";
const COUNT: &str = "split.count";
const TENSORS: &str = "split.tensors.count";

/// Reads the headers of the model that `path` is, or is a part of (any one).
///
/// # Errors
/// Those of a header; [`Defect::BadSplit`] naming the part that is absent, stands twice or is of
/// another model.
pub(super) fn open(path: &Path, tolerate_unknown: bool) -> Result<Parts> {
    let Some((stem, count)) = split_name(path)? else {
        return single(DataFile::open(path)?, tolerate_unknown);
    };
    let mut parts: Option<Parts> = None;
    let mut home: HashMap<String, usize> = HashMap::new();
    let mut promised = None;
    // Before any is read: what is missing is said first.
    let part = |i| open_part(&path.with_file_name(part_name(&stem, i + 1, count)), i + 1, count);
    let files = (0..count).map(part).collect::<Result<Vec<_>>>()?;
    for (i, file) in (0..).zip(files) {
        let path = file.path().to_owned();
        let Header { version, metadata, tensors } =
            gguf::read_header(&path, file.header(), file.bytes(), tolerate_unknown)?;
        let all = check(&metadata, i, count)?;
        let first = parts.get_or_insert_with(|| Parts {
            version,
            metadata: metadata.without(|key| key.starts_with("split.")),
            files: Vec::new(),
            tensors: Vec::new(),
        });
        same_model(&metadata, &first.metadata, all, *promised.get_or_insert(all))?;
        for tensor in tensors {
            if let Some(other) = home.insert(tensor.name.clone(), i as usize) {
                let other = first.files[other].path().display();
                let why = format!("stands in {other} too: the parts are not of one model");
                let at = format!("tensor {}", tensor.name);
                return Err(Error::invalid(&path, at, None, Defect::Duplicate, why));
            }
            first.tensors.push((i as usize, tensor));
        }
        first.files.push(file);
    }
    let parts = parts.ok_or_else(|| Error::Internal("a model split into no parts".to_owned()))?;
    if promised != Some(parts.tensors.len() as u64) {
        let found = parts.tensors.len();
        let why = format!("promises {} tensors, the parts hold {found}", promised.unwrap_or(0));
        return Err(Error::invalid(parts.files[0].path(), TENSORS, None, Defect::BadSplit, why));
    }
    Ok(parts)
}

/// The one file at `path`, whatever it says of others.
pub(super) fn alone(path: &Path) -> Result<Parts> {
    let file = DataFile::open(path)?;
    let Header { version, metadata, tensors } =
        gguf::read_header(path, file.header(), file.bytes(), true)?;
    let tensors = tensors.into_iter().map(|t| (0, t)).collect();
    Ok(Parts { version, metadata, files: vec![file], tensors })
}

/// A model that must be in this one file.
pub(super) fn single(file: DataFile, tolerate_unknown: bool) -> Result<Parts> {
    let Header { version, metadata, tensors } =
        gguf::read_header(file.path(), file.header(), file.bytes(), tolerate_unknown)?;
    if let Some(count) = metadata.u64_key(COUNT)?.filter(|n| *n > 1) {
        let no = metadata.u64_key(NO)?.unwrap_or(0).saturating_add(1);
        let why = format!(
            "this is part {no} of {count} of a split model, under a name that does not say so; \
             name the parts NAME-{no:05}-of-{count:05}.gguf"
        );
        return Err(metadata.error(COUNT, Defect::BadSplit, why));
    }
    let tensors = tensors.into_iter().map(|t| (0, t)).collect();
    Ok(Parts { version, metadata, files: vec![file], tensors })
}

fn part_name(stem: &str, part: u32, count: u32) -> String {
    format!("{stem}-{part:05}-of-{count:05}.gguf")
}

fn open_part(path: &Path, part: u32, count: u32) -> Result<DataFile> {
    DataFile::open(path).map_err(|e| match e {
        Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            let at = format!("part {part} of {count}");
            let why = "the file is missing; all parts of a split model must stand in one folder";
            Error::invalid(path, at, None, Defect::BadSplit, why)
        }
        other => other,
    })
}

/// That a part says it is number `i` of `count`; gives the number of tensors that it promises for
/// all parts.
fn check(metadata: &Metadata, i: u32, count: u32) -> Result<u64> {
    let found = metadata.required_u64(COUNT)?;
    if found != u64::from(count) {
        let why = format!("is {found}, the file's name says {count}: a part of another model");
        return Err(metadata.error(COUNT, Defect::BadSplit, why));
    }
    let no = metadata.required_u64(NO)?;
    if no != u64::from(i) {
        let why = format!(
            "is {no}, which is part {} of {count}, under the name of part {}: that part is \
             missing and another one stands twice",
            no.saturating_add(1),
            i + 1
        );
        return Err(metadata.error(NO, Defect::BadSplit, why));
    }
    metadata.required_u64(TENSORS)
}

/// That a part is of the same model as the first one.
fn same_model(part: &Metadata, first: &Metadata, all: u64, promised: u64) -> Result<()> {
    if all != promised {
        let why = format!("is {all}, the first part says {promised}: a part of another model");
        return Err(part.error(TENSORS, Defect::BadSplit, why));
    }
    let key = "general.architecture";
    match (part.str_key(key)?, first.str_key(key)?) {
        (Some(own), other) if Some(own) != other => {
            let other = other.unwrap_or("nothing");
            let why = format!("is \"{own}\", the first part says {other}: a part of another model");
            Err(part.error(key, Defect::BadSplit, why))
        }
        _ => Ok(()),
    }
}

/// Stem and number of parts where the file's name is a part's; `None` for a model in one file.
fn split_name(path: &Path) -> Result<Option<(String, u32)>> {
    let Some(name) = path.file_name().and_then(|n| n.to_str()) else { return Ok(None) };
    let five = |digits: &str| {
        (digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit()))
            .then(|| digits.parse::<u32>().ok())
            .flatten()
    };
    let parse = || {
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, part) = rest.rsplit_once('-')?;
        Some((stem, five(part)?, five(count)?))
    };
    let Some((stem, part, count)) = parse().filter(|(_, _, count)| *count > 1) else {
        return Ok(None);
    };
    if part == 0 || part > count {
        let why = format!("part {part} of {count} does not exist; parts count from 1");
        return Err(Error::invalid(path, "file name", None, Defect::BadSplit, why));
    }
    Ok(Some((stem.to_owned(), count)))
}
