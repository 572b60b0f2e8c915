//! Holds the tree to its own rules: the order of the layers, the size of files, where `unsafe` and
//! the environment are touched, how kernels are called, and what the README promises.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests.

use decode_graph::arch::SUPPORTED;
use decode_graph::cuda::kernels::{modules, ptx};
use decode_graph::quant::QuantFormat;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Modules of the library, lowest first: each may import those before it and no other.
const LAYERS: [&str; 13] = [
    "error",
    "quant",
    "checkpoint",
    "tokenizer",
    "ops",
    "plan",
    "arch",
    "engine",
    "reference",
    "cuda",
    "session",
    "verify",
    "bench",
];

/// Files, and folders by their `/`, that may hold `unsafe`.
const UNSAFE: [&str; 11] = [
    "src/cuda/driver/",
    "src/cuda/issue.rs",
    "tests/capture_rules.rs",
    "tests/counting_allocator/",
    "tests/driver_seam.rs",
    "tests/failing_storage/",
    "tests/fake_driver/",
    "tests/gpu_driver.rs",
    "tests/host_kernels.rs",
    "tests/host_shim/",
    "tests/surroundings.rs",
];

/// The one file that reads the environment.
const ENVIRONMENT: &str = "src/bin/decode-bench/environment.rs";

/// Lines of a source file, at most.
const MOST_LINES: usize = 600;

/// Folders and files of the root that are not ours, or not sources.
const NOT_SOURCES: [&str; 6] = [".git", ".cuda", ".venv", "target", "shared", "Cargo.lock"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let of_root = path.parent() == Some(root());
        if (of_root && NOT_SOURCES.contains(&&*name)) || path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            walk(&path, found);
        } else if !name.ends_with(".gguf") {
            found.push(path);
        }
    }
}

/// Every text file whose path ends in one of `endings` (all where there are none): its path in the
/// repository, and its text.
fn texts(endings: &[&str]) -> Vec<(String, String)> {
    let mut files = Vec::new();
    walk(root(), &mut files);
    let named = files.into_iter().map(|path| {
        let name = path.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/");
        (name, path)
    });
    named
        .filter(|(name, _)| endings.is_empty() || endings.iter().any(|end| name.ends_with(end)))
        .filter_map(|(name, path)| Some((name, std::fs::read_to_string(path).ok()?)))
        .collect()
}

/// `(line number, line)` of Rust text, without comments.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().zip(1..).filter_map(|(line, n)| {
        let line = line.split("//").next().unwrap_or_default();
        (!line.trim().is_empty()).then_some((n, line))
    })
}

fn identifier(text: &str) -> &str {
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_'));
    &text[..end.unwrap_or(text.len())]
}

/// Whether `word` stands alone in `line`.
fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let alone = |c: Option<char>| c.is_none_or(|c| !(c.is_alphanumeric() || c == '_'));
        alone(line[..at].chars().next_back()) && alone(line[at + word.len()..].chars().next())
    })
}

