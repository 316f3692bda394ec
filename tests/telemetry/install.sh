#!/usr/bin/env bash
# Install Chromium from the distribution, for the report's tests: a Debian package by name, nothing else.
#
#   tests/telemetry/install.sh      as root; does nothing where it is there
#
# Exit: 0 there, 1 not to be had (the reason is the last line).
set -euo pipefail

command -v chromium >/dev/null && exit 0
if [[ $(id -u) != 0 ]]; then
    echo "install.sh: needs root" >&2
    exit 1
fi
if ! command -v apt-get >/dev/null; then
    echo "install.sh: no apt-get on this system; install Chromium by its own means" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
# The font is for the pictures: a bare machine has none.
packages=(chromium fonts-liberation)
apt-get install -qq --no-install-recommends "${packages[@]}" >/dev/null 2>&1 || {
    apt-get update -qq && apt-get install -qq --no-install-recommends "${packages[@]}" >/dev/null
} || {
    echo "install.sh: apt-get could not install ${packages[*]}" >&2
    exit 1
}
