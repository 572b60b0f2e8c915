//! Checkpoints from files: what is read is what stands there, and a written file reads the same.

#![allow(missing_docs, clippy::unwrap_used)]

mod gguf_file;

use decode_graph::arch::{self, PlanOptions};
use decode_graph::checkpoint::{Checkpoint, SyntheticSpec, write_gguf};
use decode_graph::error::{Defect, Error};
use decode_graph::ops::KvType;
use decode_graph::quant::QuantFormat;
use gguf_file::{Gguf, minimal, open, scratch};

fn class<T: std::fmt::Debug>(result: Result<T, Error>) -> Defect {
    match result.unwrap_err() {
        Error::InvalidModel { defect, offset: Some(_), .. } => defect,
        other => panic!("without class or offset: {other}"),
    }
}

#[test]
fn integers_of_every_width_are_read_where_nothing_is_lost() {
    let c = open(&minimal().bytes()).unwrap();
    for (key, value) in [
        ("a.u8", 200),
        ("a.u16", 60_000),
        ("a.u32", 4_000_000_000),
        ("a.i32", 7),
        ("a.u64", u64::MAX),
        ("a.i64", 9),
    ] {
        assert_eq!(c.required_u64(key).unwrap(), value, "{key}");
    }
    assert_eq!(class(c.u64_key("a.i8")), Defect::BadValue);
    assert_eq!(class(c.u64_key("a.i16")), Defect::BadValue);
    assert_eq!(c.u64_key("a.absent").unwrap(), None);
    assert!(matches!(
        c.required_u64("a.absent"),
        Err(Error::InvalidModel { defect: Defect::MissingKey, .. })
    ));
}

#[test]
fn a_key_of_another_type_is_an_error_that_names_key_and_byte() {
    let c = open(&minimal().bytes()).unwrap();
    for key in ["a.f32", "a.bool", "general.architecture", "a.ints", "a.f64"] {
        assert_eq!(class(c.u64_key(key)), Defect::BadType, "{key}");
    }
    assert_eq!(class(c.f32_key("a.bool")), Defect::BadType);
    assert_eq!(class(c.bool_key("a.u8")), Defect::BadType);
    assert_eq!(class(c.str_key("a.u8")), Defect::BadType);
    assert_eq!(class(c.strings_key("a.ints")), Defect::BadType);
    assert_eq!(class(c.i32_array_key("a.words")), Defect::BadType);
    assert_eq!(class(c.f32_array_key("a.i32")), Defect::BadType);
    assert_eq!(class(c.str_array_key("a.words")), Defect::BadString);
    assert_eq!(class(c.u64_array_key("a.ints")), Defect::BadValue);
    let whole = minimal().bytes();
    let Err(Error::InvalidModel { at, offset: Some(offset), .. }) = c.u64_key("a.bool") else {
        panic!("no offset")
    };
    let key = whole.windows(6).position(|w| w == b"a.bool").unwrap();
    assert_eq!((at.as_str(), offset), ("a.bool", key as u64 + 6 + 4));
}

#[test]
fn reals_text_and_arrays_are_read_as_they_stand() {
    let c = open(&minimal().bytes()).unwrap();
    assert_eq!(c.architecture().unwrap(), "llama");
    assert_eq!(c.required_f32("a.f32").unwrap(), 1e-6);
    assert_eq!(c.required_f32("a.f64").unwrap(), 2.5);
    assert_eq!(c.required_f32("a.i32").unwrap(), 7.0);
    assert_eq!(class(c.f32_key("a.u32")), Defect::BadValue);
    assert!(c.required_bool("a.bool").unwrap());
    let words: Vec<_> = c.required_strings("a.words").unwrap().iter().collect();
    assert_eq!(words, [&b"one"[..], b"\xff\xfe"]);
    assert_eq!(c.i32_array_key("a.ints").unwrap().unwrap(), [1, -2, 3]);
    assert_eq!(c.f32_array_key("a.ints").unwrap().unwrap(), [1.0, -2.0, 3.0]);
}

