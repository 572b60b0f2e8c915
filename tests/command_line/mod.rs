//! Running `decode-bench` as a user does, and looking at how it ended.

#![allow(dead_code, clippy::unwrap_used)] // each test uses its part

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The binary, on a machine that shows no GPU.
pub(crate) fn command(line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_decode-bench"));
    command.args(line.split_whitespace());
    command.env("CUDA_VISIBLE_DEVICES", "").env_remove("GPU_DEBUG").env_remove("RUST_LOG");
    command
}

pub(crate) fn decode_bench(line: &str) -> Output {
    command(line).output().unwrap()
}

pub(crate) fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// stdout of a line that must succeed.
pub(crate) fn stdout(line: &str) -> String {
    let output = decode_bench(line);
    assert_eq!(code(&output), 0, "{line}: {}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn json(line: &str) -> Value {
    serde_json::from_str(&stdout(line)).unwrap()
}

/// A line that must fail with `expected`, one line of explanation, and nothing on stdout.
pub(crate) fn failure(line: &str, expected: i32) -> String {
    let output = decode_bench(line);
    let said = stderr(&output);
    assert_eq!(code(&output), expected, "{line}: {said}");
    assert!(output.stdout.is_empty(), "{line} printed data");
    assert!(said.starts_with("error: ") && !said.contains("panicked"), "{line}: {said}");
    said
}

/// As [`failure`], for errors of a model: the file is named, in one line.
pub(crate) fn refused(path: &Path, expected: i32) -> String {
    let said = failure(&format!("run --backend cpu -n 1 -m {}", path.display()), expected);
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains(&*path.file_name().unwrap().to_string_lossy()), "{said}");
    said
}

/// A folder, and the tiny model in it.
pub(crate) fn tiny_file(quant: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    stdout(&format!("synth tiny:{quant} -o {}", path.display()));
    (folder, path)
}

/// Where `pattern` ends in `bytes`.
pub(crate) fn after(bytes: &[u8], pattern: &str) -> usize {
    let at = bytes.windows(pattern.len()).position(|w| w == pattern.as_bytes());
    at.unwrap_or_else(|| panic!("{pattern} is not in the file")) + pattern.len()
}

pub(crate) const QUICK: &str = "--synthetic tiny --backend cpu --no-warmup -r 2 -n 4";
