use std::path::Path;

use super::*;

/// All bytes in the byte alphabet, then a few words and special tokens.
fn source() -> VocabSource {
    let alphabet = Alphabet::new();
    let mut tokens: Vec<String> = (0..=u8::MAX)
        .map(|byte| {
            let spelled = (0u32..0x144).filter_map(char::from_u32);
            spelled.map(String::from).find(|c| alphabet.bytes(c) == Some(vec![byte])).unwrap()
        })
        .collect();
    let words = ["he", "ll", "hell", "hello", "Ġhello"];
    let control = ["<|endoftext|>", "<|im_end|>", "<s>"];
    tokens.extend(words.iter().chain(&control).map(|&text| text.to_owned()));
    let mut token_types = vec![1; 256 + words.len()];
    token_types.extend([3; 3]);
    VocabSource {
        model: "gpt2".to_owned(),
        pre: Some("gpt-2".to_owned()),
        tokens,
        token_types: Some(token_types),
        merges: ["h e", "l l", "he ll", "hell o", "Ġ hello"].map(str::to_owned).to_vec(),
        bos: Some(263),
        eos: Some(261),
        ..VocabSource::default()
    }
}

fn build(source: VocabSource) -> Result<Tokenizer> {
    Tokenizer::new(source, Path::new("tiny.gguf"))
}

#[track_caller]
fn refused(source: VocabSource, key: &str, class: Defect) -> String {
    let error = build(source).unwrap_err();
    match &error {
        Error::InvalidModel { at, defect, .. } => {
            assert_eq!((at.as_str(), *defect), (key, class), "{error}");
        }
        other => panic!("{other}"),
    }
    error.to_string()
}

#[test]
fn pairs_are_joined_by_rank_and_special_tokens_are_parsed() {
    let t = build(source()).unwrap();
    assert_eq!(t.encode("hello hello", false).unwrap(), [259, 260]);
    assert_eq!(t.encode("hell<|im_end|>he", false).unwrap(), [258, 262, 256]);
    assert_eq!(t.encode("", true).unwrap(), Vec::<u32>::new());
    assert_eq!(t.vocab_len(), 264);
    assert_eq!((t.bos(), t.eos()), (Some(263), Some(261)));
}

#[test]
fn bos_is_added_only_when_asked_for_and_the_model_wants_it() {
    let with = build(VocabSource { add_bos: Some(true), ..source() }).unwrap();
    assert_eq!(with.encode("he", true).unwrap(), [263, 256]);
    assert_eq!(with.encode("he", false).unwrap(), [256]);
    let llama = build(VocabSource { pre: Some("llama-bpe".to_owned()), ..source() }).unwrap();
    assert_eq!(llama.encode("he", true).unwrap(), [263, 256]);
    let none = VocabSource { bos: Some(u32::MAX), add_bos: Some(true), ..source() };
    assert_eq!(build(none).unwrap().encode("he", true).unwrap(), [256]);
}

#[test]
fn a_piece_that_is_a_token_ignores_the_merges_where_the_family_says_so() {
    let without_last_merge = |pre: &str| {
        let mut s = source();
        s.merges.truncate(3);
        build(VocabSource { pre: Some(pre.to_owned()), ..s }).unwrap()
    };
    assert_eq!(without_last_merge("llama-bpe").encode("hello", false).unwrap(), [259]);
    assert_eq!(without_last_merge("gpt-2").encode("hello", false).unwrap(), [258, 111]);
}

#[test]
fn generation_ends_at_eos_eot_and_known_spellings() {
    let t = build(VocabSource { eot: Some(5), ..source() }).unwrap();
    let ends: Vec<u32> = (0..300).filter(|&id| t.is_end_of_generation(id)).collect();
    assert_eq!(ends, [5, 261, 262]);
    let none = build(VocabSource { eos: Some(u32::MAX), ..source() }).unwrap();
    assert_eq!(none.eos(), None);
    assert!(!none.is_end_of_generation(u32::MAX));
}

