//! JSON files beside the weights, read through getters that say which key of which file is wrong.

use super::super::metadata::{Array, Metadata, StringArray, Value};
use super::{json_place, read_small_file};
use crate::error::{Defect, Error, Result};
use serde_json::{Map, Value as Tree};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Most bytes of `config.json`; the longest published ones have a hundredth of it.
const CONFIG_CAP: u64 = 4 << 20;

/// An object of a JSON file. A key that is `null` counts as absent.
#[derive(Clone, Debug)]
pub(super) struct Json {
    path: PathBuf,
    /// `rope_scaling.` for an object within the file's; empty for the file's.
    prefix: String,
    object: Map<String, Tree>,
}

impl Json {
    /// `config.json` of `folder`.
    pub(super) fn config(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        Self::read(&path, CONFIG_CAP).map_err(|e| match e {
            Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                let why = "a folder is a model when it has config.json and .safetensors files; \
                           a GGUF file is given by its own name";
                Error::invalid(&path, "file", None, Defect::NotAModel, why)
            }
            other => other,
        })
    }

    /// The object of the file at `path`, which has at most `cap` bytes.
    pub(super) fn read(path: &Path, cap: u64) -> Result<Self> {
        let bytes = read_small_file(path, cap)?;
        // serde_json stops at a depth of 128.
        match serde_json::from_slice(&bytes) {
            Ok(Tree::Object(object)) => {
                Ok(Self { path: path.to_owned(), prefix: String::new(), object })
            }
            Ok(_) => {
                let why = "is no JSON object";
                Err(Error::invalid(path, "file", Some(0), Defect::BadType, why))
            }
            Err(e) => {
                let offset = Some(json_place(&bytes, &e));
                Err(Error::invalid(path, "file", offset, Defect::BadType, e.to_string()))
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn error(&self, key: &str, defect: Defect, why: impl Into<String>) -> Error {
        Error::invalid(&self.path, format!("{}{key}", self.prefix), None, defect, why)
    }

    pub(super) fn missing(&self, key: &str) -> Error {
        self.error(key, Defect::MissingKey, "the file does not have this key")
    }

    pub(super) fn unsupported(
        &self,
        key: &str,
        what: impl Into<String>,
        instead: impl Into<String>,
    ) -> Error {
        Error::Unsupported {
            path: self.path.clone(),
            at: format!("{}{key}", self.prefix),
            what: what.into(),
            instead: instead.into(),
        }
    }

    fn get<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Tree) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.object.get(key) {
            None | Some(Tree::Null) => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| {
                let found = match value {
                    Tree::Object(_) => "an object".to_owned(),
                    Tree::Array(_) => "an array".to_owned(),
                    other => other.to_string().chars().take(64).collect(),
                };
                self.error(key, Defect::BadType, format!("is {found}, expected {expected}"))
            }),
        }
    }

    pub(super) fn u64(&self, key: &str) -> Result<Option<u64>> {
        self.get(key, "a whole number from 0 on", Tree::as_u64)
    }

    pub(super) fn required_u64(&self, key: &str) -> Result<u64> {
        self.u64(key)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a number", Tree::as_f64)
    }

    pub(super) fn required_f64(&self, key: &str) -> Result<f64> {
        self.f64(key)?.ok_or_else(|| self.missing(key))
    }

    /// A finite number above zero.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.f64(key)? {
            Some(x) if !(x.is_finite() && x > 0.0) => {
                Err(self.error(key, Defect::BadValue, format!("is {x}, expected one above 0")))
            }
            x => Ok(x),
        }
    }

    pub(super) fn required_positive(&self, key: &str) -> Result<f64> {
        self.positive(key)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "true or false", Tree::as_bool)
    }

    pub(super) fn str(&self, key: &str) -> Result<Option<&str>> {
        self.get(key, "a string", Tree::as_str)
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<Self>> {
        let object = self.get(key, "an object", Tree::as_object)?;
        let prefix = format!("{}{key}.", self.prefix);
        Ok(object.map(|o| Self { path: self.path.clone(), prefix, object: o.clone() }))
    }

    pub(super) fn contains(&self, key: &str) -> bool {
        self.object.get(key).is_some_and(|v| !v.is_null())
    }

    pub(super) fn f64s(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.get(key, "an array of numbers", |v| v.as_array()?.iter().map(Tree::as_f64).collect())
    }

    pub(super) fn strs(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.get(key, "an array of strings", |v| v.as_array()?.iter().map(Tree::as_str).collect())
    }

    /// An object all of whose values are strings.
    pub(super) fn strings_of(&self, key: &str) -> Result<HashMap<&str, &str>> {
        let pairs = self.get(key, "an object of strings", |v| {
            v.as_object()?.iter().map(|(k, v)| Some((k.as_str(), v.as_str()?))).collect()
        })?;
        pairs.ok_or_else(|| self.missing(key))
    }

    /// All keys as metadata, for listing: nested ones with their path, `null` left out.
    pub(super) fn metadata(&self) -> Metadata {
        let mut out = Metadata::new(&self.path);
        flatten(&mut out, "", &self.object);
        out
    }
}

fn flatten(out: &mut Metadata, prefix: &str, object: &Map<String, Tree>) {
    for (key, value) in object {
        let key = format!("{prefix}{key}");
        let value = match value {
            Tree::Null => continue,
            Tree::Object(inner) => {
                flatten(out, &format!("{key}."), inner);
                continue;
            }
            Tree::Bool(x) => Value::Bool(*x),
            Tree::String(x) => Value::String(x.clone().into_bytes()),
            Tree::Number(x) => match (x.as_u64(), x.as_i64()) {
                (Some(x), _) => Value::U64(x),
                (None, Some(x)) => Value::I64(x),
                (None, None) => Value::F64(x.as_f64().unwrap_or(f64::NAN)),
            },
            Tree::Array(items) => {
                let mut texts = StringArray::with_capacity(items.len());
                for item in items {
                    let text = item.as_str().map_or_else(|| item.to_string(), str::to_owned);
                    texts.push(text.as_bytes());
                }
                Value::Array(Array::String(texts))
            }
        };
        // A nested path may spell another key; the first one is listed.
        if !out.contains(&key) {
            out.push(key, None, value);
        }
    }
}
