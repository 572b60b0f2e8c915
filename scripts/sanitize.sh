#!/usr/bin/env bash
# compute-sanitizer's four tools on small models of every weight type, with prebuilt binaries: needs no
# Rust toolchain on the machine with the GPU.
#
#   scripts/sanitize.sh OUT DECODE_BENCH [GPU_TRUST]
#
# DECODE_BENCH: `generate` on tiny models of every mixture of types, as a graph and launch by launch
# (GPU_DEBUG=1), with --chain and with --persistent. GPU_TRUST (tests/gpu_trust.rs): its ignored tests
# every_format_in_few_tokens…, which have also the types without a mixture of their own, plain plans and
# red zones. Logs under OUT; a table of errors by tool last; exit 1 where there is an error, 2 where a
# run did not come to its end.
#
# SANITIZER=FILE   compute-sanitizer, if it is not on the PATH
# TOOLS, TYPES     others than all
# WAYS             of: graph eager graph-persistent eager-persistent
# JOBS=8           at a time
# LIMIT=120        seconds for a run; five times as long for GPU_TRUST
set -uo pipefail
out=${1:?folder for logs} bench=${2:?decode-bench binary} trust=${3:-}
sanitizer=${SANITIZER:-compute-sanitizer}
tools=${TOOLS:-"memcheck racecheck initcheck synccheck"}
types=${TYPES:-"q4_k_m q4_0 q4_1 q5_k_m q6_k q8_0 bf16 f16 q2_k q3_k_m iq4_nl iq4_xs"}
ways=${WAYS:-"graph eager graph-persistent eager-persistent"}
limit=${LIMIT:-120}
command -v "$sanitizer" > /dev/null || { echo "no $sanitizer: give SANITIZER=FILE" >&2; exit 2; }
mkdir -p "$out"
rm -f "$out"/*.log "$out"/*.rc "$out/notes"

# one TOOL WAY TYPE: one run; its output and its end are kept by that name
one() {
    local tool=$1 way=$2 type=$3 rc=0 flags=(--error-exitcode 86) command debug=0 log
    log=$out/$tool.$way.$type
    case $tool in
        memcheck) flags+=(--leak-check full --padding 32) ;;
        racecheck) flags+=(--racecheck-report analysis) ;;
        initcheck) flags+=(--track-unused-memory no) ;;
        synccheck) flags+=(--num-cuda-barriers 65536) ;; # a ring's, of all blocks
    esac
    if [[ $way == test* ]]; then
        command=("$trust" --exact --ignored --nocapture every_format_in_few_tokens)
        [ "$way" = test ] || command[4]+=_of_the_persistent_kernel
        limit=$((5 * limit))
    else
        command=("$bench" generate --synthetic "tiny:$type" --backend cuda
            --prompt-ids 1,2,3 -n 4 --ignore-eos -o json)
        [[ $way == *-persistent ]] && command+=(--persistent) || command+=(--chain)
        [[ $way == eager* ]] && debug=1
    fi
    GPU_DEBUG=$debug timeout "$limit" "$sanitizer" --tool "$tool" "${flags[@]}" "${command[@]}" \
        > "$log.log" 2>&1 || rc=$?
    echo $rc > "$log.rc"
}
export -f one
export out bench trust sanitizer limit

for tool in $tools; do
    [ -z "$trust" ] || printf '%s\n' "$tool test all" "$tool test-persistent all"
    for way in $ways; do
        for type in $types; do echo "$tool $way $type"; done
    done
done | xargs -P "${JOBS:-8}" -L 1 bash -c 'one "$@"' _

# Errors of a log: what the tool counts at its end; a dash where it said nothing.
errors() {
    sed -nE 's/.*(ERROR SUMMARY|RACECHECK SUMMARY): ([0-9]+) .*/\2/p' "$1" | tail -n 1 | grep . || echo -
}

failed=0
printf '%-10s %-18s %6s %8s %10s\n' tool way runs errors unfinished
for tool in $tools; do
    for way in ${trust:+test test-persistent} $ways; do
        runs=0 sum=0 unfinished=0
        for rc in "$out/$tool.$way".*.rc; do
            [ -e "$rc" ] || continue
            log=${rc%.rc}.log code=$(< "$rc") count=$(errors "${rc%.rc}.log")
            runs=$((runs + 1))
            if [ "$count" = - ] || { [ "$code" != 0 ] && [ "$code" != 86 ]; }; then
                unfinished=$((unfinished + 1))
                echo "  $(basename "$log"): ended with $code: $(tail -n 1 "$log" | cut -c1-120)" >> "$out/notes"
            fi
            [ "$count" = - ] || [ "$count" = 0 ] || echo "  $(basename "$log"): $count errors" >> "$out/notes"
            [ "$count" = - ] || sum=$((sum + count))
        done
        printf '%-10s %-18s %6d %8d %10d\n' "$tool" "$way" $runs $sum $unfinished
        [ $unfinished = 0 ] || [ $failed = 1 ] || failed=2
        [ $sum = 0 ] || failed=1
    done
done
[ ! -s "$out/notes" ] || { echo; cat "$out/notes"; }
exit $failed
