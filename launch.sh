#!/usr/bin/env bash
# Sets up .venv where that is needed, then runs the main job or any command in it.
#
#   ./launch.sh                          the main job on the embedded data (configs/quickstart.py)
#   ./launch.sh configs/X.py [--flags]   the main job with that config
#   ./launch.sh COMMAND [ARGUMENT ...]   any command in the environment: ./launch.sh pytest
#
# PYTHON names the interpreter to make the environment with (default: python3, at least 3.11).
set -euo pipefail

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
if [ ! -f "$root/pyproject.toml" ]; then
    root=${SLURM_SUBMIT_DIR:-$PWD} # sbatch runs a copy of this file from a directory of its own
    [ -f "$root/pyproject.toml" ] || fail "$root is not a checkout of flax_dlvc; submit from one"
fi
venv=$root/.venv

# Installs the package when the environment is new or what it was installed from has changed.
set_up() {
    local extras=test stamp
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
        extras=test,cuda12
    fi
    stamp="$extras $(cksum <"$root/pyproject.toml") $root"
    if [ "$(cat "$venv/.installed" 2>/dev/null)" = "$stamp" ]; then
        return
    fi
    local python=${PYTHON:-python3}
    command -v "$python" >/dev/null || fail "$python is not there; install Python 3.11 or newer, or set PYTHON"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$python" --version) is too old; install Python 3.11 or newer, or set PYTHON"
    printf 'setting up %s\n' "$venv" >&2
    "$python" -m venv "$venv" || fail "cannot make $venv; is Python's venv module installed?"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "${root}[$extras]" ||
        fail "cannot install flax_dlvc into $venv; see pip's message above"
    printf '%s\n' "$stamp" >"$venv/.installed"
}

# Processes that start at once take turns, so that only the first one installs.
if command -v flock >/dev/null; then
    exec 9>"$root/.venv.lock"
    flock 9
    set_up
    exec 9>&-
else
    set_up
fi

export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
if [ $# -eq 0 ]; then
    cd "$root"
    exec python -m flax_dlvc.main --config configs/quickstart.py
fi
case $1 in
    *.py) exec python -m flax_dlvc.main --config "$@" ;;
    *) exec "$@" ;;
esac