#[test]
fn a_number_per_layer_is_a_scalar_or_an_array_of_the_right_length() {
    let g = Gguf::default().key(b"one", 4, &5u32.to_le_bytes()).array(
        b"each",
        4,
        2,
        &[3u32, 4].map(u32::to_le_bytes).concat(),
    );
    let c = open(&g.bytes()).unwrap();
    assert_eq!(c.metadata().required_u64_per_layer("one", 3).unwrap(), [5, 5, 5]);
    assert_eq!(c.metadata().required_u64_per_layer("each", 2).unwrap(), [3, 4]);
    assert_eq!(class(c.metadata().u64_per_layer_key("each", 3)), Defect::BadArray);
    assert_eq!(c.metadata().u64_per_layer_key("none", 3).unwrap(), None);
}

#[test]
fn tensors_are_read_at_any_offset_and_never_outside() {
    let c = open(&minimal().bytes()).unwrap();
    let t = c.tensor("token_embd.weight").unwrap();
    assert_eq!((t.format, t.columns(), t.rows(), t.bytes), (QuantFormat::Q4_0, 32, 3, 54));
    let whole = c.read_all(t).unwrap();
    assert_eq!(whole, (0..54).collect::<Vec<u8>>());
    let mut part = [0; 20];
    c.read(t, 17, &mut part).unwrap();
    assert_eq!(part, whole[17..37]);
    assert!(c.read(t, 35, &mut part).is_err());
    assert!(c.read(t, u64::MAX, &mut part).is_err());
    let other = open(&Gguf::default().tensor("x", &[8], 0, &[0; 32]).bytes()).unwrap();
    assert!(other.read(t, 0, &mut part).is_err(), "a tensor of another file");
    assert!(c.tensor("absent").is_none());
}

fn same(a: &Checkpoint, b: &Checkpoint) {
    let keys = |c: &Checkpoint| -> Vec<_> {
        c.metadata().entries().map(|e| (e.key.to_owned(), e.value.clone())).collect()
    };
    assert_eq!(keys(a), keys(b));
    assert_eq!(a.tensors(), b.tensors());
    for t in a.tensors() {
        assert_eq!(a.read_all(t).unwrap(), b.read_all(t).unwrap(), "{}", t.name);
    }
}

#[test]
fn a_written_file_reads_back_the_same() {
    let folder = tempfile::tempdir().unwrap();
    for quant in SyntheticSpec::quants() {
        let spec = SyntheticSpec::parse(&format!("tiny:{quant}")).unwrap();
        let c = Checkpoint::synthetic(&spec).unwrap();
        let path = folder.path().join(format!("{quant}.gguf"));
        let mut seen = Vec::new();
        write_gguf(&c, &path, &mut |done, all| seen.push((done, all))).unwrap();
        let (last, all) = *seen.last().unwrap();
        assert!(seen.is_sorted() && last == all && all > 0);
        let file = Checkpoint::open(&path).unwrap();
        assert!(c.is_synthetic() && !file.is_synthetic());
        same(&c, &file);
    }
    // From a file too, with every value type in it.
    let source = scratch("model.gguf", &minimal().bytes());
    let c = Checkpoint::open(&source.path).unwrap();
    let path = folder.path().join("copy.gguf");
    write_gguf(&c, &path, &mut |_, _| ()).unwrap();
    same(&c, &Checkpoint::open(&path).unwrap());
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(left.len(), SyntheticSpec::quants().count() + 1, "{left:?}");
}

