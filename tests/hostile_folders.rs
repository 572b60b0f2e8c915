//! A small folder of safetensors, cut and flipped everywhere, and the cases of its format that are
//! legal though odd: an error with file and place, or the same model when it is written and read again.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod counting_allocator;
#[path = "../fuzz/targets/mod.rs"]
#[allow(dead_code, reason = "only what stands beside the weights is used")]
mod targets;

use counting_allocator::bounded;
use decode_graph::arch::{PlanOptions, record};
use decode_graph::checkpoint::{Checkpoint, write_gguf};
use decode_graph::error::{Defect, Error};
use decode_graph::ops::KvType;
use decode_graph::tokenizer::Tokenizer;
use std::path::Path;

/// The seed that is a whole model: 11 tensors of f32.
fn whole() -> Vec<u8> {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/safetensors");
    std::fs::read(seeds.join("whole_model_f32")).unwrap()
}

/// A folder with these weights.
fn folder(weights: &[u8]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), targets::CONFIG).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), weights).unwrap();
    folder
}

/// Names, formats, shapes and bytes of all tensors, and the keys.
fn content(checkpoint: &Checkpoint) -> Vec<(String, Vec<u8>)> {
    let tensors = checkpoint.tensors().iter().map(|t| {
        let shape = format!("{} {} {:?}", t.name, t.format, (t.columns(), t.rows()));
        (shape, checkpoint.read_all(t).unwrap())
    });
    let keys = checkpoint.metadata().entries();
    let keys = keys.map(|e| (format!("{} {}", e.key, e.value), Vec::new()));
    tensors.chain(keys).collect()
}

/// That `checkpoint` is the same when it is written and read again.
fn same_again(checkpoint: &Checkpoint, row: &str) {
    let to = tempfile::tempdir().unwrap();
    let copy = to.path().join("copy.gguf");
    write_gguf(checkpoint, &copy, &mut |_, _| {}).unwrap();
    assert_eq!(content(&Checkpoint::open(&copy).unwrap()), content(checkpoint), "{row}");
}

/// The error names the file and, where it is about its form, a place.
fn placed(error: &Error, row: &str) {
    let said = error.to_string();
    assert!(matches!(error.exit_code(), 3 | 4), "{row}: {said}");
    // What is missing or not served is told by the name of a tensor, in the folder's name.
    assert!(said.contains("model.safetensors") || said.contains("/.tmp"), "{row}: {said}");
}

#[test]
fn every_prefix_is_an_error() {
    let whole = whole();
    let folder = folder(&whole);
    let file = folder.path().join("model.safetensors");
    same_again(&Checkpoint::open(folder.path()).unwrap(), "whole");
    for cut in 0..whole.len() {
        std::fs::write(&file, &whole[..cut]).unwrap();
        let row = format!("cut at {cut}");
        placed(&bounded(&row, cut, || Checkpoint::open(folder.path())).unwrap_err(), &row);
    }
}

#[test]
fn every_flipped_bit_is_an_error_or_a_model_that_is_the_same_again() {
    let whole = whole();
    let folder = folder(&whole);
    let file = folder.path().join("model.safetensors");
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut accepted = 0;
    for bit in 0..whole.len() * 8 {
        let mut flipped = whole.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&file, &flipped).unwrap();
        let row = format!("bit {bit}");
        match bounded(&row, whole.len(), || Checkpoint::open(folder.path())) {
            Err(error) => placed(&error, &row),
            Ok(checkpoint) => {
                accepted += 1;
                // Behind the header every bit is a weight's: a sample is written.
                if bit / 8 < header || bit % 61 == 0 {
                    same_again(&checkpoint, &row);
                }
            }
        }
    }
    assert!(accepted >= (whole.len() - header) * 8, "weights may have any bits: {accepted}");
}

/// A file with this header and as many zeros.
fn file(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()
}

#[test]
fn odd_headers_are_refused_by_class_or_listed() {
    // S14: the first tensor does not begin at 0.
    let late = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
    let refused = folder(&file(late, 8));
    match Checkpoint::open(refused.path()).unwrap_err() {
        Error::InvalidModel { defect, .. } => assert_eq!(defect, Defect::BadOffset, "S14"),
        other => panic!("S14: {other}"),
    }
    // S18, S19, S24: legal to list.
    for (id, header, data) in [
        ("S18", r#"{"a":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]}}"#, 0),
        ("S19", r#"{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#, 4),
        ("S24", r#"{"__metadata__":{"\u0000":"\u0000"}}"#, 0),
    ] {
        let listed = folder(&file(header, data));
        let inspection = Checkpoint::inspect_only(listed.path());
        assert!(inspection.is_ok(), "{id}: {}", inspection.unwrap_err());
        // None is a model: what is wrong is told by name.
        let options = PlanOptions { capacity: 8, kv: KvType::F16 };
        let recorded = Checkpoint::open(listed.path()).and_then(|c| record(&c, options));
        placed(&recorded.unwrap_err(), id);
    }
}

#[test]
fn weights_at_odd_bytes_of_the_file_are_the_same_weights() {
    // S27: a header that is a byte longer moves every f32 off its alignment.
    let whole = whole();
    let length = u64::from_le_bytes(whole[..8].try_into().unwrap());
    let (header, data) = whole[8..].split_at(length as usize);
    let header = [header, b" "].concat();
    let moved = [&(length + 1).to_le_bytes()[..], &header, data].concat();
    let (aligned, odd) = (folder(&whole), folder(&moved));
    let [aligned, odd] = [&aligned, &odd].map(|f| Checkpoint::open(f.path()).unwrap());
    let tensors = |c: &Checkpoint| {
        c.tensors().iter().map(|t| (t.name.clone(), c.read_all(t).unwrap())).collect::<Vec<_>>()
    };
    assert_eq!(tensors(&aligned), tensors(&odd));
}

#[test]
fn a_link_that_leads_to_itself_is_an_error_and_no_missing_file() {
    // F03: each of these may be absent, so that a file that is there and cannot be asked for would
    // change what the model says.
    for name in [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ] {
        let folder = folder(&whole());
        let tokenizer = r#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
            "decoder": {"type": "ByteFallback"}}"#;
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer).unwrap();
        let open = || Tokenizer::of(&Checkpoint::open(folder.path())?).map(drop);
        open().unwrap();
        let link = folder.path().join(name);
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(&link, &link).unwrap();
        match open() {
            Err(Error::Io { path, .. }) => assert_eq!(path, link),
            other => panic!("{name}: {other:?}"),
        }
    }
}
