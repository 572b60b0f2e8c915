//! Storage that fails: a byte that cannot be read, no handle left, no room for a map. Each is an error
//! that names the file, the field and the byte, or makes no difference. The ids are those of the list
//! that the cases were collected in.

#![allow(missing_docs, clippy::unwrap_used)]

mod counting_allocator;
mod failing_storage;
mod fake_driver;
mod small_model;
#[path = "../fuzz/targets/mod.rs"]
#[allow(dead_code, reason = "only what stands beside the weights is used")]
mod targets;

use counting_allocator::bounded;
use decode_graph::checkpoint::Checkpoint;
use decode_graph::error::Error;
use decode_graph::quant::QuantFormat;
use decode_graph::session::{BackendChoice, DecodeSession, SessionOptions};
use decode_graph::tokenizer::Tokenizer;
use failing_storage::{
    EACCES, EIO, EMFILE, ENOMEM, Failure::*, Seen, while_storage_fails as while_it_fails,
};
use fake_driver::{Fake, Live};
use serde_json::json;
use small_model::{Key, SmallModel};
use std::path::{Path, PathBuf};

/// Everything that is read of a model: its tensors in turn, and the tokenizer of a folder.
fn read(path: &Path) -> Result<Vec<Vec<u8>>, Error> {
    let checkpoint = Checkpoint::open(path)?;
    let all = checkpoint.tensors().iter().map(|t| {
        checkpoint.will_read(t, 0, t.bytes);
        checkpoint.read_all(t)
    });
    let all = all.collect::<Result<_, _>>()?;
    checkpoint.verify_unchanged()?;
    if path.is_dir() {
        Tokenizer::of(&checkpoint)?;
    }
    Ok(all)
}

/// A model of a header and a few tensors, more of them than a header's first read brings along.
fn one_file(folder: &Path) -> PathBuf {
    let mut model = SmallModel::new("llama", QuantFormat::F32);
    model.tensor("a.note", &[1 << 18], QuantFormat::F32);
    model.write(folder)
}

/// The same tensors in two parts; gives the first.
fn two_parts(folder: &Path) -> PathBuf {
    let whole = SmallModel::new("llama", QuantFormat::Q8_0);
    let part = |n: usize| folder.join(format!("small-{n:05}-of-00002.gguf"));
    for (i, tensors) in whole.tensors.chunks(whole.tensors.len().div_ceil(2)).enumerate() {
        let keys = if i == 0 { whole.keys.clone() } else { Vec::new() };
        let mut own = SmallModel { keys, tensors: tensors.to_vec() };
        own.set("split.no", Key::U32(i as u32));
        own.set("split.count", Key::U32(2));
        own.set("split.tensors.count", Key::U32(whole.tensors.len() as u32));
        std::fs::write(part(i + 1), own.bytes()).unwrap();
    }
    part(1)
}

