#!/usr/bin/env bash
# Compiles the kernels to the PTX that is committed beside them.
#
#   ptx/build.sh            rebuild every <module>.sm80.ptx and <module>.sm90.ptx, modules.in.rs, MANIFEST
#   ptx/build.sh MODULE …   rebuild these modules only: while working on one kernel
#   ptx/build.sh --check    rebuild elsewhere and compare byte for byte, then assemble for every
#                           supported architecture, print registers, shared memory and spills, and
#                           fail if a hot module spills
#   ptx/build.sh --every-lane FOLDER
#                           the persistent kernel as racecheck can follow it (persistent/board.cuh, ARRIVING), for
#                           scripts/sanitize.sh with KERNELS=FOLDER
#
# The compiler is the pinned one of requirements.txt, in .cuda/ at the top of the repository unless
# CUDA_HOME says where it is. Only its version, not the machine, decides the bytes of the output.
set -euo pipefail
cd "$(dirname "$0")"
export LC_ALL=C

# Hot modules spill nothing on any architecture, on sm_120 too: it runs the code made for sm_90, but
# its compiler gets fewer values into as many registers. A dash: not hot.
# module           source         definitions                      hot
MODULES="
elementwise        elementwise.cu -                                hot
attention_f16      attention.cu   -DKV_F16=1                       hot
attention_f32      attention.cu   -DKV_F16=0                       -
probe              probe.cu       -                                -
persistent         persistent.cu  -                                hot
sample             sample.cu      -                                hot
stamp              stamp.cu       -                                -
$(for f in f32 f16 bf16 q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k q4_k q5_k q6_k iq4_nl iq4_xs mxfp4; do
    echo "gemv_$f gemv.cu -DFORMAT=$f$([[ $f == q[46]_k ]] && echo ,-DQKV_GAINS=1)$(
        [[ $f == q6_k ]] && echo ,-DQKV_THREAD_AGAIN=1) hot"
    echo "expert_$f expert.cu -DFORMAT=$f -"
done)
$(for pair in q2_k:q3_k q2_k:q4_k q3_k:q4_k q3_k:q5_k q4_k:q6_k q5_k:q6_k q5_0:q8_0 \
    iq4_nl:q5_k iq4_xs:q5_k; do
    a=${pair%:*} b=${pair#*:}
    echo "qkv_${a}_$b qkv.cu -DFORMAT_A=$a,-DFORMAT_B=$b$([[ $b == *_k ]] && echo ,-DQKV_GAINS=1)$(
        [[ $pair == q3_k:q5_k ]] && echo ,-DQKV_THREAD_AGAIN=1) hot"
done)
"
# PTX versions to try, the lowest that assembles is taken: an older driver then loads the code too.
VERSIONS="7.0 7.4 7.8 8.0 8.3 8.6 9.0"
# Assembled by --check: architecture and variant.
TARGETS="sm_80:sm80 sm_86:sm80 sm_89:sm80 sm_90:sm90 sm_100:sm90 sm_120:sm90"

if [[ -z ${CUDA_HOME:-} ]]; then
    CUDA_HOME=$(cd .. && pwd)/.cuda/nvidia/cu13
    if [[ ! -x $CUDA_HOME/bin/nvcc ]]; then
        python3 -m pip install --quiet --require-hashes --no-deps --only-binary :all: \
            --target ../.cuda -r requirements.txt
        chmod +x "$CUDA_HOME"/bin/* "$CUDA_HOME"/nvvm/bin/* 2>/dev/null || true
    fi
fi
export CUDA_HOME VERSIONS

# compile MODULE SOURCE DEFINITIONS OUTPUT_FOLDER COMPUTE
compile() {
    local module=$1 source=$2 definitions=$3 folder=$4 compute=$5 out raw version
    out=$folder/$module.sm$compute.ptx raw=$folder/$module.sm$compute.raw
    [[ $definitions == - ]] && definitions=
    # It takes registers from one warp for another: an instruction of compute 9.0 and of no other.
    [[ $module$compute == persistent90 ]] && compute=90a
    # shellcheck disable=SC2086
    "$CUDA_HOME/bin/nvcc" -ptx -arch="compute_$compute" -O3 -std=c++17 ${definitions//,/ } \
        "$source" -o "$raw"
    # Comments name the compiler build and paths; used_bytes_mask is a hint that only new drivers
    # know. Neither changes the code.
    sed -i -e '\|^[[:space:]]*//|d' -e '/used_bytes_mask/d' -e 's/[[:space:]]*$//' "$raw"
    for version in $VERSIONS; do
        sed "s/^\.version .*/.version $version/" "$raw" | cat -s > "$out"
        if "$CUDA_HOME/bin/ptxas" -arch="sm_$compute" "$out" -o /dev/null 2>/dev/null; then
            rm "$raw"
            return 0
        fi
    done
    echo "$module: no PTX version assembles" >&2
    "$CUDA_HOME/bin/ptxas" -arch="sm_$compute" "$out" -o /dev/null || true
    return 1
}

