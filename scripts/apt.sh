# How the install scripts say things and install packages; sourced by them. LOG is where the messages of programs go.

have() { command -v "$1" >/dev/null 2>&1; }
say() { printf '%s: %s\n' "$(basename "$0" .sh)" "$*" >&2; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi
}

can_use_apt() {
    have apt-get && { [ "$(id -u)" -eq 0 ] || { have sudo && sudo -n true 2>/dev/null; }; }
}

# Debian starts a service as soon as it is installed, unless this file says no.
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
