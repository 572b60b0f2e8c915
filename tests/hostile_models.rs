//! Well-formed files whose keys, tensors or vocabulary describe no model that can be: each is refused
//! by file, field and place, within bounded time and memory. The ids are those of the list that the
//! cases were collected in; what a container itself can be is in `gguf_hostile.rs`.

#![allow(missing_docs, clippy::unwrap_used)]

mod counting_allocator;
mod gguf_file;
mod small_model;
mod warnings;

use counting_allocator::{bounded, measured};
use decode_graph::arch::{PlanOptions, record};
use decode_graph::checkpoint::{Checkpoint, write_gguf};
use decode_graph::error::{Defect, Error};
use decode_graph::ops::KvType;
use decode_graph::quant::QuantFormat;
use decode_graph::session::{BackendChoice, DecodeSession, SessionOptions};
use decode_graph::tokenizer::Tokenizer;
use gguf_file::{Gguf, scratch, text};
use small_model::{Key, SmallModel};
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// What must be said of a file.
enum Is {
    /// This defect of this key or tensor, with the place of a key's value.
    Bad(Defect, &'static str),
    /// A model that is not served, because of this.
    NotServed(&'static str),
    /// A model that is served.
    Served,
}

fn judge(id: &str, outcome: Result<(), Error>, is: &Is) {
    match (outcome, is) {
        (Ok(()), Is::Served) => {}
        (Err(error), Is::Bad(defect, field)) => {
            let said = error.to_string();
            assert!(said.contains(".gguf"), "{id}: no file: {said}");
            let Error::InvalidModel { at, offset, defect: found, .. } = error else {
                panic!("{id}: {said}")
            };
            assert_eq!(found, *defect, "{id}: {said}");
            assert!(at.contains(field), "{id}: {said}");
            let missing = matches!(defect, Defect::MissingKey | Defect::MissingTensor);
            let absent = missing || said.contains("the key is absent");
            let tensor = at.contains("weight") || at.contains("bias");
            assert!(offset.is_some() || absent || tensor, "{id}: no place: {said}");
        }
        (Err(Error::Unsupported { at, what, .. }), Is::NotServed(words)) => {
            assert!(format!("{at}: {what}").contains(words), "{id}: {at}: {what}");
        }
        (Ok(()), _) => panic!("{id} was accepted"),
        (Err(error), _) => panic!("{id}: {error}"),
    }
}

fn llama() -> SmallModel {
    SmallModel::new("llama", QuantFormat::Q8_0)
}

fn check(id: &str, model: &SmallModel, is: Is) {
    let folder = tempfile::tempdir().unwrap();
    let path = model.write(folder.path());
    let bytes = std::fs::metadata(&path).unwrap().len() as usize;
    let outcome = bounded(id, bytes, || {
        let checkpoint = Checkpoint::open(&path)?;
        record(&checkpoint, PlanOptions { capacity: 16, kv: KvType::F16 }).map(drop)
    });
    judge(id, outcome, &is);
}

#[test]
fn keys_that_describe_no_model_are_refused_by_key_and_place() {
    use Defect::{BadArray, BadType, BadValue, MissingKey};
    use Key::{F32, I32, Text, U32, U32s, U64};
    let k = |rest: &'static str| match rest.strip_prefix('/') {
        Some(absolute) => absolute.to_owned(),
        None => format!("llama.{rest}"),
    };
    let rows: Vec<(&str, &'static str, Key, Is)> = vec![
        ("M02", "/general.architecture", Text("mamba"), Is::NotServed("mamba")),
        ("M03", "block_count", U32(0), Is::Bad(BadValue, "block_count")),
        ("M04", "block_count", U32(u32::MAX), Is::Bad(BadValue, "block_count")),
        ("M07", "attention.head_count", U32(0), Is::Bad(BadValue, "head_count")),
        ("M08", "attention.head_count_kv", U32(0), Is::Bad(BadValue, "head_count_kv")),
        ("M09", "attention.head_count_kv", U32(3), Is::Bad(BadValue, "head_count_kv")),
        ("M10", "attention.head_count", U32(6), Is::Bad(BadValue, "head_count")),
        ("M11 zero", "attention.key_length", U32(0), Is::Bad(BadValue, "key_length")),
        ("M11 odd", "attention.key_length", U32(15), Is::Bad(BadValue, "key_length")),
        ("M11 1000", "attention.key_length", U32(1000), Is::Bad(BadValue, "key_length")),
        ("M12 above", "rope.dimension_count", U32(32), Is::Bad(BadValue, "dimension_count")),
        ("M12 odd", "rope.dimension_count", U32(7), Is::Bad(BadValue, "dimension_count")),
        ("M12 zero", "rope.dimension_count", U32(0), Is::Bad(BadValue, "dimension_count")),
        ("M13 zero", "attention.layer_norm_rms_epsilon", F32(0.0), Is::Bad(BadValue, "epsilon")),
        (
            "M13 NaN",
            "attention.layer_norm_rms_epsilon",
            F32(f32::NAN),
            Is::Bad(BadValue, "epsilon"),
        ),
        ("M13 neg", "attention.layer_norm_rms_epsilon", F32(-1.0), Is::Bad(BadValue, "epsilon")),
        ("M14 zero", "rope.freq_base", F32(0.0), Is::Bad(BadValue, "freq_base")),
        ("M14 NaN", "rope.freq_base", F32(f32::NAN), Is::Bad(BadValue, "freq_base")),
        ("M14 inf", "rope.freq_base", F32(f32::INFINITY), Is::Bad(BadValue, "freq_base")),
        ("K26 -0", "rope.freq_base", F32(-0.0), Is::Bad(BadValue, "freq_base")),
        ("K26 tiny", "rope.freq_base", F32(1e-40), Is::Bad(BadValue, "freq_base")),
        (
            "K26 eps inf",
            "attention.layer_norm_rms_epsilon",
            F32(f32::INFINITY),
            Is::Bad(BadValue, "epsilon"),
        ),
        (
            "K26 eps tiny",
            "attention.layer_norm_rms_epsilon",
            F32(1e-40),
            Is::Bad(BadValue, "epsilon"),
        ),
        ("K26 scale off", "rope.scaling.factor", F32(0.0), Is::Served),
        ("K26 scale -1", "rope.scaling.factor", F32(-1.0), Is::Bad(BadValue, "scaling.factor")),
        (
            "K26 scale NaN",
            "rope.scaling.factor",
            F32(f32::NAN),
            Is::Bad(BadValue, "scaling.factor"),
        ),
        (
            "K26 scale inf",
            "rope.scaling.factor",
            F32(f32::INFINITY),
            Is::Bad(BadValue, "scaling.factor"),
        ),
        ("M15 zero", "context_length", U32(0), Is::Bad(BadValue, "context_length")),
        ("M15 2^63", "context_length", U64(1 << 63), Is::Bad(BadValue, "context_length")),
        ("M19", "attention.head_count_kv", U32s(vec![2; 3]), Is::Bad(BadArray, "head_count_kv")),
        ("M20 i32", "block_count", I32(2), Is::Served),
        ("M20 u64", "block_count", U64(2), Is::Served),
        ("M20 neg", "block_count", I32(-2), Is::Bad(BadValue, "block_count")),
        ("M20 f32", "block_count", F32(2.0), Is::Bad(BadType, "block_count")),
        ("M23", "expert_count", U32(8), Is::Bad(MissingKey, "expert_used_count")),
        ("V22", "vocab_size", U64(1 << 31), Is::Bad(BadValue, "vocab_size")),
        ("hidden 0", "embedding_length", U32(0), Is::Bad(BadValue, "embedding_length")),
        ("ffn 2^31", "feed_forward_length", U32(1 << 31), Is::Bad(BadValue, "feed_forward")),
    ];
    for (id, key, value, is) in rows {
        check(id, llama().set(&k(key), value), is);
    }
    check("M01", llama().unset("general.architecture"), Is::Bad(MissingKey, "architecture"));
}

/// The limits that SECURITY.md names, at the limit and one above.
#[test]
fn every_limit_of_a_configuration_holds_at_its_last_value() {
    for (key, most, step) in [
        ("attention.head_count", 1024, 1),
        ("attention.key_length", 256, 2),
        ("block_count", 512u64, 1),
        ("embedding_length", 1 << 17, 1),
        ("feed_forward_length", 1 << 20, 1),
        ("context_length", 1 << 24, 1),
        ("vocab_size", 1 << 22, 1),
    ] {
        let at = format!("llama.{key}");
        let refused = |value| {
            let folder = tempfile::tempdir().unwrap();
            let mut model = llama();
            for head in ["key_length", "value_length"] {
                let bytes = if key == "attention.key_length" { value } else { 16 };
                model.set(&format!("llama.attention.{head}"), Key::U64(bytes));
            }
            let checkpoint = model.set(&at, Key::U64(value)).open(folder.path());
            let options = PlanOptions { capacity: 16, kv: KvType::F16 };
            match record(&checkpoint, options) {
                Err(Error::InvalidModel { at, defect: Defect::BadValue, .. }) => at.contains(key),
                _ => false,
            }
        };
        assert!(refused(most + step), "{key}: {} is accepted", most + step);
        // What is wrong then is that the tensors have another shape.
        assert!(!refused(most), "{key}: {most} is refused");
    }
}

#[test]
fn tensors_that_are_no_models_are_refused_by_name() {
    use Defect::{MissingTensor, ShapeMismatch};
    for name in llama().tensors.iter().map(|t| t.name.clone()) {
        check("M05", llama().remove(&name), Is::Bad(MissingTensor, ""));
    }
    let extra = |name: &str| {
        let mut m = llama();
        m.tensor(name, &[64], QuantFormat::F32);
        m
    };
    check("M06", &extra("blk.0.attn_q_norm.weight"), Is::NotServed("blk.0.attn_q_norm.weight"));
    check("M06", &extra("blk.7.attn_norm.weight"), Is::NotServed("blk.7.attn_norm.weight"));
    check("M06", &extra("a.note"), Is::Served);
    let mut m = llama();
    m.change("blk.0.ffn_up.weight", |t| t.shape.reverse());
    check("M16", &m, Is::Bad(ShapeMismatch, "ffn_up"));
    let mut m = llama();
    m.change("token_embd.weight", |t| t.shape[1] -= 1);
    check("M17", &m, Is::Bad(ShapeMismatch, "token_embd"));
    let mut m = llama();
    m.tensor("output.weight", &[small_model::HIDDEN, small_model::VOCAB], QuantFormat::Q4_0);
    check("M18", &m, Is::Served);
    let mut m = llama();
    m.change("blk.1.ffn_down.weight", |t| t.format = QuantFormat::Q5_1);
    check("M21", &m, Is::Served);
    for format in [QuantFormat::F16, QuantFormat::Q8_0] {
        let mut m = llama();
        m.change("blk.0.attn_norm.weight", |t| t.format = format);
        check("M22", &m, Is::Served);
    }
}

#[test]
fn weights_of_nothing_but_ones_decode_to_a_status() {
    let folder = tempfile::tempdir().unwrap();
    let path = llama().write(folder.path());
    let mut bytes = std::fs::read(&path).unwrap();
    let clean = Checkpoint::from_gguf(&path, bytes.clone()).unwrap();
    // D05 and D07: NaN scales, and the greatest scale with the greatest quants.
    let blocks = clean.tensor("blk.0.ffn_up.weight").unwrap().bytes as usize;
    let data = clean.read_all(clean.tensor("blk.0.ffn_up.weight").unwrap()).unwrap();
    let at = bytes.windows(blocks).position(|w| w == data).unwrap();
    for (id, scale, quant) in [("D05", [0xFF, 0xFF], 0xFF), ("D07", [0xFF, 0x7B], 0x7F)] {
        for block in bytes[at..at + blocks].chunks_exact_mut(34) {
            block.fill(quant);
            block[..2].copy_from_slice(&scale);
        }
        let checkpoint = Checkpoint::from_gguf(&path, bytes.clone()).unwrap();
        let options = SessionOptions {
            backend: BackendChoice::Cpu,
            capacity: 8,
            ..SessionOptions::default()
        };
        let mut session = DecodeSession::new(&checkpoint, &options, &mut |_, _| {}).unwrap();
        match session.feed(3) {
            Err(Error::Decode { position: 0, what }) => assert!(what.contains("finite"), "{what}"),
            Ok(_) if id == "D07" => {}
            other => panic!("{id}: {other:?}"),
        }
        assert!(session.reset().is_ok(), "{id}: the session is usable");
    }
}

/// A vocabulary of `llama`: three control tokens, a byte, two letters and their pair.
struct Vocabulary {
    model: &'static [u8],
    tokens: Vec<Vec<u8>>,
    keys: Vec<(&'static str, u32, Vec<u8>)>,
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn list(kind: u32, count: usize, elements: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &(count as u64).to_le_bytes(), elements].concat()
}

impl Vocabulary {
    fn new() -> Self {
        let words = ["<unk>", "<s>", "</s>", "<0x41>", "a", "b", "ab"];
        let keys = vec![
            ("scores", 9, list(6, 7, &floats(&[0.0; 7]))),
            ("token_type", 9, list(5, 7, &[2i32, 3, 3, 6, 1, 1, 1].map(i32::to_le_bytes).concat())),
            ("bos_token_id", 4, 1u32.to_le_bytes().to_vec()),
            ("eos_token_id", 4, 2u32.to_le_bytes().to_vec()),
        ];
        Self { model: b"llama", tokens: words.map(|w| w.as_bytes().to_vec()).to_vec(), keys }
    }

