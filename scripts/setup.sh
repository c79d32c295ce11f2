# Sourced by the scripts beside it: moves to the repository's root and makes .venv, with weightd built and installed
# editable. Quick when nothing has changed since the last time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

need() { # Debian packages: root installs them, other users get their names
    command -v dpkg-query >/dev/null || return 0
    local package missing=()
    for package in "$@"; do
        dpkg-query -W -f='${Status}\n' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0
    if [[ $(id -u) -ne 0 ]]; then
        echo "missing Debian packages, install them with: sudo apt-get install ${missing[*]}" >&2
        exit 1
    fi
    local lock && exec {lock}<scripts/setup.sh && flock "$lock" # scripts may run at the same time, apt-get may not
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "${missing[@]}" >/dev/null
    exec {lock}<&-
}

need g++ cmake libxxhash-dev liburing-dev libgtest-dev
python3 -c 'import sys; sys.exit("python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
python3 -c 'import ensurepip' 2>/dev/null || need python3-venv
[[ -f $(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]] || need python3-dev

inputs() { cat pyproject.toml constraints.txt CMakeLists.txt proto/* $(find weightd/native client/native -type f | sort); }
if [[ ! -x .venv/bin/python ]]; then python3 -m venv .venv; fi
PATH=$PWD/.venv/bin:$PATH
unset PYTHONDONTWRITEBYTECODE # without bytecode, each process that imports torch and transformers compiles for 8 s
if [[ $(inputs | sha256sum) != "$(cat .venv/inputs 2>/dev/null)" ]]; then
    echo "setting up .venv: builds the C++ parts, and installs torch and others the first time (some ten minutes)" >&2
    pip install -q -c constraints.txt "scikit-build-core>=1.0" "nanobind>=2.9" "grpcio-tools>=1.80" ninja
    if [[ ! -f .venv/inputs ]]; then # the first time: what takes one processor, beside compiling
        pip install -q --no-deps --no-compile -r constraints.txt & # Python compiles what is imported
        trap "kill $! 2>/dev/null" EXIT # Ctrl-C does not reach it
        pip install -q --no-deps --no-build-isolation -e .
        wait $!
        trap - EXIT
    fi
    pip install -q -c constraints.txt --no-build-isolation -e ".[dev,demo]"
    inputs | sha256sum >.venv/inputs
fi
