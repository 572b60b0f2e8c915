//! A small `tokenizer.json`, cut and flipped everywhere: an error that names the file and the byte, or
//! a vocabulary that can be used, within bounded time and memory.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod counting_allocator;
#[path = "../fuzz/targets/mod.rs"]
#[allow(dead_code, reason = "only what stands beside the weights is used")]
mod targets;

use counting_allocator::bounded;
use decode_graph::checkpoint::Checkpoint;
use decode_graph::error::Error;
use decode_graph::tokenizer::Tokenizer;
use serde_json::json;

/// Bytes where a character is no token, a normalizer, a special token, two merges.
fn whole() -> Vec<u8> {
    let special = json!({"id": 1, "content": "<s>", "special": true, "single_word": false,
                         "lstrip": false, "rstrip": false, "normalized": false});
    let vocab = json!({"<unk>": 0, "<s>": 1, "<0x41>": 2, "a": 3, "b": 4, "ab": 5, "\u{2581}": 6,
                       "\u{2581}ab": 7});
    json!({
        "version": "1.0", "added_tokens": [special], "pre_tokenizer": null,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "vocab": vocab,
                  "merges": [["a", "b"], ["\u{2581}", "ab"]]},
    })
    .to_string()
    .into_bytes()
}

#[test]
fn every_prefix_and_every_flipped_bit_is_an_error_with_its_place_or_a_vocabulary() {
    let folder = tempfile::tempdir().unwrap();
    let weights = include_bytes!("../fuzz/corpus/safetensors/whole_model_f32");
    std::fs::write(folder.path().join("config.json"), targets::CONFIG).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), weights).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let file = folder.path().join("tokenizer.json");
    let (mut placed, mut refused) = (0, 0);
    let mut judge = |row: &str, bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        let error = match bounded(row, bytes.len(), || Tokenizer::of(&checkpoint)) {
            Ok(t) => {
                let vocabulary = t.vocab_len() as u32;
                if let Ok(ids) = t.encode("ab A<s> b", true) {
                    assert!(ids.iter().all(|id| *id < vocabulary), "{row}: {ids:?}");
                    // Piece by piece it says what it says of all.
                    let mut stream = t.stream();
                    let mut streamed: String = ids.iter().map(|id| stream.push(*id)).collect();
                    streamed.push_str(&stream.finish());
                    assert_eq!(streamed, t.decode(&ids), "{row}");
                }
                return true;
            }
            Err(error) => error,
        };
        refused += 1;
        let said = error.to_string();
        assert!(said.contains("tokenizer.json"), "{row}: {said}");
        match error {
            Error::InvalidModel { at, offset, .. } => {
                assert!(!at.is_empty(), "{row}: {said}");
                assert!(offset.is_none_or(|o| o <= bytes.len() as u64), "{row}: {said}");
                placed += usize::from(offset.is_some());
            }
            Error::Unsupported { .. } => {}
            _ => panic!("{row}: {said}"),
        }
        false
    };
    let whole = whole();
    assert!(judge("whole", &whole));
    for n in 0..whole.len() {
        assert!(!judge(&format!("cut at {n}"), &whole[..n]), "cut at {n} is accepted");
    }
    let mut accepted = 0;
    for bit in 0..whole.len() * 8 {
        let mut flipped = whole.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        accepted += usize::from(judge(&format!("bit {bit}"), &flipped));
    }
    println!("{refused} refused, {placed} with their byte, {accepted} flips accepted");
    assert!(placed > whole.len() && accepted > 100, "{placed} placed, {accepted} accepted");
}