#[test]
fn an_end_of_turn_marked_as_ordinary_text_is_still_parsed() {
    let mut s = source();
    s.token_types.as_mut().unwrap()[262] = 1;
    assert_eq!(build(s).unwrap().encode("<|im_end|>", false).unwrap(), [262]);
}

#[test]
fn lists_that_cannot_be_used_are_refused_by_key() {
    let bad = Defect::BadVocab;
    let (tokens, types, scores, merges) = (
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.scores",
        "tokenizer.ggml.merges",
    );
    refused(VocabSource { tokens: Vec::new(), ..source() }, tokens, bad);
    refused(VocabSource { token_types: Some(vec![1; 263]), ..source() }, types, bad);
    refused(VocabSource { scores: Some(vec![0.0; 263]), ..source() }, scores, bad);
    refused(VocabSource { merges: Vec::new(), ..source() }, merges, bad);
    let mut long = source();
    long.tokens[7] = "Z".repeat(1 << 20);
    assert!(refused(long, tokens, bad).contains("token 7 has 1048576 bytes"));
    // Longer lists are common and harmless.
    build(VocabSource { scores: Some(vec![0.0; 300]), ..source() }).unwrap();
}

#[test]
fn ids_outside_the_vocabulary_are_refused_by_key_also_when_they_are_defaults() {
    let bad = Defect::BadValue;
    let (bos, eos, eot, unknown) = (
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.eot_token_id",
        "tokenizer.ggml.unknown_token_id",
    );
    refused(VocabSource { bos: Some(264), ..source() }, bos, bad);
    refused(VocabSource { eos: Some(1 << 31), ..source() }, eos, bad);
    refused(VocabSource { eot: Some(264), ..source() }, eot, bad);
    refused(VocabSource { unknown: Some(264), ..source() }, unknown, bad);
    let tiny = |bos, eos| VocabSource {
        tokens: ["a", "b", "ab"].map(str::to_owned).to_vec(),
        merges: vec!["a b".to_owned()],
        token_types: None,
        bos,
        eos,
        ..source()
    };
    assert!(refused(tiny(None, Some(0)), bos, bad).contains("default, id 11"));
    refused(tiny(Some(0), None), eos, bad);
    let untyped = build(tiny(Some(0), Some(1))).unwrap();
    assert_eq!(untyped.encode("ab", false).unwrap(), [0, 1], "BOS and EOS are special tokens");
}

#[test]
fn other_models_are_unsupported_by_name() {
    for model in ["bert", "t5", "rwkv", "none", ""] {
        let error = build(VocabSource { model: model.to_owned(), ..source() }).unwrap_err();
        assert!(matches!(&error, Error::Unsupported { at, what, .. }
            if at == "tokenizer.ggml.model" && what.contains(model)));
        assert_eq!(error.exit_code(), 4);
    }
}

#[test]
fn merges_that_are_malformed_absent_repeated_or_cyclic_are_passed_over() {
    let mut s = source();
    let good = std::mem::take(&mut s.merges);
    for odd in ["", " ", "x", "hello", "he  ll", "zz zz", "o hell", "ll he", " ll"] {
        s.merges.push(odd.to_owned());
    }
    s.merges.extend(good);
    s.merges.push("he ll".to_owned());
    assert_eq!(build(s).unwrap().encode("hello", false).unwrap(), [259]);
}

#[test]
fn a_million_merges_of_one_pair_end() {
    let mut s = source();
    s.merges.extend(std::iter::repeat_n("h e".to_owned(), 1_000_000));
    let start = std::time::Instant::now();
    assert_eq!(build(s).unwrap().encode("hello", false).unwrap(), [259]);
    assert!(start.elapsed().as_secs_f64() < 2.0, "{:?}", start.elapsed());
}

#[test]
fn of_equal_texts_the_first_id_counts_and_an_empty_text_matches_nothing() {
    let mut s = source();
    s.tokens.extend(["he", "", "", "<s>"].map(str::to_owned));
    s.token_types.as_mut().unwrap().extend([1, 1, 3, 3]);
    let t = build(s).unwrap();
    assert_eq!(t.encode("he<s>he", false).unwrap(), [256, 263, 256]);
    assert_eq!(t.decode(&[264, 265, 266]), "he");
}

