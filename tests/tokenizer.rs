//! The tokenizer against the real vocabulary of SmolLM2 and against outside truth.
//!
//! Needs `models/smollm2-135m-instruct-q4_1.gguf` (README says how to fetch it).

// Clippy's exception for tests does not reach a test file's helpers.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use decode_graph::checkpoint::Checkpoint;
use decode_graph::tokenizer::{Tokenizer, VocabSource};

fn model_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/smollm2-135m-instruct-q4_1.gguf")
}

/// The model's vocabulary, as its file gives it.
fn real_vocab() -> VocabSource {
    let path = model_path();
    assert!(path.exists(), "the test model is not here: run models/fetch.sh first");
    let file = Checkpoint::open(&path).unwrap();
    let text = |key: &str| file.str_key(key).unwrap().map(str::to_owned);
    let texts = |key: &str| -> Vec<String> {
        let strings = file.strings_key(key).unwrap().unwrap();
        strings.iter().map(|bytes| String::from_utf8(bytes.to_vec()).unwrap()).collect()
    };
    let id = |name: &str| {
        let key = format!("tokenizer.ggml.{name}_token_id");
        file.u64_key(&key).unwrap().map(|id| u32::try_from(id).unwrap())
    };
    VocabSource {
        model: text("tokenizer.ggml.model").unwrap(),
        pre: text("tokenizer.ggml.pre"),
        tokens: texts("tokenizer.ggml.tokens"),
        token_types: file.i32_array_key("tokenizer.ggml.token_type").unwrap(),
        scores: None,
        merges: texts("tokenizer.ggml.merges"),
        bos: id("bos"),
        eos: id("eos"),
        eot: id("eot"),
        unknown: id("unknown"),
        add_bos: file.bool_key("tokenizer.ggml.add_bos_token").unwrap(),
        add_space_prefix: file.bool_key("tokenizer.ggml.add_space_prefix").unwrap(),
        chat_template: text("tokenizer.chat_template"),
    }
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
