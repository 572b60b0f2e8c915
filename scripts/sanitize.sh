#!/usr/bin/env bash
# compute-sanitizer's four tools on small models of every weight type, with prebuilt binaries: needs no
# Rust toolchain on the machine with the GPU.
#
#   scripts/sanitize.sh OUT GPU_TRUST [DECODE_BENCH]
#
# GPU_TRUST (tests/gpu_trust.rs): each of its ignored tests in a process of its own, a few tokens of one
# format or mixture as a graph and launch by launch, by
#   chain              a kernel a step, the fused plan and the plain one
#   persistent         the persistent kernel
#   experts_and_norms  experts, norms of heads, GELU
#   any_format         attention at depth, by both; tokens drawn
# DECODE_BENCH: `generate` on tiny models of TYPES, with GPU_DEBUG=0 and 1, with --chain and with --persistent.
# All runs first go without a tool, which shows that they pass and fills the driver's cache of compiled
# kernels. Logs under OUT; a table by tool and way last. Exit 1 where there is an error, 2 where a run did
# not come to its end or looked at nothing.
#
# SANITIZER=FILE   compute-sanitizer, if it is not on the PATH
# TOOLS, WAYS      others than all: of none racecheck memcheck initcheck synccheck; of those above, generate
# FORMATS          of GPU_TRUST's tests, by name: q4_0, q4_k_q6_k, at_depth
# TYPES            mixtures for DECODE_BENCH: q4_k_m q8_0
# JOBS=12          at a time: the tools take gigabytes each, of both memories, and what finds none ends with an error or
#                  does not follow every launch, which is unfinished here: synccheck wants JOBS=2
# LIMIT=200        seconds for a run; racecheck of the persistent kernel takes 50 to 160
# KERNELS=FOLDER   kernels in place of those of GPU_TRUST: racecheck cannot follow the persistent kernel as it is, see
#                  ptx/build.sh --every-lane
# DRY=1            prints the commands
set -uo pipefail
out=${1:?folder for logs} trust=${2:?gpu_trust binary} bench=${3:-}
sanitizer=${SANITIZER:-compute-sanitizer}
tools=${TOOLS:-"none racecheck memcheck initcheck synccheck"}
ways=${WAYS:-"any_format persistent chain experts_and_norms generate"}
limit=${LIMIT:-200} dry=${DRY:-}
[ -n "$dry" ] || command -v "$sanitizer" > /dev/null || { echo "no $sanitizer: give SANITIZER=FILE" >&2; exit 2; }
mkdir -p "$out"
rm -f "$out"/*.log "$out"/*.end "$out/notes"

# one TOOL WAY NAME: one run; its output, how it ended and its seconds are kept by that name
one() {
    local tool=$1 way=$2 name=$3 rc=0 start=$SECONDS debug=0 flags=() command log
    log=$out/$tool.$way.$name
    case $tool in
        none) ;;
        memcheck) flags=(--leak-check full --padding 32) ;;
        racecheck) flags=(--racecheck-report analysis) ;;
        initcheck) ;;
        # The barriers of a ring, of all blocks: each takes memory of the device.
        synccheck) [ "$way" = persistent ] && flags=(--num-cuda-barriers 8192) || flags=(--num-cuda-barriers 16384) ;;
    esac
    if [ "$way" = generate ]; then
        command=("$bench" generate --synthetic "tiny:${name%%-*}" --backend cuda
            --prompt-ids 1,2,3 -n 4 --ignore-eos -o json)
        [[ $name == *-persistent ]] && command+=(--persistent) || command+=(--chain)
        [[ $name == *-eager* ]] && debug=1
    else
        command=("$trust" --ignored --exact --nocapture --test-threads=1 "$way::$name")
    fi
    [ "$tool" = none ] || command=("$sanitizer" --tool "$tool" --error-exitcode 86 "${flags[@]}" "${command[@]}")
    command=(env "GPU_DEBUG=$debug" timeout "$limit" "${command[@]}")
    if [ -n "$dry" ]; then
        printf '%s\n' "${command[*]}"
        return
    fi
    "${command[@]}" > "$log.log" 2>&1 || rc=$?
    echo $rc $((SECONDS - start)) > "$log.end"
}
export -f one
export out bench trust sanitizer limit dry

# Names of the runs of a way.
names() {
    local name
    if [ "$1" = generate ]; then
        [ -n "$bench" ] || return 0
        for name in ${TYPES:-q4_k_m q8_0}; do
            printf '%s\n' "$name-graph" "$name-eager" "$name-graph-persistent" "$name-eager-persistent"
        done
    else
        "$trust" --list --ignored | sed -n "s/^$1::\(.*\): test$/\1/p" | while read -r name; do
            [[ -z ${FORMATS:-} || " $FORMATS " == *" $name "* ]] && echo "$name"
        done
    fi
}

runs=()
for way in $ways; do
    while read -r name; do runs+=("$way $name"); done < <(names "$way")
done
[ ${#runs[@]} -gt 0 ] || { echo "no runs: $trust has no such tests" >&2; exit 2; }
side_by_side() { xargs -P "${JOBS:-12}" -L 1 bash -c 'one "$@"' _; }
case " $tools " in *" none "*) printf 'none %s\n' "${runs[@]}" | side_by_side ;; esac
for tool in $tools; do
    [ "$tool" = none ] || printf "$tool %s\n" "${runs[@]}"
done | side_by_side
[ -z "$dry" ] || exit 0

# Errors and warnings that a tool counts at its end; nothing where it did not get there.
counts() {
    sed -nE -e 's/.*ERROR SUMMARY: ([0-9]+) error.*/\1 0/p' \
        -e 's/.*RACECHECK SUMMARY: .*\(([0-9]+) errors?, ([0-9]+) warnings?\).*/\1 \2/p' "$1" | tail -n 1
}
# Whether a run did what it was for.
went() {
    case $1 in
        *.generate.*) grep -q '"ids"' "$1" ;;
        *) grep -q 'few tokens |' "$1" && grep -q '^test result: ok. 1 passed' "$1" ;;
    esac
}

