//! The tokenizer against the real vocabulary of SmolLM2 and against outside truth.
//!
//! Needs `models/smollm2-135m-instruct-q4_1.gguf` (README says how to fetch it).

// Clippy's exception for tests does not reach a test file's helpers.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use decode_graph::checkpoint::Checkpoint;
use decode_graph::tokenizer::{Message, Tokenizer, VocabSource};

fn model_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/smollm2-135m-instruct-q4_1.gguf")
}

/// The model's vocabulary, as its file gives it.
fn real_vocab() -> VocabSource {
    let path = model_path();
    assert!(path.exists(), "the test model is not here: run models/fetch.sh first");
    let file = Checkpoint::open(&path).unwrap();
    VocabSource::read(&file).unwrap().unwrap()
}

fn real() -> Tokenizer {
    Tokenizer::new(real_vocab(), &model_path()).unwrap()
}

/// Prompts, their ids, the greedy ids after them and the text of those, as `transformers` 5.17.0
/// computed them from the same file in float32.
fn golden() -> Vec<(String, Vec<u32>, Vec<u32>, String)> {
    let text = include_str!("golden/tokenizer-smollm2.json");
    serde_json::from_str(text).unwrap()
}

#[test]
fn golden_prompts_become_the_reference_ids_and_greedy_ids_its_text() {
    let t = real();
    let cases = golden();
    assert!(cases.len() >= 6);
    for (prompt, prompt_ids, greedy_ids, greedy_text) in cases {
        assert_eq!(t.encode(&prompt, true).unwrap(), prompt_ids, "{prompt:?}");
        assert_eq!(t.decode(&prompt_ids), prompt);
        assert_eq!(t.decode(&greedy_ids), greedy_text, "{prompt:?}");
        let mut stream = t.stream();
        let mut streamed: String = greedy_ids.iter().map(|&id| stream.push(id)).collect();
        streamed.push_str(&stream.finish());
        assert_eq!(streamed, greedy_text, "{prompt:?}");
    }
}

/// The texts' ids are those of the Python package `tokenizers`, given the same tokens and merges
/// and the pre-tokenizer that the model was published with (single digits, then byte level).
#[test]
fn texts_become_the_ids_of_the_tokenizers_package() {
    let text = include_str!("golden/tokenizer-smollm2-texts.json");
    let cases: Vec<(String, Vec<u32>)> = serde_json::from_str(text).unwrap();
    assert!(cases.len() >= 10);
    let t = real();
    for (text, ids) in cases {
        assert_eq!(t.encode(&text, true).unwrap(), ids, "{text:?}");
    }
}

#[test]
fn the_real_vocabulary_ends_at_its_own_end_tokens() {
    let t = real();
    assert_eq!((t.vocab_len(), t.bos(), t.eos()), (49_152, Some(1), Some(2)));
    let ends: Vec<u32> = (0..49_152).filter(|&id| t.is_end_of_generation(id)).collect();
    assert_eq!(ends, [0, 2]);
    assert!(t.chat_template().is_some_and(|template| template.contains("<|im_start|>")));
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        u32::try_from((z ^ (z >> 31)) % u64::from(bound)).unwrap()
    }

    fn text(&mut self) -> String {
        let mut text = String::new();
        for _ in 0..=self.below(24) {
            let (low, high) = [
                (0x20, 0x7f),
                (0x0, 0x20),
                (0x30, 0x3a),
                (0x80, 0x300),
                (0x300, 0x370),
                (0x1f300, 0x1faff),
                (0x0, 0x1_0000),
                (0x1_0000, 0x11_0000),
                (0x4e00, 0xa000),
            ][self.below(9) as usize];
            // Surrogates are no characters.
            let c = char::from_u32(low + self.below(high - low)).unwrap_or('\u{d7ff}');
            for _ in 0..=self.below(3) {
                text.push(c);
            }
            if self.below(3) == 0 {
                text.push_str(
                    [
                        "\r\n",
                        "\n\n\n",
                        "  ",
                        " ",
                        "'re",
                        "\u{200d}",
                        "\u{fe0f}",
                        "<|im_end|>",
                        "\t",
                    ][self.below(9) as usize],
                );
            }
        }
        text
    }
}