#[test]
fn a_failed_write_leaves_the_folder_as_it_was() {
    let g = Gguf::default().tensor("a", &[1 << 16], 0, &vec![1; 1 << 18]);
    let source = scratch("model.gguf", &g.bytes());
    let c = Checkpoint::open(&source.path).unwrap();
    std::fs::OpenOptions::new().write(true).open(&source.path).unwrap().set_len(200).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.gguf");
    std::fs::write(&path, b"precious").unwrap();
    assert!(write_gguf(&c, &path, &mut |_, _| ()).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    assert!(write_gguf(&c, "/nowhere/at/all.gguf".as_ref(), &mut |_, _| ()).is_err());
}

/// Skipped where `models/fetch.sh` has not been run.
#[test]
fn a_published_file_opens_with_the_types_of_its_synthetic_twin() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("models/smollm2-135m-instruct-q4_1.gguf");
    if !path.exists() {
        return;
    }
    let real = Checkpoint::open(&path).unwrap();
    let spec = SyntheticSpec::parse("smollm2-135m:q4_1").unwrap();
    let twin = Checkpoint::synthetic(&spec).unwrap();
    assert_eq!(real.tensors().len(), twin.tensors().len());
    for t in twin.tensors() {
        let r = real.tensor(&t.name).unwrap();
        assert_eq!((r.format, &r.shape, r.bytes), (t.format, &t.shape, t.bytes), "{}", t.name);
    }
    for e in twin.metadata().entries().filter(|e| e.key.starts_with("llama.")) {
        assert_eq!(real.metadata().entry(e.key).map(|r| r.value), Some(e.value), "{}", e.key);
    }
}

/// Told from names alone, so that it can be told of any file.
#[test]
fn what_a_token_reads_is_what_the_plan_reads() {
    for spec in ["llama-3.2-1b:q4_k_m", "qwen2.5-1.5b:q8_0", "llama-2-7b:q4_0", "tiny:f16"] {
        let model = Checkpoint::synthetic(&SyntheticSpec::parse(spec).unwrap()).unwrap();
        let options = PlanOptions { capacity: 64, kv: KvType::F16 };
        let plan = arch::record(&model, options).unwrap().traffic(0).weights as f64;
        let told = model.inspect().read_per_token().values().sum::<u64>() as f64;
        assert!((told / plan - 1.0).abs() < 1e-3, "{spec}: {told} for {plan}");
    }
}

#[test]
fn of_experts_a_token_reads_the_chosen_ones() {
    let g = Gguf::default()
        .key(b"general.architecture", 8, &gguf_file::text(b"some-moe"))
        .key(b"some-moe.expert_count", 4, &8u32.to_le_bytes())
        .key(b"some-moe.expert_used_count", 4, &2u32.to_le_bytes())
        .tensor("token_embd.weight", &[4, 10], 0, &[0; 160])
        .tensor("output.weight", &[4, 10], 1, &[0; 80])
        .tensor("blk.0.ffn_up_exps.weight", &[4, 4, 8], 0, &[0; 512])
        .tensor("blk.0.norm.weight", &[4], 77, &[0; 32]);
    let file = scratch("model.gguf", &g.bytes());
    let found = Checkpoint::inspect_only(&file.path).unwrap();
    assert_eq!(found.architecture(), Some("some-moe"));
    let read: Vec<_> = found.read_per_token().into_iter().collect();
    // One row of the embeddings and a quarter of the experts; the head whole; unknown sizes none.
    assert_eq!(read, [("F16", 80), ("F32", 16 + 128), ("type 77", 0)]);
}

#[test]
fn a_number_of_a_file_is_shown_in_few_digits() {
    let real = |x: f64| Gguf::default().key(b"k", 12, &x.to_le_bytes());
    for (x, shown) in [
        (0.5, "0.5"),
        (1e-6, "0.000001"),
        (-1e6, "-1000000"),
        (5e-324, "5e-324"),
        (-1.5e300, "-1.5e300"),
        (-0.0, "-0"),
        (f64::NAN, "NaN"),
        (f64::INFINITY, "inf"),
    ] {
        let c = gguf_file::open(&real(x).bytes()).unwrap();
        assert_eq!(c.metadata().entry("k").unwrap().value.to_string(), shown);
    }
    let single = Gguf::default().key(b"k", 6, &1e-38f32.to_le_bytes());
    let c = gguf_file::open(&single.bytes()).unwrap();
    assert_eq!(c.metadata().entry("k").unwrap().value.to_string(), "1e-38");
}
