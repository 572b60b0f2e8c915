#!/usr/bin/env bash
# Checks and measures everything that only a GPU shows, in one call, with prebuilt binaries: needs no
# Rust toolchain on the machine with the GPU.
#
#   scripts/gpu_check.sh OUT DECODE_BENCH [TEST_BINARY…]
#
# Writes JSON and logs under OUT and prints a short table last. Exit 1 if anything failed. Set
# MODEL=FILE.gguf for the golden check of the real model, SHAPES="…" for other shapes to time.
set -uo pipefail
out=${1:?folder for results} bench=${2:?decode-bench binary}
shift 2
shapes=${SHAPES:-"llama-3.1-8b:q4_k_m llama-3.2-1b:q4_k_m qwen2.5-1.5b:q4_k_m llama-2-7b:q4_0 llama-3.2-1b:bf16 smollm2-135m:q4_0"}
golden=$(dirname "$0")/../tests/golden/smollm2-135m-q4_1.json
mkdir -p "$out"
failed=0
rows=()

# check NAME COMMAND…: runs it with a limit, keeps its output, notes how it ended
check() {
    local name=$1 rc=0
    shift
    timeout "${LIMIT:-120}" "$@" > "$out/$name.log" 2>&1 || rc=$?
    rows+=("$(printf '%-34s %s' "$name" "$([ $rc = 0 ] && echo ok || echo "FAILED ($rc): $(tail -n 1 "$out/$name.log" | cut -c1-140)")")")
    [ $rc = 0 ] || failed=1
}

for test in "$@"; do
    name=test-$(basename "$test" | sed 's/-[0-9a-f]*$//')
    # Long runs, or hundreds of engines, take minutes; figures are for the table.
    case $name in
        test-gpu_formats) LIMIT=${LIMIT:-600} check "$name" "$test" --test-threads=1 --nocapture ;;
        test-gpu_trust) LIMIT=${LIMIT:-600} check "$name" "$test" --test-threads=1 --nocapture ;;
        *) check "$name" "$test" --test-threads=1 ;;
    esac
done
for quant in ${QUANTS:-q4_k_m q4_0 q4_1 q5_k_m q6_k q8_0 bf16 f16 q2_k q3_k_m iq4_nl iq4_xs}; do
    check "verify-tiny-$quant" "$bench" verify --synthetic "tiny:$quant" --backend cuda
done
if [ -n "${MODEL:-}" ]; then
    check verify-real "$bench" verify -m "$MODEL" --backend cuda -n 320
    check golden-graph "$bench" verify -m "$MODEL" --golden "$golden" --backend cuda
    check golden-eager "$bench" verify -m "$MODEL" --golden "$golden" --backend cuda --mode eager
    check run-real "$bench" run -m "$MODEL" --backend cuda -n 512 -r 3 -o json
fi
for shape in $shapes; do
    name=${shape//[:.]/-}
    for mode in ${MODES:-graph}; do
        check "run-$name-$mode" "$bench" run --synthetic "$shape" --backend cuda --mode "$mode" -n 512 -r 3 -o json
    done
done
for shape in ${CAPTURED:-llama-3.2-1b:q4_k_m qwen3-8b:q4_k_m gemma-3-270m:q4_k_m}; do
    name=${shape//[:.]/-}
    for way in chain persistent; do
        check "captured-$name-$way" "$bench" graph --synthetic "$shape" --captured "--$way"
        check "profile-$name-$way" "$bench" profile --synthetic "$shape" --backend cuda "--$way"
        # 10,000 gaps between tokens; host time, relaunch gap and memory are in it too.
        check "replays-$name-$way" "$bench" run --synthetic "$shape" --backend cuda "--$way" -n 101 -r 100 -o json
    done
done
check doctor "$bench" doctor --backend cuda
check bisect-tiny "$bench" verify --synthetic tiny --backend cuda --bisect
check run-both "$bench" run --synthetic llama-3.2-1b:q4_k_m --backend cuda --mode both -n 1024 -r 5 -v
check draw "$bench" generate --synthetic llama-3.2-1b:q4_k_m --backend cuda --prompt-ids 1,2,3 --temp 0.8 -n 64 --ignore-eos -o json
# Told to end while it loads sixteen gigabytes, it ends at once and as interrupted.
check sigterm-at-load bash -c \
    'timeout --preserve-status -s TERM -k 1 1 "$1" run --synthetic llama-3.1-8b:f16 --backend cuda -n 8; [ $? = 130 ]' _ "$bench"
[ -z "${DEPTH:-}" ] || check "run-depth-$DEPTH" "$bench" run --synthetic llama-3.1-8b:q4_k_m --backend cuda -d "$DEPTH" -n 128 -r 3 -o json

printf '%s\n' "${rows[@]}"
grep -ho 'trust |.*' "$out"/test-gpu_trust.log 2> /dev/null
exit $failed
