#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Builds the Debian packages in a copy of the tree, so that nothing is left in the tree.
# usage: debian/build.sh OUTPUT-DIRECTORY
set -eu
# The distribution's tools only: a Python of the developer's own in PATH does not build packages.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."

if ! command -v dpkg-checkbuilddeps >/dev/null; then
    echo "deb: dpkg-dev is missing; run as root: apt-get install dpkg-dev" >&2
    exit 1
fi
if ! missing=$(dpkg-checkbuilddeps 2>&1); then
    packages=$(sed -n 's/.*[Uu]nmet build dependencies: //p' <<<"$missing" | sed 's/ ([^)]*)//g; s/debhelper-compat/debhelper/; s/dh-sequence-python3/dh-python/')
    if [ "$(id -u)" -ne 0 ]; then
        echo "deb: build dependencies are missing; run: sudo apt-get install --no-install-recommends $packages" >&2
        exit 1
    fi
    echo "deb: installing the build dependencies: $packages" >&2
    read -r -a list <<<"$packages"
    apt=(apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)
    DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y --no-install-recommends "${list[@]}" >/dev/null
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/vmfork"
# Files that git does not ignore, committed or not; without git (a source package) everything.
if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do if [ -e "$file" ]; then printf '%s\0' "$file"; fi; done |
        tar -c --null -T - -f -
else
    tar -c --exclude=./build --exclude=./.venv -f - .
fi | tar -x -C "$work/vmfork" -f -

log=$out/build.log
if ! (cd "$work/vmfork" && dpkg-buildpackage -us -uc -b) >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "deb: the build failed; all of it is in $log" >&2
    exit 1
fi
rm -f "$out"/*.deb "$out"/*.changes "$out"/*.buildinfo
mv "$work"/*.deb "$work"/*.changes "$work"/*.buildinfo "$out/"
echo "deb: $(cd "$out" && echo *.deb) in $out"
