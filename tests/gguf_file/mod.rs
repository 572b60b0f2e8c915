//! Builds GGUF files byte by byte, right or wrong, for the tests of the reader.

#![allow(dead_code, reason = "each test binary uses a part")]

use decode_graph::checkpoint::Checkpoint;
use decode_graph::error::{Defect, Error};
use std::path::PathBuf;

/// A header under construction; counts are those of what was added unless overridden.
#[derive(Clone, Default)]
pub(crate) struct Gguf {
    pub(crate) version: Option<u32>,
    pub(crate) tensor_count: Option<u64>,
    pub(crate) key_count: Option<u64>,
    keys: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    end: u64,
    pub(crate) data: Vec<u8>,
}

/// Length and bytes of a string.
pub(crate) fn text(s: &[u8]) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s].concat()
}

impl Gguf {
    /// Adds a key of value type `kind` with these value bytes.
    pub(crate) fn key(mut self, key: &[u8], kind: u32, value: &[u8]) -> Self {
        self.keys.push([&text(key)[..], &kind.to_le_bytes(), value].concat());
        self
    }

    /// Adds an array of `count` elements of type `kind`.
    pub(crate) fn array(self, key: &[u8], kind: u32, count: u64, elements: &[u8]) -> Self {
        let value = [&kind.to_le_bytes()[..], &count.to_le_bytes(), elements].concat();
        self.key(key, 9, &value)
    }

    pub(crate) fn raw_key(mut self, bytes: &[u8]) -> Self {
        self.keys.push(bytes.to_vec());
        self
    }

    /// Adds a tensor info with this offset and no data.
    pub(crate) fn info(mut self, name: &[u8], dims: &[u64], kind: u32, offset: u64) -> Self {
        let mut info = text(name);
        info.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| info.extend(d.to_le_bytes()));
        info.extend(kind.to_le_bytes());
        info.extend(offset.to_le_bytes());
        self.tensors.push(info);
        self
    }

    pub(crate) fn raw_info(mut self, bytes: &[u8]) -> Self {
        self.tensors.push(bytes.to_vec());
        self
    }

    /// Adds a tensor with its data where it belongs.
    pub(crate) fn tensor(mut self, name: &str, dims: &[u64], kind: u32, data: &[u8]) -> Self {
        let offset = self.end;
        self = self.info(name.as_bytes(), dims, kind, offset);
        self.data.resize(self.end as usize, 0);
        self.data.extend_from_slice(data);
        self.end = (self.data.len() as u64).next_multiple_of(32);
        self
    }

    /// The header up to the padding.
    pub(crate) fn header(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.unwrap_or(3).to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.key_count.unwrap_or(self.keys.len() as u64).to_le_bytes());
        out.extend(self.keys.concat());
        out.extend(self.tensors.concat());
        out
    }

    /// The header with this alignment, and `data` after it.
    pub(crate) fn padded_data(&self, data: &[u8], alignment: usize) -> Vec<u8> {
        let mut out = self.header();
        out.resize(out.len().next_multiple_of(alignment), 0);
        out.extend_from_slice(data);
        out
    }

    /// The whole file.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.padded_data(&self.data, 32)
    }
}

/// A small well-formed file: all scalar types, two arrays, two tensors.
pub(crate) fn minimal() -> Gguf {
    Gguf::default()
        .key(b"general.architecture", 8, &text(b"llama"))
        .key(b"a.u8", 0, &[200])
        .key(b"a.i8", 1, &(-3i8).to_le_bytes())
        .key(b"a.u16", 2, &60_000u16.to_le_bytes())
        .key(b"a.i16", 3, &(-300i16).to_le_bytes())
        .key(b"a.u32", 4, &4_000_000_000u32.to_le_bytes())
        .key(b"a.i32", 5, &7i32.to_le_bytes())
        .key(b"a.f32", 6, &1e-6f32.to_le_bytes())
        .key(b"a.bool", 7, &[1])
        .key(b"a.u64", 10, &u64::MAX.to_le_bytes())
        .key(b"a.i64", 11, &9i64.to_le_bytes())
        .key(b"a.f64", 12, &2.5f64.to_le_bytes())
        .array(b"a.words", 8, 2, &[text(b"one"), text(b"\xff\xfe")].concat())
        .array(b"a.ints", 5, 3, &[1i32, -2, 3].map(i32::to_le_bytes).concat())
        .tensor("token_embd.weight", &[32, 3], 2, &(0..54).collect::<Vec<u8>>())
        .tensor("output_norm.weight", &[8], 0, &[0x3F; 32])
}

/// A file in a folder that goes away with it.
pub(crate) struct Scratch {
    _folder: tempfile::TempDir,
    pub(crate) path: PathBuf,
}

pub(crate) fn scratch(name: &str, bytes: &[u8]) -> Scratch {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    Scratch { _folder: folder, path }
}

pub(crate) fn open(bytes: &[u8]) -> Result<Checkpoint, Error> {
    Checkpoint::open(&scratch("model.gguf", bytes).path)
}

/// The class of the defect, and where; panics on any other outcome.
pub(crate) fn defect(bytes: &[u8]) -> (Defect, Option<u64>, String) {
    match open(bytes) {
        Err(Error::InvalidModel { defect, offset, at, why, .. }) => {
            (defect, offset, format!("{at}: {why}"))
        }
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("the file was accepted"),
    }
}