/// A folder as `transformers` writes it, with its index and a tokenizer.
fn a_folder(folder: &Path) -> PathBuf {
    let weights = include_bytes!("../fuzz/corpus/safetensors/whole_model_f32");
    let length = u64::from_le_bytes(*weights.first_chunk().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&weights[8..8 + length]).unwrap();
    let shard = "model-00001-of-00001.safetensors";
    let names = header.as_object().unwrap().keys().filter(|name| *name != "__metadata__");
    let map: serde_json::Map<_, _> = names.map(|name| (name.clone(), json!(shard))).collect();
    let tokenizer = json!({
        "version": "1.0", "decoder": {"type": "ByteLevel", "add_prefix_space": false,
                                      "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    });
    std::fs::write(folder.join(shard), weights).unwrap();
    for (name, text) in [
        ("config.json", targets::CONFIG.to_owned()),
        ("model.safetensors.index.json", json!({ "weight_map": map }).to_string()),
        ("tokenizer.json", tokenizer.to_string()),
        ("tokenizer_config.json", json!({"bos_token": "a"}).to_string()),
        ("generation_config.json", json!({"eos_token_id": 1}).to_string()),
        ("chat_template.jinja", "{{ messages[0].content }}".to_owned()),
    ] {
        std::fs::write(folder.join(name), text).unwrap();
    }
    folder.to_owned()
}

/// A model of each form, and the sum of its files' bytes.
fn models() -> Vec<(tempfile::TempDir, PathBuf, usize)> {
    let make = |form: fn(&Path) -> PathBuf| {
        let folder = tempfile::tempdir().unwrap();
        let path = form(folder.path());
        let sizes = files(folder.path()).iter().map(|f| f.metadata().unwrap().len() as usize).sum();
        (folder, path, sizes)
    };
    [one_file, two_parts, a_folder].map(make).into()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    all.sort();
    all
}

/// That this is the system's refusal with `code` of `file`; gives what was tried.
fn refused<T: std::fmt::Debug>(outcome: Result<T, Error>, file: &Path, code: i32) -> String {
    let error = outcome.unwrap_err();
    assert_eq!(error.exit_code(), 74, "{error}");
    let Error::Io { path, action, source } = error else { panic!("{error}") };
    assert_eq!((path.as_path(), source.raw_os_error()), (file, Some(code)), "{action}: {source}");
    action
}

/// F07.
#[test]
fn a_byte_that_cannot_be_read_is_told_by_file_field_and_place() {
    let mut said = std::collections::BTreeMap::<String, usize>::new();
    for (folder, path, bytes) in models() {
        for file in files(folder.path()) {
            // Names are leaked: a few, for the time of a test.
            let name: &'static str =
                file.file_name().unwrap().to_string_lossy().into_owned().leak();
            let length = file.metadata().unwrap().len();
            // Every byte of what is small; the large one is one tensor but for its start.
            let places = (0..length.min(4096)).chain((4096..length).step_by(4093));
            for bad in places.chain([length - 1]) {
                let row = format!("F07 {name} at {bad}");
                let failing = || while_it_fails(BadByte(name, bad), || read(&path));
                let (outcome, seen) = bounded(&row, bytes, failing);
                if seen.failed == 0 {
                    // Between tensors there are bytes that nobody needs.
                    assert!(outcome.is_ok() && name.ends_with(".gguf"), "{row} is never read");
                    continue;
                }
                let action = refused(outcome, &file, EIO);
                let (read, field) = action.split_once(&format!(" bytes at {bad} of ")).unwrap();
                let left: u64 = read.strip_prefix("read ").unwrap().parse().unwrap();
                assert!(left > 0 && bad + left <= length, "{row}: {action}");
                *said.entry(field.to_owned()).or_default() += 1;
            }
        }
    }
    let tensors = said.keys().filter(|field| field.starts_with("tensor ")).count();
    let other: Vec<_> = said.keys().filter(|field| !field.starts_with("tensor ")).collect();
    println!("{} bytes, of {tensors} tensors and of {other:?}", said.values().sum::<usize>());
    assert!(tensors >= 2, "{said:?}");
    assert_eq!(other, ["file", "header", "header length"], "{said:?}");
}

#[test]
fn what_could_not_be_read_once_is_read_when_the_disk_answers_again() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&one_file(folder.path())).unwrap();
    let tensor = checkpoint.tensor("a.note").unwrap();
    let whole = checkpoint.read_all(tensor).unwrap();
    let (outcome, seen) = while_it_fails(BadByte(".gguf", 900_000), || checkpoint.read_all(tensor));
    let action = refused(outcome, checkpoint.path(), EIO);
    assert!(action.ends_with("bytes at 900000 of tensor a.note"), "{action}");
    assert_eq!((seen.reads, seen.failed), (2, 1));
    assert_eq!(checkpoint.read_all(tensor).unwrap(), whole);
    checkpoint.verify_unchanged().unwrap();
}

#[test]
fn a_session_on_a_disk_that_fails_is_an_error_and_the_next_one_works() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&one_file(folder.path())).unwrap();
    let backend = BackendChoice::Cpu;
    let options = SessionOptions { backend, capacity: 8, ..SessionOptions::default() };
    let load = || DecodeSession::new(&checkpoint, &options, &mut |_, _| {}).map(drop);
    let (outcome, seen) = while_it_fails(BadByte(".gguf", 100_000), load);
    assert_eq!(seen.failed, 1, "the byte is a weight's");
    let action = refused(outcome, checkpoint.path(), EIO);
    assert!(action.contains(" bytes at 100000 of tensor "), "{action}");
    load().unwrap();
}

