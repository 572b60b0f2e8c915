use super::*;

fn pieces<'t>(pre: &str, text: &'t str) -> Vec<&'t str> {
    assert!(FAMILIES.iter().any(|f| f.names.contains(&pre)), "{pre} is not in the table");
    Splitter::new(named(Some(pre)).unwrap()).unwrap().split(text)
}

/// Checks `text`, given as its pieces with a bar between each.
#[track_caller]
fn check(pre: &str, barred: &str) {
    let text = barred.replace('|', "");
    assert_eq!(pieces(pre, &text).join("|"), barred, "{pre}");
}

fn named(pre: Option<&str>) -> Result<&'static Family> {
    family(pre, Path::new("x.gguf"))
}

#[test]
fn llama_bpe_takes_up_to_three_digits_and_contractions_in_any_case() {
    for pre in ["llama-bpe", "falcon3", "lfm2"] {
        check(pre, "I|'M| |123|456|7| apples|,| don|'t|  | stop|\n\n|x");
        check(pre, "a|.\n\n|\t|\tb| (|c|)|   ");
        check(pre, "x|  \n \n|  | y");
        check(pre, "n| cafe|\u{301}s");
    }
    let row = named(Some("llama-bpe")).unwrap();
    assert!(row.ignore_merges && row.add_bos);
}

#[test]
fn qwen2_takes_single_digits() {
    check("qwen2", "I|'LL| |1|2|3| apples|!!\n|   | z");
    check("qwen2", "@user| _|name|\u{3000}| 中文|，好");
    assert!(!named(Some("qwen2")).unwrap().ignore_merges);
}

#[test]
fn qwen35_keeps_combining_marks_with_their_letters() {
    check("qwen35", "cafe\u{301}s| |4|2| \u{301}x");
    check("qwen2", "cafe|\u{301}s| |4|2| \u{301}|x");
}

#[test]
fn smollm_takes_digits_first_so_no_space_joins_them() {
    for pre in ["smollm", "starcoder", "command-r", "minerva-7b"] {
        check(pre, "It|'s| |1|0|0| degrees|.|\n\n  | Next| line|  ");
        check(pre, "a|  |5| IT|'|S");
    }
}

#[test]
fn gpt2_joins_a_space_with_words_numbers_and_symbols() {
    for pre in ["gpt-2", "olmo", "mpt"] {
        check(pre, "It|'s| 100| degrees|...|\n|\n|Next|   | one| --| two|\u{a0}|\u{a0}|x");
        check(pre, "don|'t| DON|'|T| 3|rd| ½²|\t");
    }
}

#[test]
fn default_takes_punctuation_first_and_triples_of_digits_last() {
    check("default", "a|+|b| |=>| c|;| |123|45| |678|9| it|'|s");
    // The number stage sees " 12345" as one piece of the GPT-2 stage.
    assert_eq!(pieces("default", " 123456"), [" ", "123", "456"]);
}

#[test]
fn tekken_splits_at_case_and_takes_single_digits() {
    check("tekken", "Camel|Case|HTTPServer| |4|2| can|'t| a|://|b|\n|  | X");
    let row = named(Some("tekken")).unwrap();
    assert!(row.ignore_merges && row.add_bos);
}

#[test]
fn gpt_4o_splits_at_case_and_keeps_contractions_with_the_word() {
    for pre in ["gpt-4o", "llama4"] {
        check(pre, "Camel|Case| can't| IT'S| |123|45| a|/b|\n\n|x");
    }
}

#[test]
fn deepseek_sets_differ_in_numbers_and_han() {
    check("deepseek-llm", "Hi| there|,|\n|\n|中文| |12345|  ");
    check("deepseek-coder", "Hi| there|,|\n|\n|中文| |1|2|3");
    check("deepseek-v3", "Hi| there|,\n\n|中文|12|.x| |123|45| a|  | b");
    // U+01BB is a letter without case: not in the letter list of deepseek-llm. The punctuation
    // that follows there spans ':' to '~', which cuts ASCII letters out of a mixed word.
    check("deepseek-llm", "\u{1bb}|\u{1f0}é| na|ï|ve");
}