failed=0
printf '%-10s %-18s %6s %8s %9s %11s %9s\n' tool way runs errors warnings unfinished 'slowest s'
for tool in $tools; do
    for way in $ways; do
        n=0 errors=0 warnings=0 unfinished=0 slowest=0
        for end in "$out/$tool.$way".*.end; do
            [ -e "$end" ] || continue
            log=${end%.end}.log name=$(basename "${end%.end}")
            read -r code seconds < "$end"
            [ "$tool" = none ] && e=0 w=0 || { e='' w='' && read -r e w < <(counts "$log"); }
            # Launches that the tool could not follow: it counts them as errors of the kernel.
            lost=$(grep -c 'Internal Sanitizer Error' "$log")
            [ -z "$e" ] || e=$((e - lost))
            n=$((n + 1)) errors=$((errors + ${e:-0})) warnings=$((warnings + ${w:-0}))
            [ "$seconds" -le $slowest ] || slowest=$seconds
            if [ -z "$e" ] || [ "$lost" != 0 ] || ! went "$log" || { [ "$code" != 0 ] && [ "$code" != 86 ]; }; then
                unfinished=$((unfinished + 1))
                echo "  $name: ended with $code, $lost launches not followed: $(grep -v '^$' "$log" | tail -n 1 | cut -c1-120)" >> "$out/notes"
            fi
            [ "${e:-0}${w:-0}" = 00 ] || echo "  $name: $e errors, $w warnings" >> "$out/notes"
        done
        [ $n -gt 0 ] || continue
        printf '%-10s %-18s %6d %8d %9d %11d %9d\n' "$tool" "$way" $n $errors $warnings $unfinished $slowest
        [ $unfinished = 0 ] || [ $failed = 1 ] || failed=2
        [ $errors = 0 ] || failed=1
    done
done
echo "${#runs[@]} runs a tool, in $SECONDS s"
[ ! -s "$out/notes" ] || { echo; cat "$out/notes"; }
exit $failed