#[test]
fn odd_token_types_are_ordinary_text() {
    let mut s = source();
    for id in [256, 257] {
        s.token_types.as_mut().unwrap()[id] = 255;
    }
    assert_eq!(build(s).unwrap().encode("hell", false).unwrap(), [258]);
}

#[test]
fn a_byte_without_a_token_is_an_error_that_names_it() {
    let mut s = source();
    s.tokens[4] = "absent".to_owned();
    let t = build(s).unwrap();
    let error = t.encode("he\u{4}", false).unwrap_err();
    assert!(matches!(&error, Error::InvalidModel { defect: Defect::BadValue, why, .. }
        if why.contains("0x04")));
    assert_eq!(t.encode("he\u{0}\u{fffd}", false).unwrap(), [256, 0, 0xef, 0xbf, 0xbd]);
}

#[test]
fn an_oversized_chat_template_is_kept_and_not_run() {
    let most = "x".repeat(1 << 20);
    let at_the_limit = VocabSource { chat_template: Some(most), ..source() };
    assert!(build(at_the_limit).unwrap().encode_chat(&[], 0).is_ok());
    let template = "x".repeat((1 << 20) + 1);
    let source = VocabSource { chat_template: Some(template.clone()), ..source() };
    let t = build(source).unwrap();
    assert_eq!(t.chat_template(), Some(template.as_str()));
    let error = t.encode_chat(&[], 0).unwrap_err();
    assert!(matches!(error, Error::InvalidModel { defect: Defect::BadTemplate, .. }), "{error}");
}

#[test]
fn long_prompts_end_within_a_second() {
    let mut s = source();
    // Runs of Z and of line breaks that join as far as doubling goes.
    for unit in ["Z", "Ċ"] {
        for power in 0..10 {
            let half = unit.repeat(1 << power);
            s.tokens.push(half.repeat(2));
            s.token_types.as_mut().unwrap().push(1);
            s.merges.push(format!("{half} {half}"));
        }
    }
    // The costliest special token there is, and prompts that almost match it everywhere.
    s.tokens.push("Z".repeat(special::MAX_SPECIAL_BYTES - 1) + "Y");
    s.token_types.as_mut().unwrap().push(3);
    for pre in ["gpt-2", "llama-bpe", "qwen2", "smollm", "default", "tekken", "gpt-4o"] {
        let t = build(VocabSource { pre: Some(pre.to_owned()), ..s.clone() }).unwrap();
        for prompt in ["Z".repeat(131_072), "\n".repeat(100_000), "<|".repeat(65_536)] {
            let start = std::time::Instant::now();
            let ids = t.encode(&prompt, false).unwrap();
            let seconds = start.elapsed().as_secs_f64();
            assert!(seconds < 1.0, "{pre}: {seconds} s for {:?}", &prompt[..2]);
            assert_eq!(t.decode(&ids), prompt);
        }
    }
}

#[test]
fn a_stream_yields_only_complete_characters() {
    let t = build(source()).unwrap();
    let mut stream = t.stream();
    let bytes = "é🙂".bytes().map(u32::from);
    let texts: Vec<String> = bytes.map(|id| stream.push(id)).collect();
    assert_eq!(texts, ["", "é", "", "", "", "🙂"]);
    assert_eq!(stream.push(259), "hello");
    assert_eq!(stream.push(0xf0), "");
    assert_eq!(stream.finish(), "\u{fffd}");
}

#[test]
fn a_stream_replaces_what_can_never_be_a_character_at_once() {
    let t = build(source()).unwrap();
    let mut stream = t.stream();
    assert_eq!(stream.push(0xff), "\u{fffd}");
    assert_eq!(stream.push(0xf0), "");
    assert_eq!(stream.push(u32::from(b'a')), "\u{fffd}a");
    assert_eq!(stream.push(1_000_000), "\u{fffd}");
    assert_eq!(stream.finish(), "");
}
