#!/usr/bin/env bash
# The same file through llama.cpp's llama-bench and through decode-bench, in turn on the same GPU.
#
#   scripts/side_by_side.sh MODEL.gguf [LLAMA_BENCH [DECODE_BENCH]]
#
# Prints both tables and, by depth, the ratio of the mean tokens a second. DEPTHS=0,4096 N=512 R=5 are
# the depths, the tokens and the repetitions; ROUNDS=2 how often the two take turns; FLAGS="-fa 1" goes
# to llama-bench alone. llama-bench waits
# for the host after every token and hands it the logits; decode-bench chooses the token on the GPU.
set -euo pipefail
model=${1:?usage: side_by_side.sh MODEL.gguf [LLAMA_BENCH [DECODE_BENCH]]}
theirs=${2:-llama-bench} ours=${3:-target/release/decode-bench}
for program in "$theirs" "$ours"; do
    command -v "$program" > /dev/null || { echo "$program: not found" >&2; exit 1; }
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
common=(-m "$model" -p 0 -n "${N:-512}" -d "${DEPTHS:-0,4096}" -r "${R:-5}" -ngl 99)

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null || true
env | grep -E '^(GGML_|LLAMA_)' || true
for round in $(seq "${ROUNDS:-2}"); do
    for who in theirs ours; do
        echo "round $round: ${!who}" >&2
        flags=()
        [ $who = ours ] || read -ra flags <<< "${FLAGS:-}"
        # The table goes where the progress goes, the rows are kept.
        "${!who}" "${common[@]}" "${flags[@]}" -o jsonl -oe md >> "$folder/$who" 2> "$folder/$who.md" || {
            cat "$folder/$who.md" >&2
            exit 1
        }
        grep -E '^\||^build' "$folder/$who.md"
    done
done

# field NAME: depth and this field of every row of stdin
field() { sed -n "s/.*\"n_depth\": *\([0-9]*\).*\"$1\": *\([0-9.e+]*\).*/\1 \2/p"; }
printf '\n%8s %16s %16s %8s\n' depth 'llama-bench t/s' 'decode-bench t/s' ratio
for who in theirs ours; do field avg_ts < "$folder/$who" | sed "s/^/$who /"; done | awk '
    { sum[$1, $2] += $3; n[$1, $2]++; depth[$2] = $2 }
    END {
        for (d in depth) {
            if (!n["theirs", d] || !n["ours", d]) continue
            a = sum["theirs", d] / n["theirs", d]; b = sum["ours", d] / n["ours", d]
            printf "%8d %16.2f %16.2f %8.3f\n", d, a, b, b / a
        }
    }' | sort -n
