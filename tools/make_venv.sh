#!/bin/sh
# Make the virtual environment VENV with a Python >= 3.11 and a uv to fill it with.
# Usage: PYTHON=... UV=... LOCK=... make_venv.sh VENV
set -eu

VENV=$1
HERE=$(dirname "$0")
RECENT='import sys, venv; sys.exit(sys.version_info < (3, 11))'
# Debian splits ensurepip off: such a Python makes environments with uv alone.
WITH_PIP='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'

# pip runs with an empty PATH, the one inside venv too: it asks compilers on PATH for their versions, and some of those
# write to HOME when they are asked.

# Run the candidates: a version manager's shim is on PATH even where its Python is not to be had.
find_python() {
    for candidate in "$PYTHON" python3.13 python3.12 python3.11 python3.14 python3 python; do
        if [ -n "$candidate" ] && "$candidate" -c "$1" >/dev/null 2>&1; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return 0
        fi
        if [ -n "$PYTHON" ]; then
            break
        fi
    done
    if [ -n "$PYTHON" ]; then
        echo "PYTHON=$PYTHON is not a Python >= 3.11 that can make an environment" >&2
    else
        echo "No Python >= 3.11 that can make an environment was found on PATH." >&2
    fi
    echo "Install one (on Debian and Ubuntu: python3 and python3-venv), or name it: make setup PYTHON=/path/to/python3" >&2
    return 1
}

if "$VENV/bin/python" -c "$RECENT" >/dev/null 2>&1; then
    echo "-- using the environment in $VENV ($("$VENV/bin/python" -V))"
else
    rm -rf "$VENV"
    if uv=$(sh "$HERE/find_uv.sh" "$VENV" "$UV"); then
        python=$(find_python "$RECENT")
        echo "-- making $VENV with $("$python" -V)"
        "$uv" venv --quiet --python "$python" "$VENV"
    else
        python=$(find_python "$WITH_PIP")
        echo "-- making $VENV with $("$python" -V)"
        PATH= "$python" -m venv "$VENV"
    fi
fi

if ! sh "$HERE/find_uv.sh" "$VENV" "$UV" >/dev/null; then
    echo "-- installing uv"
    # The locked uv, by its hashes.
    awk '/^uv==/ {on = 1} on {print} on && !/\\$/ {exit}' "$LOCK" > "$VENV/uv-requirement.txt"
    PATH= "$VENV/bin/python" -m pip install --quiet --no-cache-dir --require-hashes -r "$VENV/uv-requirement.txt"
fi