#[test]
fn decoding_what_was_encoded_gives_the_text_back() {
    let mut source = real_vocab();
    // This vocabulary lacks 21 bytes (control characters, and the first bytes of planes 4 to 11,
    // which have no characters). They get ids past its end, so that all of Unicode is covered.
    let mut added = 0;
    let alphabet = ('!'..='~').chain('\u{a1}'..='\u{ac}').chain('\u{ae}'..='\u{143}');
    for c in alphabet.map(String::from) {
        if !source.tokens.contains(&c) {
            source.tokens.push(c);
            source.token_types.as_mut().unwrap().push(1);
            added += 1;
        }
    }
    let t = Tokenizer::new(source, &model_path()).unwrap();
    let mut random = Random(42);
    for _ in 0..10_000 {
        let text = random.text();
        let ids = t.encode(&text, false).unwrap();
        assert_eq!(t.decode(&ids), text);
        let mut stream = t.stream();
        let mut streamed: String = ids.iter().map(|&id| stream.push(id)).collect();
        streamed.push_str(&stream.finish());
        assert_eq!(streamed, text);
    }
    assert_eq!(added, 21);
}

#[test]
fn a_byte_that_the_real_vocabulary_lacks_is_refused_not_dropped() {
    let error = real().encode("end\u{4}", true).unwrap_err().to_string();
    assert!(error.contains("0x04"), "{error}");
}

#[test]
fn long_prompts_of_the_real_vocabulary_end_within_a_second() {
    let t = real();
    for prompt in ["Z".repeat(131_072), "\n".repeat(100_000), " ".repeat(100_000) + "x"] {
        let start = std::time::Instant::now();
        let ids = t.encode(&prompt, true).unwrap();
        assert!(start.elapsed().as_secs_f64() < 1.0, "{:?}", start.elapsed());
        assert_eq!(t.decode(&ids), prompt);
    }
}

#[test]
fn the_real_template_makes_a_conversation_of_the_models_own_tokens() {
    let t = real();
    let turns = [Message::new("user", "Why is the sky blue?")];
    let text = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging \
                Face<|im_end|>\n<|im_start|>user\nWhy is the sky blue?<|im_end|>\n\
                <|im_start|>assistant\n";
    let ids = t.encode_chat(&turns, 0).unwrap();
    assert_eq!(t.decode(&ids), text);
    // Tokens, not the letters of their names.
    assert_eq!(ids.iter().filter(|id| **id == 1).count(), 3);
    let own = [Message::new("system", "Be brief."), turns[0].clone()];
    let said = t.decode(&t.encode_chat(&own, 0).unwrap());
    assert!(
        said.starts_with("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"),
        "{said}"
    );
}

#[test]
fn bos_comes_once_whether_or_not_the_template_writes_it() {
    let bos = |template: &str, add_bos| {
        let mut source = real_vocab();
        source.add_bos = Some(add_bos);
        source.chat_template = Some(template.to_owned());
        let t = Tokenizer::new(source, &model_path()).unwrap();
        let ids = t.encode_chat(&[Message::new("user", "Hi")], 0).unwrap();
        ids.iter().filter(|id| Some(**id) == t.bos()).count()
    };
    for (template, add_bos, expected) in [
        ("{{ bos_token }}{{ messages[0].content }}", true, 1),
        ("{{ bos_token }}{{ messages[0].content }}", false, 1),
        ("{{ messages[0].content }}", true, 1),
        ("{{ messages[0].content }}", false, 0),
    ] {
        assert_eq!(bos(template, add_bos), expected, "{template} {add_bos}");
    }
    let mut none = real_vocab();
    none.chat_template = None;
    let none = Tokenizer::new(none, &model_path()).unwrap();
    assert_eq!(none.encode_chat(&[], 0).unwrap_err().exit_code(), 4);
}