#[test]
fn every_pattern_compiles_and_loses_no_text() {
    let text = "I'M x\u{0} \t\r\n\r\n 12345 é\u{301}ß ǅ 中文かな 한글 🙂👍🏽 \u{85}\u{a0}\u{2028}<|>'s  \n  ";
    for row in FAMILIES {
        let splitter = Splitter::new(row).unwrap();
        for from in text.char_indices().map(|(at, _)| at) {
            let pieces = splitter.split(&text[from..]);
            assert_eq!(pieces.concat(), text[from..], "{:?}", row.names);
            assert!(pieces.iter().all(|piece| !piece.is_empty()));
        }
        assert!(splitter.split("").is_empty());
    }
}

#[test]
fn no_name_is_in_two_rows() {
    let names: Vec<_> = FAMILIES.iter().flat_map(|row| row.names).collect();
    let unique: std::collections::HashSet<_> = names.iter().collect();
    assert_eq!(names.len(), unique.len());
}

#[test]
fn an_absent_name_is_split_as_default_and_an_unknown_one_refused() {
    assert_eq!(named(None).unwrap().names, [DEFAULT]);
    let refusal = named(Some("no-such-splitter")).unwrap_err();
    assert_eq!(refusal.exit_code(), 4);
    assert!(refusal.to_string().contains("no-such-splitter"), "{refusal}");
}

/// Every name that llama.cpp has for the architectures that are served or being added.
#[test]
fn every_published_name_of_the_families_has_a_row() {
    for name in [
        "default",
        "llama-bpe",
        "llama3",
        "llama-v3",
        "smollm",
        "tekken",
        "pixtral",
        "falcon3",
        "qwen2",
        "deepseek-r1-qwen",
        "qwen35",
        "gpt-2",
        "phi-2",
        "gpt-4o",
        "llama4",
        "dbrx",
        "smaug-bpe",
        "starcoder",
        "refact",
        "command-r",
        "exaone",
        "olmo",
        "mpt",
        "deepseek-llm",
        "deepseek-coder",
        "deepseek-v3",
    ] {
        assert!(named(Some(name)).is_ok(), "{name}");
    }
}

/// Handing white space back must give what the published look-ahead gives.
#[test]
fn handing_back_equals_the_published_look_ahead() {
    let published = [
        (
            "llama-bpe",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        ("gpt-2", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
    ];
    let letters = ['a', ' ', '\n', '\t', '1', '.', '\u{a0}'];
    for (pre, pattern) in published {
        let regex = SysRegex::new(pattern).unwrap();
        let splitter = Splitter::new(named(Some(pre)).unwrap()).unwrap();
        for mut code in 0..letters.len().pow(6) {
            let text: String = (0..6)
                .map(|_| {
                    let letter = letters[code % letters.len()];
                    code /= letters.len();
                    letter
                })
                .collect();
            let expected: Vec<_> = regex.find_iter(&text).map(|(a, b)| &text[a..b]).collect();
            assert_eq!(splitter.split(&text), expected, "{pre} {text:?}");
        }
    }
}

#[test]
fn long_runs_are_split_in_linear_time() {
    let runs = [
        "Z".repeat(131_072),
        "\n".repeat(100_000),
        " ".repeat(1_100_000) + "x",
        " \n".repeat(100_000) + " x",
        "a ".repeat(100_000),
        "'".repeat(131_072),
        "7".repeat(131_072),
        "\u{0}".repeat(131_072),
        "\u{301}".repeat(100_000),
    ];
    for row in FAMILIES {
        let splitter = Splitter::new(row).unwrap();
        for run in &runs {
            let start = std::time::Instant::now();
            let total: usize = splitter.split(run).iter().map(|piece| piece.len()).sum();
            assert_eq!(total, run.len());
            let seconds = start.elapsed().as_secs_f64();
            assert!(seconds < 1.0, "{:?}: {seconds} s for {:?}", row.names, &run[..4]);
        }
    }
}
