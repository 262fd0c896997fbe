#!/usr/bin/env bash
# Install what `python -m bench.gateway` measures Pawl's gateway against: haproxy, and in .venv-bench vLLM's router and LiteLLM.
#
# Usage: scripts/install_bench.sh        (safe to run again; quick when everything is there)
#
# haproxy and the C compiler come from apt on Debian and Ubuntu, as root or with a password-less sudo; nothing that it
# installs is started. A peer that cannot be installed is left out of the benchmark, which says so. Exit status: 0 when
# every peer is there, 1 when one is not.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv-bench
# The versions that docs/benchmarks.md speaks of. Their dependencies contradict ours, hence an environment of their own.
PEERS=("vllm-router==0.1.17" "litellm[proxy]==1.106.2")
LOG=.tools/install-bench.log
python=${PYTHON:-python3}

. scripts/apt.sh

pip_install() {
    [ "$(cat "$VENV/.installed" 2>/dev/null)" = "${PEERS[*]}" ] && return
    say "installing ${PEERS[*]} into $VENV"
    [ -x "$VENV/bin/pip" ] || "$python" -m venv "$VENV"
    "$VENV/bin/pip" install --quiet --disable-pip-version-check "${PEERS[@]}" >>"$LOG" 2>&1 ||
        { say "pip could not; its messages are in $LOG"; return 0; }
    echo "${PEERS[*]}" >"$VENV/.installed"
}

mkdir -p .tools
: >"$LOG"
missing=()
have haproxy || missing+=(haproxy)
have cc || missing+=(gcc libc6-dev)
if [ ${#missing[@]} -gt 0 ] && can_use_apt; then apt_install "${missing[@]}"; fi
pip_install

status=0
for program in "$(command -v haproxy || echo haproxy)" "$(command -v cc || echo cc)" "$VENV/bin/vllm-router" "$VENV/bin/litellm"; do
    [ -x "$program" ] && continue
    say "missing: $program"
    status=1
done
exit "$status"
