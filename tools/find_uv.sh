#!/bin/sh
# Print the uv to use: the one given, the environment's own, else one on PATH that really runs.
# Usage: find_uv.sh VENV [UV]
for uv in "$2" "$1/bin/uv" "$(command -v uv 2>/dev/null)"; do
    if [ -n "$uv" ] && "$uv" --version >/dev/null 2>&1; then
        echo "$uv"
        exit 0
    fi
done
exit 1