/// The real vocabulary as a folder's `tokenizer.json`, as its publisher wrote it.
fn folder() -> tempfile::TempDir {
    let source = real_vocab();
    let special = |text: &&String| text.starts_with("<|") && text.ends_with("|>");
    let vocab: serde_json::Map<_, _> = (0u32..)
        .zip(&source.tokens)
        .map(|(id, text)| (text.clone(), serde_json::json!(id)))
        .collect();
    let added: Vec<_> = (0u32..)
        .zip(&source.tokens)
        .filter(|(_, text)| special(text))
        .map(|(id, text)| {
            serde_json::json!({"id": id, "content": text, "special": true, "single_word": false,
                               "lstrip": false, "rstrip": false, "normalized": false})
        })
        .collect();
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<|endoftext|>",
                  "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
                  "byte_fallback": false, "vocab": vocab, "merges": source.merges},
    });
    let config = serde_json::json!({
        "bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"},
        "chat_template": source.chat_template,
    });
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/transformers/qwen2");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden.join(file), folder.path().join(file)).unwrap();
    }
    folder
}

#[test]
fn a_folders_tokenizer_gives_the_same_ids_texts_and_conversation() {
    let folder = folder();
    let t = Tokenizer::of(&Checkpoint::open(folder.path()).unwrap()).unwrap();
    let own = real();
    let text = include_str!("golden/tokenizer-smollm2-texts.json");
    let cases: Vec<(String, Vec<u32>)> = serde_json::from_str(text).unwrap();
    for (text, ids) in cases {
        assert_eq!(t.encode(&text, true).unwrap(), ids, "{text:?}");
        assert_eq!(t.decode(&ids), own.decode(&ids));
    }
    for (prompt, prompt_ids, greedy_ids, greedy_text) in golden() {
        assert_eq!(t.encode(&prompt, true).unwrap(), prompt_ids, "{prompt:?}");
        assert_eq!(t.decode(&greedy_ids), greedy_text);
    }
    assert_eq!((t.vocab_len(), t.bos(), t.eos()), (49_152, Some(1), Some(2)));
    assert!((0..49_152).all(|id| t.bytes_of(id) == own.bytes_of(id)));
    assert!([0, 2].iter().all(|id| t.is_end_of_generation(*id)) && !t.is_end_of_generation(5));
    let turns = [Message::new("user", "Why?")];
    assert_eq!(t.encode_chat(&turns, 0).unwrap(), own.encode_chat(&turns, 0).unwrap());
    // A template in its own file goes before the one in the configuration.
    std::fs::write(folder.path().join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    let t = Tokenizer::of(&Checkpoint::open(folder.path()).unwrap()).unwrap();
    assert_eq!(t.decode(&t.encode_chat(&turns, 0).unwrap()), "Why?");
}

#[test]
fn long_prompts_of_a_folders_tokenizer_end_soon() {
    let folder = folder();
    let t = Tokenizer::of(&Checkpoint::open(folder.path()).unwrap()).unwrap();
    for prompt in ["Z".repeat(131_072), "\n".repeat(100_000), " ".repeat(100_000) + "x"] {
        let start = std::time::Instant::now();
        let ids = t.encode(&prompt, true).unwrap();
        assert!(start.elapsed().as_secs_f64() < 5.0, "{:?}", start.elapsed());
        assert_eq!(t.decode(&ids), prompt);
    }
}

/// A SentencePiece vocabulary as `tokenizer.json`: a space before the text, bytes where a character
/// is no token.
fn pieces() -> serde_json::Value {
    let vocab =
        ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "\u{2581}", "a", "b", "ab", "\u{2581}ab"];
    let vocab: serde_json::Map<_, _> =
        (0u32..).zip(vocab).map(|(id, t)| (t.to_owned(), serde_json::json!(id))).collect();
    let added = ["<unk>", "<s>", "</s>"].iter().zip(0u32..).map(|(t, id)| {
        serde_json::json!({"id": id, "content": t, "special": true, "single_word": false,
                           "lstrip": false, "rstrip": false, "normalized": false})
    });
    serde_json::json!({
        "version": "1.0", "added_tokens": added.collect::<Vec<_>>(), "pre_tokenizer": null,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "fuse_unk": true,
                  "vocab": vocab, "merges": [["a", "b"], ["\u{2581}", "ab"]]},
    })
}