    fn bytes_level(merges: &[&[u8]]) -> Self {
        let mut v = Self::new();
        v.model = b"gpt2";
        let joined: Vec<u8> = merges.iter().flat_map(|m| text(m)).collect();
        v.set("merges", 9, list(8, merges.len(), &joined))
    }

    fn set(mut self, key: &'static str, kind: u32, value: Vec<u8>) -> Self {
        self = self.without(key);
        self.keys.push((key, kind, value));
        self
    }

    fn without(mut self, key: &str) -> Self {
        self.keys.retain(|(k, ..)| *k != key);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let joined: Vec<u8> = self.tokens.iter().flat_map(|t| text(t)).collect();
        let mut g = Gguf::default().key(b"tokenizer.ggml.model", 8, &text(self.model)).array(
            b"tokenizer.ggml.tokens",
            8,
            self.tokens.len() as u64,
            &joined,
        );
        for (key, kind, value) in &self.keys {
            g = g.key(format!("tokenizer.ggml.{key}").as_bytes(), *kind, value);
        }
        g.bytes()
    }
}

fn tokenizer(bytes: &[u8]) -> Result<Tokenizer, Error> {
    let checkpoint = Checkpoint::from_gguf("vocabulary.gguf".as_ref(), bytes.to_vec())?;
    Ok(Tokenizer::read(&checkpoint)?.unwrap())
}

fn vocabulary(id: &str, v: Vocabulary, is: Is) {
    let bytes = v.bytes();
    judge(id, bounded(id, bytes.len(), || tokenizer(&bytes).map(drop)), &is);
}

#[test]
fn a_vocabulary_that_cannot_be_used_is_refused_by_key_and_place() {
    use Defect::{BadType, BadValue, BadVocab, MissingKey};
    let new = Vocabulary::new;
    let u32s = |v: u32| v.to_le_bytes().to_vec();
    let without_tokens = Gguf::default().key(b"tokenizer.ggml.model", 8, &text(b"llama")).bytes();
    judge("V01", tokenizer(&without_tokens).map(drop), &Is::Bad(MissingKey, "tokens"));
    let mut none = new();
    none.tokens.clear();
    vocabulary("V02", none, Is::Bad(BadVocab, "tokens"));
    let short = list(6, 3, &floats(&[0.0; 3]));
    vocabulary("V03", new().set("scores", 9, short), Is::Bad(BadVocab, "scores"));
    let bytes = || list(0, 7, &[1; 7]);
    vocabulary("V04", new().set("scores", 9, bytes()), Is::Bad(BadType, "scores"));
    vocabulary("V05", new().set("token_type", 9, bytes()), Is::Bad(BadType, "token_type"));
    let odd = list(5, 7, &[255i32; 7].map(i32::to_le_bytes).concat());
    vocabulary("V06", new().set("token_type", 9, odd.clone()), Is::Served);
    let (_, said) = warnings::of(|| tokenizer(&new().set("token_type", 9, odd).bytes()));
    assert!(
        said.iter().any(|s| s.contains("token_type: 7 values outside 1 to 6")),
        "V06: {said:?}"
    );
    let (_, said) = warnings::of(|| tokenizer(&new().bytes()));
    assert!(!said.iter().any(|s| s.contains("token_type")), "V06: {said:?}");
    for id in [7, 1 << 31, u32::MAX - 1] {
        let v = new().set("bos_token_id", 4, u32s(id));
        vocabulary("V07", v, Is::Bad(BadValue, "bos_token_id"));
    }
    let mut tiny = new().without("eos_token_id").without("bos_token_id");
    tiny.tokens.truncate(1);
    vocabulary("V08", tiny, Is::Bad(BadValue, "bos_token_id"));
    let none = new().set("eos_token_id", 5, (-1i32).to_le_bytes().to_vec());
    assert!(tokenizer(&none.bytes()).unwrap().eos().is_none(), "V09");
    let mut odd = new();
    odd.tokens.extend(["<0x-1>", "<0xZZ>", "<0x1>", "<0x100>"].map(|t| t.as_bytes().to_vec()));
    let odd = odd.without("scores").without("token_type");
    let odd = odd.set("scores", 9, list(6, 11, &floats(&[0.0; 11])));
    assert_eq!(tokenizer(&odd.bytes()).unwrap().bytes_of(7), b"<0x-1>", "V10");
    let mut twice = new();
    twice.tokens[5] = b"a".to_vec();
    let ids = tokenizer(&twice.bytes()).unwrap().encode("a", false).unwrap();
    assert!(!ids.contains(&5), "V11: the first id wins: {ids:?}");
    let mut empty = new();
    empty.tokens[5].clear();
    let ids = tokenizer(&empty.bytes()).unwrap().encode("a b ab", false).unwrap();
    assert!(!ids.contains(&5), "V12: the empty token is matched: {ids:?}");
    let mut long = new();
    long.tokens[5] = vec![b'x'; 65_536];
    assert!(tokenizer(&long.bytes()).is_ok(), "V13 at the limit");
    for bytes in [65_537, 1 << 20] {
        let mut long = new();
        long.tokens[5] = vec![b'x'; bytes];
        vocabulary("V13", long, Is::Bad(BadVocab, "tokens"));
    }
    let merged = |merges: &[&[u8]]| Vocabulary::bytes_level(merges);
    // What cannot be merged is left out, what stands behind it is not: "ab" is one token.
    for (id, merges) in [
        ("V14", &[&b"x y"[..], b"a b"][..]),
        ("V15", &[b"ab", b"a  b", b" ", b"", b"a b"]),
        ("V17", &[b"a b", b"ab a", b"b ab", b"ab ab"]),
    ] {
        let encode = || tokenizer(&merged(merges).bytes())?.encode("ababab", false);
        assert_eq!(bounded(id, 1024, encode).unwrap(), [6, 6, 6], "{id}");
    }
    let apart = tokenizer(&merged(&[b"x y"]).bytes()).unwrap();
    assert_eq!(apart.encode("ab", false).unwrap(), [4, 5], "V14: no merge, no pair");
    let ints = list(5, 1, &1i32.to_le_bytes());
    vocabulary("V16", merged(&[]).set("merges", 9, ints), Is::Bad(BadType, "merges"));
    vocabulary("no merges", merged(&[]), Is::Bad(BadVocab, "merges"));
    let mut other = new();
    other.model = b"bert";
    vocabulary("another model", other, Is::NotServed("bert"));
}

#[test]
fn a_million_equal_merges_and_a_template_beyond_the_cap_end_in_time() {
    let merges: Vec<&[u8]> = vec![b"a b"; 1_000_000];
    let bytes = Vocabulary::bytes_level(&merges).bytes();
    let (made, _, took) = measured(|| tokenizer(&bytes).map(drop));
    made.unwrap();
    assert!(took < Duration::from_secs(3), "V17: {took:?}");
    let template =
        |size| Gguf::default().key(b"tokenizer.chat_template", 8, &text(&vec![b'{'; size])).bytes();
    assert!(Checkpoint::from_gguf("t.gguf".as_ref(), template(2 << 20)).is_ok());
    let huge = Checkpoint::from_gguf("t.gguf".as_ref(), template(17 << 20));
    judge("V21", huge.map(drop), &Is::Bad(Defect::BadString, "chat_template"));
}

#[test]
fn a_prompt_of_any_kind_is_split_in_linear_time() {
    let byte_level = tokenizer(&Vocabulary::bytes_level(&[b"a b"]).bytes()).unwrap();
    let pieces = tokenizer(&Vocabulary::new().bytes()).unwrap();
    for prompt in [
        "Z".repeat(131_072),
        "\n".repeat(100_000),
        "a".repeat(100_000),
        "a\0b".to_owned(),
        String::from_utf8_lossy(b"a\xff\xed\xa0\x80b").into_owned(),
        "<s".repeat(50_000),
    ] {
        for tokenizer in [&byte_level, &pieces] {
            // A letter that no token stands for is an error, and no more.
            let (_, _, took) = measured(|| tokenizer.encode(&prompt, true).is_ok());
            assert!(took < Duration::from_secs(1), "{:?}: {took:?}", &prompt[..2]);
        }
    }
}

/// Everything that a vocabulary gives.
type Given = (Vec<Vec<u8>>, Vec<Option<Vec<u32>>>, [Option<u32>; 2], Vec<bool>);

fn given(t: &Tokenizer) -> Given {
    let ids = 0..t.vocab_len() as u32 + 1;
    let encoded = ["ab A<s>", "ba ab", "\u{e9}"].map(|text| t.encode(text, true).ok());
    let ends = ids.clone().map(|id| t.is_end_of_generation(id)).collect();
    let bytes = ids.clone().map(|id| t.bytes_of(id).to_vec()).collect();
    (bytes, encoded.into(), [t.bos(), t.eos()], ends)
}

#[test]
fn every_truncation_and_every_flipped_bit_of_a_vocabulary_is_an_error_or_the_same_again() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("copy.gguf");
    let (mut refused, mut accepted) = (0, 0);
    let mut judge = |row: &str, bytes: &[u8]| {
        let read = || {
            let c = Checkpoint::from_gguf("v.gguf".as_ref(), bytes.to_vec())?;
            Tokenizer::read(&c).map(|t| (c, t))
        };
        match bounded(row, bytes.len(), read) {
            Err(Error::InvalidModel { path, at, offset, why, .. }) => {
                // Only a key that is not there has no place.
                let opened = Checkpoint::from_gguf("v.gguf".as_ref(), bytes.to_vec());
                let there = opened.map_or(true, |c| c.metadata().contains(&at));
                assert!(offset.is_some() || !there, "{row}: no place: {at}: {why}");
                assert!(path.ends_with("v.gguf") && !at.is_empty(), "{row}");
                refused += 1;
            }
            Err(Error::Unsupported { at, .. }) => assert!(at.starts_with("tokenizer."), "{row}"),
            Err(error) => panic!("{row}: {error}"),
            Ok((c, own)) => {
                // Written and read again it is the same vocabulary, or none as before.
                write_gguf(&c, &copy, &mut |_, _| {}).unwrap();
                let again = Tokenizer::read(&Checkpoint::open(&copy).unwrap()).unwrap();
                assert_eq!(again.as_ref().map(given), own.as_ref().map(given), "{row}");
                accepted += 1;
            }
        }
    };
    for whole in [Vocabulary::new().bytes(), Vocabulary::bytes_level(&[b"a b", b"b a"]).bytes()] {
        // Behind the last key there is only padding.
        for n in 0..whole.len() {
            judge(&format!("cut at {n}"), &whole[..n]);
        }
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            judge(&format!("bit {bit}"), &flipped);
        }
    }
    println!("{refused} refused, {accepted} the same again");
    assert!(refused > 2000 && accepted > 500, "{refused} refused, {accepted} accepted");
}

