//! Conversations and folders of safetensors on the command line.

#![allow(clippy::unwrap_used)]

mod command_line;

use command_line::*;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

/// A folder with a small model of `transformers`, a tokenizer of a few pieces, and this template.
fn chat_folder(template: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/transformers/qwen2");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden.join(file), folder.path().join(file)).unwrap();
    }
    let vocab =
        serde_json::json!({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "ab": 5, "u": 6});
    let special = |id, content| {
        serde_json::json!({"id": id, "content": content, "special": true, "single_word": false,
                           "lstrip": false, "rstrip": false, "normalized": false})
    };
    let tokenizer = serde_json::json!({
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
        "model": {"type": "BPE", "unk_token": "<unk>", "vocab": vocab, "merges": ["a b"]},
    });
    let config =
        serde_json::json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true});
    for (file, text) in [
        ("tokenizer.json", tokenizer.to_string()),
        ("tokenizer_config.json", config.to_string()),
        ("chat_template.jinja", template.to_owned()),
    ] {
        std::fs::write(folder.path().join(file), text).unwrap();
    }
    folder
}

fn chat(folder: &Path, more: &str) -> Output {
    let path = folder.display();
    decode_bench(&format!("generate -m {path} --backend cpu -n 3 -o json --chat -p ab {more}"))
}

#[test]
fn a_conversation_is_rendered_by_the_models_own_template() {
    let folder = chat_folder(
        "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}{{ m.content }}{{ eos_token }}{% endfor %}",
    );
    let ids = |more: &str| {
        let output = chat(folder.path(), more);
        assert_eq!(code(&output), 0, "{}", stderr(&output));
        let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        said["prompt_ids"].clone()
    };
    assert_eq!(ids(""), serde_json::json!([1, 6, 5, 2]));
    // "s" is no piece.
    assert_eq!(ids("--system b"), serde_json::json!([1, 0, 4, 2, 6, 5, 2]));
    let refusing = chat_folder("{{ raise_exception('no turns today') }}");
    let output = chat(refusing.path(), "");
    assert_eq!(code(&output), 2);
    assert!(stderr(&output).contains("no turns today"), "{}", stderr(&output));
}

/// Lists that hold one another twice: to print or compare them is one instruction and takes for ever.
#[test]
fn a_template_that_takes_for_ever_is_given_up() {
    let twice = "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}\
                 {% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}";
    let sums = "{% set ns = namespace(x=[1]) %}{% for i in range(64) %}\
                {% set ns.x = ns.x + ns.x %}{% endfor %}";
    for (given, rest) in [
        (twice, "{{ ns.x }}"),
        (twice, "{{ ns.x == ns.y }}"),
        (twice, "{{ ns.x | tojson }}"),
        (twice, "{{ (ns.x ~ '') | length }}"),
        (sums, "{{ ns.x | length }}"),
    ] {
        let folder = chat_folder(&format!("{given}{rest}"));
        let start = Instant::now();
        let output = chat(folder.path(), "");
        assert_eq!(code(&output), 3, "{rest}: {}", stderr(&output));
        assert!(start.elapsed() < Duration::from_secs(10), "{rest}: {:?}", start.elapsed());
        let said = stderr(&output);
        assert!(
            said.contains("more time or memory") && said.contains("chat_template.jinja"),
            "{said}"
        );
    }
}

#[test]
fn inspect_explains_a_folder_and_what_a_token_reads() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/transformers");
    let said = stdout(&format!("inspect -m {}", golden.join("llama").display()));
    for part in
        ["safetensors in 2 files", "architecture llama", "supported    yes", "tensors      F32: "]
    {
        assert!(said.contains(part), "{part}: {said}");
    }
    // All of 78464 bytes but 63 of the 64 rows of the embeddings.
    assert!(said.contains("read a token 70400 bytes"), "{said}");
    let other = chat_folder("");
    let config = std::fs::read_to_string(other.path().join("config.json")).unwrap();
    std::fs::write(other.path().join("config.json"), config.replace("\"qwen2\"", "\"gpt_neox\""))
        .unwrap();
    let said = stdout(&format!("inspect -m {}", other.path().display()));
    for part in ["architecture gpt_neox", "read a token ", "supported    no: ", "known are llama"] {
        assert!(said.contains(part), "{part}: {said}");
    }
}
