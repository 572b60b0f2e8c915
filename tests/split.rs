//! A model split over several GGUF files: one model, or a refusal that names the part.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests.

mod small_model;

use decode_graph::checkpoint::Checkpoint;
use decode_graph::error::{Defect, Error};
use decode_graph::quant::QuantFormat;
use small_model::{Key, SmallModel};
use std::path::{Path, PathBuf};

fn model() -> SmallModel {
    SmallModel::new("llama", QuantFormat::Q8_0)
}

fn path(folder: &Path, part: usize) -> PathBuf {
    folder.join(format!("small-{part:05}-of-00003.gguf"))
}

/// Three parts of [`model`], the keys in the first; `change` may spoil one before it is written.
fn write(folder: &Path, change: impl Fn(usize, &mut SmallModel)) {
    let whole = model();
    let size = whole.tensors.len().div_ceil(3);
    for (i, tensors) in whole.tensors.chunks(size).enumerate() {
        let mut part = SmallModel { keys: Vec::new(), tensors: tensors.to_vec() };
        if i == 0 {
            part.keys = whole.keys.clone();
        }
        part.set("split.no", Key::U32(i as u32));
        part.set("split.count", Key::U32(3));
        part.set("split.tensors.count", Key::I32(whole.tensors.len() as i32));
        change(i, &mut part);
        std::fs::write(path(folder, i + 1), part.bytes()).unwrap();
    }
}

#[test]
fn the_parts_are_one_model_whichever_is_named() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), |_, _| {});
    let whole = model().open(folder.path());
    for part in 1..=3 {
        let split = Checkpoint::open(&path(folder.path(), part)).unwrap();
        let keys = |c: &Checkpoint| -> Vec<_> {
            c.metadata().entries().map(|e| (e.key.to_owned(), e.value.clone())).collect()
        };
        assert_eq!(keys(&split), keys(&whole));
        assert_eq!(split.tensors(), whole.tensors());
        for t in whole.tensors() {
            assert_eq!(split.read_all(t).unwrap(), whole.read_all(t).unwrap(), "{}", t.name);
        }
        split.verify_unchanged().unwrap();
        let listed = Checkpoint::inspect_only(&path(folder.path(), part)).unwrap();
        assert_eq!((listed.files, listed.tensors.len()), (3, whole.tensors().len()));
    }
}

/// What opening the model in `folder` is refused for: class, and the whole text.
fn refused(folder: &Path) -> (Defect, String) {
    match Checkpoint::open(&path(folder, 1)).unwrap_err() {
        e @ Error::InvalidModel { defect, .. } => (defect, e.to_string()),
        other => panic!("{other}"),
    }
}

#[test]
fn a_missing_part_is_named() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), |_, _| {});
    std::fs::remove_file(path(folder.path(), 2)).unwrap();
    let (defect, said) = refused(folder.path());
    assert_eq!(defect, Defect::BadSplit);
    assert!(said.contains("small-00002-of-00003.gguf: part 2 of 3"), "{said}");
}

#[test]
fn a_part_that_stands_twice_is_named() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), |_, _| {});
    std::fs::copy(path(folder.path(), 2), path(folder.path(), 3)).unwrap();
    let (defect, said) = refused(folder.path());
    assert_eq!(defect, Defect::BadSplit);
    assert!(said.contains("small-00003-of-00003.gguf: split.no"), "{said}");
    // With a number that fits, its tensors give it away.
    let folder = tempfile::tempdir().unwrap();
    let second = std::cell::RefCell::new(Vec::new());
    write(folder.path(), |i, part| match i {
        1 => *second.borrow_mut() = part.tensors.clone(),
        2 => part.tensors = second.borrow().clone(),
        _ => {}
    });
    let (defect, said) = refused(folder.path());
    assert_eq!(defect, Defect::Duplicate);
    assert!(said.contains("small-00003-of-00003.gguf: tensor "), "{said}");
    assert!(said.contains("small-00002-of-00003.gguf"), "{said}");
}

#[test]
fn a_part_of_another_model_is_named() {
    type Change = fn(&mut SmallModel) -> &mut SmallModel;
    let cases: [(&str, Change, Defect); 6] = [
        ("split.count", |p| p.set("split.count", Key::U32(4)), Defect::BadSplit),
        ("split.no", |p| p.set("split.no", Key::U32(7)), Defect::BadSplit),
        ("split.tensors.count", |p| p.set("split.tensors.count", Key::U32(1)), Defect::BadSplit),
        (
            "general.architecture",
            |p| p.set("general.architecture", Key::Text("qwen2")),
            Defect::BadSplit,
        ),
        ("split.count", |p| p.unset("split.count"), Defect::MissingKey),
        ("split.no", |p| p.set("split.no", Key::F32(1.0)), Defect::BadType),
    ];
    for (at, change, expected) in cases {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), |i, part| {
            if i == 1 {
                change(part);
            }
        });
        let (defect, said) = refused(folder.path());
        assert_eq!(defect, expected, "{said}");
        assert!(said.contains(&format!("small-00002-of-00003.gguf: {at}")), "{said}");
    }
    // A part that lost a tensor: only the sum tells.
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), |i, part| {
        if i == 2 {
            drop(part.tensors.pop())
        }
    });
    let (defect, said) = refused(folder.path());
    assert_eq!(defect, Defect::BadSplit);
    assert!(said.contains("split.tensors.count"), "{said}");
}
