//! What is done with untrusted bytes, one function a format: the targets of `cargo fuzz`, and of the
//! mutation loop and the corpus replay in `tests/fuzz_corpus.rs`.
//!
//! Each says whether the bytes were accepted, and panics where a promise is broken.

use decode_graph::arch::{self, PlanOptions};
use decode_graph::bench::compare;
use decode_graph::checkpoint::Checkpoint;
use decode_graph::error::Error;
use decode_graph::ops::KvType;
use decode_graph::tokenizer::{ChatContext, Message, Tokenizer, VocabSource, render_chat};
use std::path::Path;

/// What is said of a refusal: the file is named, and so is the place in it.
fn refused(error: &Error) -> bool {
    let said = error.to_string();
    assert!(said.contains("fuzz.input"), "the file is not named: {said}");
    if let Error::InvalidModel { at, why, .. } = error {
        assert!(!at.is_empty() && !why.is_empty(), "{said}");
    }
    assert!(!matches!(error, Error::Internal(_)), "a bug: {said}");
    false
}

/// A model file: opened, every tensor read, its tokenizer built, its plan recorded.
pub(crate) fn gguf(data: &[u8]) -> bool {
    let checkpoint = match Checkpoint::from_gguf(Path::new("fuzz.input"), data.to_vec()) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return refused(&error),
    };
    for tensor in checkpoint.tensors() {
        let bytes = checkpoint.read_all(tensor).expect("an accepted tensor is all there");
        assert_eq!(bytes.len() as u64, tensor.bytes);
    }
    for entry in checkpoint.metadata().entries() {
        let offset = entry.offset.expect("a value of a file has a place");
        assert!(offset < data.len() as u64 && entry.value.to_string().len() < 2 * data.len() + 64);
    }
    // A tokenizer costs as much as a hundred headers: a sample of the accepted files builds one.
    let sample = data.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)).is_multiple_of(32);
    match VocabSource::read(&checkpoint) {
        Ok(Some(source)) if sample => {
            drop(Tokenizer::new(source, checkpoint.path()).map_err(|e| refused(&e)));
        }
        Ok(_) => {}
        Err(error) => drop(refused(&error)),
    }
    let options = PlanOptions { capacity: 8, kv: KvType::F16 };
    if let Err(error) = arch::record(&checkpoint, options) {
        refused(&error);
    }
    true
}

/// Tokenizer metadata and a text. The first line holds choices, then come tokens up to an empty
/// line, merges up to another, and the text.
pub(crate) fn tokenizer(data: &[u8]) -> bool {
    let mut lines = data.split(|b| *b == b'\n');
    let choices = lines.next().unwrap_or_default();
    let choice = |i: usize| choices.get(i).copied().unwrap_or(0);
    let text = |line: &[u8]| String::from_utf8_lossy(line).into_owned();
    let tokens: Vec<String> = lines.by_ref().take_while(|l| !l.is_empty()).map(text).collect();
    let merges = lines.by_ref().take_while(|l| !l.is_empty()).map(text).collect();
    let rest = lines.collect::<Vec<_>>().join(&b'\n');
    let id = |i: usize| match choice(i) {
        b'-' => Some(u32::MAX),
        b' ' | 0 => None,
        b => Some(u32::from(b).wrapping_sub(u32::from(b'0'))),
    };
    let count = tokens.len() + usize::from(choice(7)) % 3;
    let source = VocabSource {
        model: if choice(0).is_multiple_of(2) { "gpt2" } else { "llama" }.to_owned(),
        pre: ["default", "smollm", "qwen2", "llama-bpe", "odd"]
            .get(usize::from(choice(1)) % 6)
            .map(|p| (*p).to_owned()),
        token_types: (choice(8) % 2 == 1)
            .then(|| (0..count).map(|i| i32::from(choice(9 + i % 16)) % 8).collect()),
        scores: (choice(8) % 4 > 1)
            .then(|| (0..count).map(|i| f32::from(choice(9 + i % 16)) - 64.0).collect()),
        tokens,
        merges,
        bos: id(2),
        eos: id(3),
        eot: id(4),
        unknown: id(5),
        add_bos: (choice(6) % 3 > 0).then_some(choice(6) % 3 == 1),
        add_space_prefix: (choice(6) % 5 > 2).then_some(choice(6) % 5 == 3),
        chat_template: None,
        specials_swallow_space: choice(6) % 7 == 2,
    };
    let tokenizer = match Tokenizer::new(source, Path::new("fuzz.input")) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return refused(&error),
    };
    let rest = String::from_utf8_lossy(&rest);
    match tokenizer.encode(&rest, true) {
        Ok(ids) => {
            assert!(ids.iter().all(|id| (*id as usize) < tokenizer.vocab_len()));
            let mut stream = tokenizer.stream();
            ids.iter().for_each(|id| drop(stream.push(*id)));
            drop(tokenizer.decode(&ids));
        }
        Err(error) => drop(refused(&error)),
    }
    true
}

/// What `safetensors` puts beside its input: one layer, 4 wide, 3 tokens.
pub(crate) const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 4,
"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
"intermediate_size": 4, "vocab_size": 3, "max_position_embeddings": 8, "rms_norm_eps": 1e-5,
"rope_theta": 10000.0, "tie_word_embeddings": true, "torch_dtype": "float32"}"#;

/// A folder whose `model.safetensors` this is: opened, every tensor read, its plan recorded.
pub(crate) fn safetensors(data: &[u8]) -> bool {
    let folder = std::env::temp_dir().join(format!("{}.fuzz.input", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for the input");
    std::fs::write(folder.join("config.json"), CONFIG).expect("room for the input");
    std::fs::write(folder.join("model.safetensors"), data).expect("room for the input");
    let checkpoint = match Checkpoint::open(&folder) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return refused(&error),
    };
    for tensor in checkpoint.tensors() {
        let bytes = checkpoint.read_all(tensor).expect("an accepted tensor is all there");
        assert_eq!(bytes.len() as u64, tensor.bytes);
    }
    let options = PlanOptions { capacity: 8, kv: KvType::F16 };
    if let Err(error) = arch::record(&checkpoint, options) {
        refused(&error);
    }
    true
}

/// A chat template over two turns.
pub(crate) fn chat_template(data: &[u8]) -> bool {
    let template = String::from_utf8_lossy(data);
    let turns = [Message::new("system", "Be brief."), Message::new("user", "{{ Hi }}")];
    let chat = ChatContext { bos: "<s>", eos: "</s>", add_generation_prompt: true, now: 1 };
    match render_chat(&template, &turns, chat, Path::new("fuzz.input"), "chat_template") {
        Ok(text) => text.len() < 1 << 30,
        // The template's own words to the user name no file.
        Err(Error::Usage(_)) => true,
        Err(error) => refused(&error),
    }
}

/// A result file, each row judged against the first.
pub(crate) fn result_json(data: &[u8]) -> bool {
    match compare::rows(Path::new("fuzz.input"), &String::from_utf8_lossy(data)) {
        Err(error) => refused(&error),
        Ok(rows) => {
            // A comparison draws thousands of samples: one tells as much as all.
            if let [base, .., new] | [base @ new] = &rows[..] {
                let judged = compare::compare(base, new, 5.0);
                assert!(judged.ms.0 > 0.0 && judged.ms.1 > 0.0);
            }
            true
        }
    }
}
