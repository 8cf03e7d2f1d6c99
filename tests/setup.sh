#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Makes a Debian machine ready for development: installs the packages of tests/*packages.txt that are missing, and
# makes .venv with the distribution's Python. Says what it does; where it cannot, says what is missing and fails.
# Called by `make setup` only when a list or pyproject.toml changed.
set -eu
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }

mapfile -t wanted < <(cat tests/packages.txt tests/vm/packages.txt 2>/dev/null | sed 's/#.*//' | tr -s ' \t' '\n' | sed '/^$/d' | sort -u)

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    say "this is not a Debian machine; install what these Debian packages hold, by hand:"
    say "  ${wanted[*]}"
    say "and then: python3 -m venv .venv && .venv/bin/pip install -e '.[dev]' && touch .venv/setup.stamp"
    exit 1
fi

missing=()
for package in "${wanted[@]}"; do
    installed "$package" || missing+=("$package")
done

if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" -ne 0 ]; then
        say "${#missing[@]} Debian packages are missing, and only root can install them. Run this, then try again:"
        say "  sudo apt-get install --no-install-recommends ${missing[*]}"
        exit 1
    fi
    say "installing ${#missing[@]} Debian packages: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt=(apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confold)
    install=("${apt[@]}" install -y --no-install-recommends "${missing[@]}")
    # A server that is installed as a tool for a test is not started on this machine.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 0755 "$policy"
    fi
    log=$(mktemp)
    # The lists may be absent (a fresh container) or name versions that the mirror no longer has: look once more.
    if ! { "${apt[@]}" -s install --no-install-recommends "${missing[@]}" && "${install[@]}"; } >"$log" 2>&1; then
        if ! { "${apt[@]}" update && "${install[@]}"; } >"$log" 2>&1; then
            tail -n 20 "$log" >&2
            say "apt-get failed; all it said is in $log"
            exit 1
        fi
    fi
    rm -f "$log"
fi

venv=.venv/bin/python
if ! "$venv" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    say "making .venv with $(/usr/bin/python3 --version)"
    /usr/bin/python3 -m venv --clear .venv
fi
say "installing vmfork and its Python packages into .venv"
pip=("$venv" -m pip install -q --disable-pip-version-check --no-input --root-user-action=ignore)
# systemd-python is a source package without pyproject.toml, and the venv of Python 3.12 and later has no setuptools.
# Building without isolation with these two is the one way that pip 23 (Debian 12) and pip 25 (Debian 13) both take.
if ! { "${pip[@]}" 'setuptools>=66' wheel && "${pip[@]}" --no-build-isolation --use-pep517 -e '.[dev]'; }; then
    say "pip failed (see above): .venv needs the packages of pyproject.toml from the Python package index"
    exit 1
fi
say "ready"