# assemble FOLDER MODULE HOT ARCHITECTURE VARIANT: one table row per kernel
assemble() {
    local folder=$1 module=$2 hot=$3 arch=$4 variant=$5 log
    if [[ $module.$variant == persistent.sm90 ]]; then
        [[ $arch == sm_90 ]] || return 0
        arch=sm_90a
    fi
    log=$("$CUDA_HOME/bin/ptxas" -v -arch="$arch" "$folder/$module.$variant.ptx" -o /dev/null 2>&1) || {
        echo "$log" >&2
        return 1
    }
    awk -v module="$module" -v hot="$hot" -v arch="$arch" '
        /Compiling entry function/ { split($0, part, "\047"); kernel = part[2] }
        /spill stores/ {
            for (i = 2; i <= NF; ++i) if ($i == "spill") spilled[$(i + 1)] = $(i - 2)
        }
        /Used [0-9]+ registers/ {
            shared = 0
            for (i = 2; i <= NF; ++i) {
                if ($i ~ /^registers/) registers = $(i - 1)
                if ($i ~ /^smem/) shared = $(i - 2)
            }
            spills = spilled["stores,"] + spilled["loads"]
            printf "%-18s %-18s %-7s %9d %7d %7d%s\n", module, kernel, arch, registers, shared, \
                spills, (hot == "hot" && spills > 0 ? "  SPILLS" : "")
        }' <<< "$log"
}
export -f compile assemble

# Modules whose source exists: MODULE SOURCE DEFINITIONS HOT
present() {
    while read -r module source definitions hot; do
        [[ -n $module && -f $source ]] && echo "$module $source $definitions $hot"
    done <<< "$MODULES"
    return 0
}

# build FOLDER [MODULE…]: all modules, or these; the tables are of all
build() {
    local folder=$1
    local only=" ${*:2} "
    present | while read -r module source definitions _; do
        [[ $only == "  " || $only == *" $module "* ]] || continue
        printf '%s %s %s %s %s\n' "$module" "$source" "$definitions" "$folder" 80
        printf '%s %s %s %s %s\n' "$module" "$source" "$definitions" "$folder" 90
    done | xargs -P "$(nproc)" -L 1 bash -c 'compile "$@"' compile
    {
        echo "// Written by ptx/build.sh: (module, PTX for compute 8.0, PTX for compute 9.0)."
        echo "["
        present | sort | while read -r module _; do
            echo "    (\"$module\", include_str!(\"$module.sm80.ptx\"), include_str!(\"$module.sm90.ptx\")),"
        done
        echo "]"
    } > "$folder/modules.in.rs"
    [[ $only == "  " ]] || cp -n -- *.ptx "$folder"
    {
        (cd "$folder" && sha256sum -- *.ptx)
        find . -name '*.cu' -o -name '*.cuh' -o -name requirements.txt | sed 's|^\./||' | sort |
            xargs sha256sum --
    } > "$folder/MANIFEST"
}

case ${1:-} in
"")
    fresh=$(mktemp -d)
    trap 'rm -rf "$fresh"' EXIT
    build "$fresh"
    rm -f -- *.ptx
    cp "$fresh"/* .
    wc -c -- *.ptx | tail -n 1
    ;;
--check)
    fresh=$(mktemp -d)
    trap 'rm -rf "$fresh"' EXIT
    build "$fresh"
    status=0
    for file in "$fresh"/*; do
        cmp "$file" "$(basename "$file")" || status=1
    done
    for file in *.ptx; do
        [[ -f $fresh/$file ]] || { echo "$file: no module of this name" >&2; status=1; }
    done
    (( status == 0 )) || { echo "the committed PTX is not what the sources compile to" >&2; exit 1; }
    printf '%-18s %-18s %-7s %9s %7s %7s\n' module kernel arch registers shared spills
    present | while read -r module _ _ hot; do
        for target in $TARGETS; do
            echo "$fresh" "$module" "$hot" "${target%:*}" "${target#*:}"
        done
    done | xargs -P "$(nproc)" -L 1 bash -c 'assemble "$@"' assemble | sort > "$fresh/table"
    cat "$fresh/table"
    if grep -q SPILLS "$fresh/table"; then
        echo "a hot module spills" >&2
        exit 1
    fi
    ;;
--every-lane)
    folder=${2:?folder for the kernel}
    [[ $folder == /* ]] || folder=$OLDPWD/$folder
    mkdir -p "$folder"
    compile persistent persistent.cu -DEVERY_LANE "$folder" 90
    ;;
-*)
    echo "usage: ptx/build.sh [--check | --every-lane FOLDER | MODULE…]" >&2
    exit 2
    ;;
*)
    fresh=$(mktemp -d)
    trap 'rm -rf "$fresh"' EXIT
    build "$fresh" "$@"
    cp "$fresh"/* .
    ;;
esac
