#!/usr/bin/env bash
# Install Debian packages for tests: by name, from the distribution, nothing else.
#
#   tests/install.sh "COMMAND…" PACKAGE…      as root; does nothing where all commands are there
#
# Exit: 0 all there, 1 not to be had (the reason is the last line).
set -euo pipefail

read -ra commands <<<"$1"
packages=("${@:2}")

missing() {
    for command in "${commands[@]}"; do
        command -v "$command" >/dev/null || return 0
    done
    return 1
}

missing || exit 0
if [[ $(id -u) != 0 ]]; then
    echo "install.sh: needs root" >&2
    exit 1
fi
if ! command -v apt-get >/dev/null; then
    echo "install.sh: no apt-get on this system; install ${commands[*]} by its own means" >&2
    exit 1
fi
exec 9>/run/lock/megatron-hpt-install # one at a time: a test run has several processes
flock 9
missing || exit 0
export DEBIAN_FRONTEND=noninteractive
# Recommended packages would bring a mail server; without systemd nothing starts by itself.
apt-get install -qq --no-install-recommends "${packages[@]}" >/dev/null 2>&1 || {
    apt-get update -qq && apt-get install -qq --no-install-recommends "${packages[@]}" >/dev/null
} || {
    echo "install.sh: apt-get could not install ${packages[*]}" >&2
    exit 1
}