fn opened(
    folder: &Path,
    json: &serde_json::Value,
) -> Result<Tokenizer, decode_graph::error::Error> {
    std::fs::write(folder.join("tokenizer.json"), json.to_string()).unwrap();
    Tokenizer::of(&Checkpoint::open(folder).unwrap())
}

#[test]
fn a_folders_sentencepiece_vocabulary_falls_back_to_bytes_and_begins_with_bos() {
    let folder = folder();
    std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"bos_token": "<s>"}"#).unwrap();
    let t = opened(folder.path(), &pieces()).unwrap();
    assert_eq!(t.encode("ab b\u{e9}", true).unwrap(), [1, 9, 5, 7, 3, 4]);
    assert_eq!(t.decode(&[9, 5, 7, 3, 4]), " ab b\u{e9}");
    assert!(t.is_end_of_generation(2));
}

#[test]
fn a_malformed_tokenizer_file_is_refused_and_never_panics() {
    let folder = folder();
    let path = folder.path();
    let change = |f: &dyn Fn(&mut serde_json::Value)| {
        let mut json = pieces();
        f(&mut json);
        opened(path, &json).map(|_| ()).unwrap_err()
    };
    use serde_json::json;
    for (what, error, code) in [
        ("Unigram", change(&|j| j["model"]["type"] = json!("Unigram")), 4),
        ("decoder", change(&|j| j["decoder"] = json!(null)), 4),
        ("two tokens", change(&|j| j["added_tokens"][1]["id"] = json!(0)), 3),
        ("id", change(&|j| j["model"]["vocab"]["a"] = json!(u32::MAX)), 3),
        ("integer `-1`", change(&|j| j["model"]["vocab"]["a"] = json!(-1)), 3),
        ("model", change(&|j| j["model"]["merges"] = json!([["a", "zz"]])), 3),
        (
            "cut",
            change(&|j| {
                j["normalizer"]["normalizers"] = json!(vec![json!({"type": "NFC"}); 100_000])
            }),
            3,
        ),
    ] {
        assert_eq!(error.exit_code(), code, "{what}: {error}");
        assert!(error.to_string().contains(what), "{what}: {error}");
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
    }
    // A gigabyte that the disk does not have.
    let json = std::fs::OpenOptions::new().write(true).open(path.join("tokenizer.json")).unwrap();
    json.set_len(1 << 30).unwrap();
    let error = Tokenizer::of(&Checkpoint::open(path).unwrap()).map(drop).unwrap_err();
    assert!(error.to_string().contains("tokenizer.json: file: has 1073741824 bytes"), "{error}");
    // An id that no token has stands for the character of what cannot be shown.
    let mut sparse = pieces();
    sparse["model"]["vocab"]["far"] = json!(12);
    assert_eq!(opened(path, &sparse).unwrap().decode(&[10, 12]), "\u{fffd}far");
    // J04: of patterns, those that a backtracking matcher takes for ever on are refused, in a group
    // or not; the others take time in proportion to the text.
    let split = |pattern: &str| {
        let mut json = pieces();
        json["pre_tokenizer"] = json!({"type": "Split", "pattern": {"Regex": pattern},
                                       "behavior": "Isolated", "invert": false});
        opened(path, &json)
    };
    for slow in ["(a|aa)+(?!x)$", r"(?:a|aa|\s+(?!\S))+$", r"(a*)*\1b"] {
        let error = split(slow).map(drop).unwrap_err();
        assert_eq!(error.exit_code(), 4, "{error}");
        assert!(error.to_string().contains("pre_tokenizer"), "{error}");
    }
    for linear in ["(a|aa)+$", r"(a+)+b|\s+(?!\S)|\s+"] {
        let tokenizer = split(linear).unwrap();
        let start = std::time::Instant::now();
        let _ = tokenizer.encode(&("a".repeat(5_000) + " b"), false);
        assert!(start.elapsed().as_secs_f64() < 1.0, "{linear}: {:?}", start.elapsed());
    }
}