/// FI-31: while the weights are on their way to a device.
#[test]
fn a_disk_that_fails_while_a_device_is_loaded_is_an_error_and_leaves_nothing_there() {
    let fake = Fake::new();
    let folder = tempfile::tempdir().unwrap();
    let path = one_file(folder.path());
    let checkpoint = Checkpoint::open(&path).unwrap();
    let (backend, persistent) = (BackendChoice::Cuda, false);
    let options = SessionOptions { backend, persistent, capacity: 8, ..SessionOptions::default() };
    // One thread reads: the one whose storage fails.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let load = |failure| {
        let first = || DecodeSession::new(&checkpoint, &options, &mut |_, _| {})?.feed(5);
        pool.install(|| while_it_fails(failure, first))
    };
    let expected = load(None).0.unwrap();
    let length = std::fs::metadata(&path).unwrap().len();
    let mut told = 0;
    for bad in (0..length).step_by(5003) {
        fake.take_log();
        let (outcome, seen) = load(BadByte(".gguf", bad));
        if seen.failed == 0 {
            // The header, and what no step needs.
            assert_eq!(outcome.unwrap(), expected);
            continue;
        }
        told += 1;
        let action = refused(outcome, &path, EIO);
        assert!(action.contains(&format!(" bytes at {bad} of tensor ")), "{action}");
        assert!(fake.take_log().contains(&"cuMemAlloc_v2"), "it was about to be uploaded");
        assert_eq!((fake.live(), fake.is_capturing()), (Live::default(), false), "at {bad}");
    }
    assert!(told > 20, "{told} bytes of weights");
    let (outcome, seen) = load(Piecemeal(1000));
    assert_eq!(outcome.unwrap(), expected);
    assert!(seen.failed > 20, "{seen:?}");
    assert_eq!(fake.live(), Live::default());
}

/// F08.
#[test]
fn reads_that_are_short_or_interrupted_give_the_same_bytes() {
    for (_folder, path, _) in models() {
        let whole = read(&path).unwrap();
        for most in [1000, 4097] {
            let (outcome, seen) = while_it_fails(Piecemeal(most), || read(&path));
            assert_eq!(outcome.unwrap(), whole, "{}", path.display());
            assert!(seen.failed > 2, "{seen:?}");
        }
    }
}

/// F10 and F02: for every file of a model, no handle is left or its permission is missing.
#[test]
fn a_file_that_cannot_be_opened_is_named_whichever_it_is() {
    for (folder, path, bytes) in models() {
        let (whole, seen) = while_it_fails(None, || read(&path));
        assert!(whole.is_ok());
        let mut opened = seen.opened.clone();
        opened.sort();
        opened.dedup();
        assert_eq!(opened, files(folder.path()), "each file is one that may fail");
        for (i, file) in seen.opened.iter().enumerate() {
            for (id, code) in [("F10", EMFILE), ("F02", EACCES)] {
                let row = format!("{id} {}", file.display());
                let failing = || while_it_fails(Open(i, code), || read(&path));
                let (outcome, seen): (_, Seen) = bounded(&row, bytes, failing);
                assert_eq!(refused(outcome, file, code), "open", "{row}");
                assert_eq!(seen.opened.len(), i + 1, "{row}: nothing is opened after it");
            }
        }
    }
}

/// F10: a map is only a hint, what it would have told is read all the same.
#[test]
fn without_room_for_a_map_the_same_bytes_are_read() {
    for (_folder, path, bytes) in models() {
        let whole = read(&path).unwrap();
        let failing = || while_it_fails(Maps(ENOMEM), || read(&path));
        let (outcome, seen) = bounded("F10", bytes, failing);
        assert_eq!(outcome.unwrap(), whole);
        assert!(seen.maps > 0 && seen.failed == seen.maps, "{seen:?}");
    }
}
