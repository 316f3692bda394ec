#!/usr/bin/env bash
# Install Slurm with accounting from the distribution, for tests/slurm: Debian packages by name, nothing else.
#
#   tests/slurm/install.sh      as root; does nothing where everything is there
#
# Exit: 0 all there, 1 not to be had (the reason is the last line).
set -euo pipefail

packages=(slurmctld slurmd slurm-client slurmdbd munge mariadb-server-core mariadb-client-core iproute2)
commands=(slurmctld slurmd srun slurmdbd munged mariadbd mariadb ip)

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
    echo "install.sh: no apt-get on this system; install Slurm and munge by its own means" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
# Recommended packages would bring a mail server; without systemd nothing starts by itself.
apt-get install -qq --no-install-recommends "${packages[@]}" >/dev/null 2>&1 || {
    apt-get update -qq && apt-get install -qq --no-install-recommends "${packages[@]}" >/dev/null
} || {
    echo "install.sh: apt-get could not install ${packages[*]}" >&2
    exit 1
}