/// Modules of the crate that Rust text names: `crate::a::b`, `use crate::{a::b, c}`.
fn imports(text: &str) -> Vec<(usize, String)> {
    let whole: String = code(text).flat_map(|(_, line)| [line, "\n"]).collect();
    let numbers: Vec<usize> = code(text).map(|(n, _)| n).collect();
    let mut found = Vec::new();
    for (at, prefix) in whole.match_indices("crate::") {
        if whole[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let line = numbers[whole[..at].matches('\n').count()];
        let rest = &whole[at + prefix.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            found.push((line, identifier(rest).to_owned()));
            continue;
        };
        // The first name after the opening brace and after every comma of this depth.
        let (mut depth, mut fresh) = (1, true);
        for (i, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => fresh = true,
                c if fresh && c.is_alphabetic() => {
                    found.push((line, identifier(&group[i..]).to_owned()));
                    fresh = false;
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    found
}

#[test]
fn the_import_parser_sees_paths_groups_and_no_comments() {
    let text = "use crate::{a::{x, y}, b,\n c::z};\nlet q = crate::d::e(); // crate::f\n//! crate::g\npub(crate) fn h() {}";
    let found = imports(text);
    let expected = [(1, "a"), (1, "b"), (1, "c"), (3, "d")].map(|(n, m)| (n, m.to_owned()));
    assert_eq!(found, expected);
}

#[test]
fn imports_run_downward_only() {
    let mut wrong = Vec::new();
    for (path, text) in texts(&[".rs"]) {
        let Some(inside) = path.strip_prefix("src/") else { continue };
        let module = inside.split('/').next().unwrap().trim_end_matches(".rs");
        if module == "bin" || module == "lib" {
            continue;
        }
        let own = LAYERS.iter().position(|l| *l == module);
        let own = own.unwrap_or_else(|| panic!("{path}: give `{module}` a place in LAYERS"));
        for (line, target) in imports(&text) {
            // What is no module is a re-export or a macro of the root: there are none.
            let rank = LAYERS.iter().position(|l| *l == target);
            if rank.is_none_or(|rank| rank > own) {
                wrong.push(format!("{path}:{line}: {module} imports {target}"));
            }
        }
        for (line, text) in code(&text) {
            // The crate's root reached by `super` would escape the check above.
            if LAYERS.iter().any(|l| has_word(text, &format!("super::{l}"))) {
                wrong.push(format!("{path}:{line}: say `crate::`, not `super::`, of a layer"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn source_files_are_of_readable_size() {
    let long: Vec<_> = texts(&[".rs", ".cu", ".cuh", ".sh"])
        .into_iter()
        .map(|(path, text)| (path, text.lines().count()))
        .filter(|(_, lines)| *lines > MOST_LINES)
        .collect();
    assert!(long.is_empty(), "more than {MOST_LINES} lines: {long:?}");
}

#[test]
fn unsafe_stands_only_in_the_listed_files() {
    let mut wrong = Vec::new();
    for (path, text) in texts(&[".rs"]) {
        if path == "tests/tidy.rs"
            || UNSAFE.iter().any(|f| path == *f || f.ends_with('/') && path.starts_with(f))
        {
            continue;
        }
        wrong.extend(
            code(&text)
                .filter(|(_, line)| has_word(line, "unsafe") || line.contains("allow(unsafe"))
                .map(|(n, line)| format!("{path}:{n}: {}", line.trim())),
        );
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_environment_is_read_in_one_place() {
    // `env!` of Cargo's own variables is read when the crate is built; so is the one commit below. A tool that runs
    // prebuilt tests (scripts/sanitize.sh) can hand them a folder of kernels in no other way.
    let reads = ["env::var", "env::vars", "var_os(", "from_env(", "getenv", "option_env!"];
    let at_build = "option_env!(\"DECODE_GRAPH_COMMIT\")";
    let sanitized = ("tests/few_tokens/mod.rs", "std::env::var_os(\"KERNELS\")");
    let mut wrong = Vec::new();
    for (path, text) in texts(&[".rs"]) {
        if path == ENVIRONMENT || path == "tests/tidy.rs" {
            continue;
        }
        wrong.extend(
            code(&text)
                .map(|(n, line)| (n, line.replace(at_build, "")))
                .map(|(n, line)| match path == sanitized.0 {
                    true => (n, line.replacen(sanitized.1, "", 1)),
                    false => (n, line),
                })
                .filter(|(_, line)| {
                    reads.iter().any(|read| line.contains(read))
                        || line.contains("env!(\"") && !line.contains("env!(\"CARGO")
                })
                .map(|(n, line)| format!("{path}:{n}: {}", line.trim())),
        );
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let one = std::fs::read_to_string(root().join(ENVIRONMENT)).unwrap();
    assert!(one.contains("env::var_os(\"GPU_DEBUG\")"));
}

/// Entry points of the committed PTX.
fn kernels() -> BTreeSet<String> {
    let texts = modules().flat_map(|m| [(8, 0), (9, 0)].map(|compute| ptx(m, compute).unwrap()));
    let entries = texts.flat_map(|text| text.split(".entry ").skip(1));
    entries.map(|rest| identifier(rest).to_owned()).collect()
}

/// Whether `name` is numbered: what is left without the words for types and the names of
/// architectures has a digit.
fn numbered(name: &str) -> bool {
    let types = QuantFormat::ALL.map(QuantFormat::suffix);
    let mut rest = format!("_{name}_");
    for known in types.iter().copied().chain(SUPPORTED).chain(["sm80", "sm90", "u32"]) {
        // Twice, since neighbours share an underscore.
        for _ in 0..2 {
            rest = rest.replace(&format!("_{known}_"), "_");
        }
    }
    rest.contains(|c: char| c.is_ascii_digit())
}

#[test]
fn no_kernel_or_source_is_named_by_a_version() {
    assert!(numbered("down_q4_k_v2") && numbered("gemv2") && !numbered("qkv_q4_k_q6_k"));
    let kernels = kernels();
    assert!(kernels.len() > 50, "only {} kernels", kernels.len());
    let numbers: Vec<_> = kernels.into_iter().filter(|name| numbered(name)).collect();
    assert!(numbers.is_empty(), "kernels: {numbers:?}");
    let sources = texts(&[".rs", ".cu", ".cuh", ".ptx"]);
    let files: Vec<_> = sources
        .iter()
        .map(|(path, _)| path.as_str())
        .filter(|path| path.starts_with("src/") || path.starts_with("ptx/"))
        .filter(|path| numbered(&path.replace(['/', '.', '-'], "_")))
        .collect();
    assert!(files.is_empty(), "files: {files:?}");
}

#[test]
fn no_text_names_a_path_of_the_machine_it_was_written_on() {
    let paths = ["work", "home", "root"].map(|folder| format!("/{folder}/"));
    let wrong: Vec<_> = texts(&[])
        .into_iter()
        .filter(|(_, text)| paths.iter().any(|p| text.contains(p)))
        .map(|(path, _)| path)
        .collect();
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn every_op_has_a_kernel_of_its_name_in_the_ptx_and_in_a_source() {
    let kernels = kernels();
    let sources: String = texts(&[".cu"]).into_iter().map(|(_, text)| text).collect();
    let mut ops = 0;
    for (path, text) in texts(&[".rs"]) {
        if !path.starts_with("src/ops/") || path == "src/ops/mod.rs" {
            continue;
        }
        for body in text.split("fn name(&self) -> &'static str {").skip(1) {
            let body = body.split("fn ").next().unwrap();
            // Every second piece between quotes is a literal.
            for name in body.split('"').skip(1).step_by(2) {
                let named = |k: &String| k == name || k.starts_with(&format!("{name}_"));
                assert!(kernels.iter().any(named), "{path}: the PTX has no kernel {name}");
                let written = sources.contains(name);
                assert!(written, "{path}: no .cu file says {name}");
                ops += 1;
            }
        }
    }
    assert!(ops >= 14, "only {ops} ops found");
}

/// The one command of the first code block under the heading `title`.
fn command(readme: &str, title: &str) -> String {
    let under = readme.split(&format!("\n## {title}\n")).nth(1).unwrap();
    let block = under.split("```").nth(1).unwrap();
    let lines: Vec<_> = block.lines().skip(1).collect();
    assert_eq!(lines.len(), 1, "{title}: one command, not {lines:?}");
    lines[0].to_owned()
}

#[test]
fn the_commands_of_the_readme_are_those_that_ci_runs() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let ci = std::fs::read_to_string(root().join(".ci/run")).unwrap();
    for title in ["Run", "Test"] {
        let command = command(&readme, title);
        // Whole: a line that only begins like it is another command.
        let mut lines = ci.lines().map(|line| line.trim_end_matches('\''));
        let runs = lines.any(|line| !line.starts_with('#') && line.ends_with(&command));
        assert!(runs, ".ci/run does not run `{command}`");
    }
}
