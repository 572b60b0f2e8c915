//! The small models of every architecture and what their own code computes with them.
#![allow(clippy::unwrap_used)] // A wrong golden is a wrong test.

use decode_graph::checkpoint::Checkpoint;
use decode_graph::verify::Golden;
use std::path::{Path, PathBuf};

pub(crate) fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/architectures")
}

/// Every golden file with its name and its model.
pub(crate) fn all() -> Vec<(String, Golden, Checkpoint)> {
    let files = std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path());
    let mut goldens: Vec<_> = files.filter(|path| path.extension().unwrap() == "json").collect();
    goldens.sort();
    goldens
        .iter()
        .map(|path| {
            let golden = Golden::open(path).unwrap();
            let checkpoint = Checkpoint::open(&folder().join(&golden.model)).unwrap();
            (path.file_stem().unwrap().to_string_lossy().into_owned(), golden, checkpoint)
        })
        .collect()
}
