#!/usr/bin/env bash
# A target of fuzz/ under libFuzzer without cargo-fuzz and without a sanitizer, for many executions: only
# this crate and the target are instrumented, with their arithmetic and debug assertions checked. Needs
# nightly Rust and a C++ compiler.
#
#   scripts/fuzz.sh TARGET CORPUS [LIBFUZZER_OPTION…]
#
# What is found is kept in CORPUS, which begins with what fuzz/corpus holds; what breaks a promise, in
# the folder that it is called from.
set -euo pipefail

# As cargo's RUSTC_WRAPPER: RUSTC ARGUMENT…
if [ -n "${FUZZ_TARGET:-}" ]; then
    name=
    for ((i = 2; i < $#; i++)); do
        if [ "${!i}" = --crate-name ]; then next=$((i + 1)) name=${!next}; fi
    done
    if [ "$name" = decode_graph ] || [ "$name" = "$FUZZ_TARGET" ]; then
        passes="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4"
        for pass in inline-8bit-counters pc-table trace-compares; do
            passes+=" -Cllvm-args=-sanitizer-coverage-$pass"
        done
        # One argument a word.
        exec "$@" $passes -Cdebug-assertions=on -Coverflow-checks=on --cfg fuzzing
    fi
    exec "$@"
fi

target=${1:?a target of fuzz/} corpus=${2:?folder for the corpus}
shift 2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
built=${CARGO_TARGET_DIR:-$here/../target/fuzz}
FUZZ_TARGET=$target RUSTC_WRAPPER=$here/fuzz.sh CARGO_TARGET_DIR=$built \
    cargo +nightly build --release --manifest-path "$here/../fuzz/Cargo.toml" --bin "$target"
mkdir -p "$corpus"
cp -u "$here/../fuzz/corpus/$target/"* "$corpus"
exec "$built/release/$target" "$corpus" -print_final_stats=1 "$@"