#[test]
fn a_name_that_is_no_text_and_a_file_that_is_gone_make_no_difference() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    let path = llama().write(folder.path());
    let odd = folder.path().join(std::ffi::OsStr::from_bytes(b"m\xff\xfe.gguf"));
    std::fs::rename(&path, &odd).unwrap();
    let checkpoint = Checkpoint::open(&odd).unwrap();
    std::fs::remove_file(&odd).unwrap();
    checkpoint.read_all(&checkpoint.tensors()[0]).unwrap();
    checkpoint.verify_unchanged().unwrap();
}

#[test]
fn a_sparse_file_of_a_terabyte_is_planned_and_refused_without_allocating_it() {
    // 2^40 bytes of f32 that the disk does not have.
    let header = Gguf::default().info(b"huge", &[1 << 19, 1 << 19], 0, 0).padded_data(&[], 32);
    let file = scratch("sparse.gguf", &header);
    let length = header.len() as u64 + (1 << 40);
    let opened = std::fs::OpenOptions::new().write(true).open(&file.path).unwrap();
    if opened.set_len(length).is_err() {
        println!("skipped: the file system has no sparse files of this size");
        return;
    }
    let outcome = bounded("F06", header.len(), || {
        let checkpoint = Checkpoint::open(&file.path)?;
        checkpoint.read_all(checkpoint.tensor("huge").unwrap()).map(drop)
    });
    assert!(matches!(outcome, Err(Error::Usage(why)) if why.contains("no memory for its")));
    // F11: what no memory holds is read in parts.
    let end = bounded("F11", header.len(), || {
        opened.write_all_at(&[7; 16], length - 16).unwrap();
        let checkpoint = Checkpoint::open(&file.path).unwrap();
        let mut end = [0; 32];
        let huge = checkpoint.tensor("huge").unwrap();
        checkpoint.read(huge, (1 << 40) - 32, &mut end).map(|()| end)
    });
    assert_eq!(end.unwrap().as_chunks::<16>().0, [[0; 16], [7; 16]]);
}
