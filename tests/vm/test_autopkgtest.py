# SPDX-License-Identifier: Apache-2.0
"""debian/tests/unit, run by autopkgtest: the unit suite with Debian 13's own tools against the installed packages.

The tests that need a running system are run in a guest, by test_fresh_guests.py. No virtual machine is needed here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from lab import autopkgtest
from lab.archive import Packages, tree
from lab.host import LabError
from lab.payload import payload

from support.chroot import Chroot
from support.tools import need, need_root, unavailable

pytestmark = pytest.mark.vm

# What debian/tests/control asks for, and what the packages depend on: a testbed without a network.
_INSTALLED = (
    "acpica-tools",
    "apt",
    "apt-utils",
    "bash-completion",
    "device-tree-compiler",
    "g++",
    "gcc",
    "openssh-client",
    "procps",
    "python3-hypothesis",
    "python3-pyroute2",
    "python3-pytest",
    "python3-pyudev",
    "python3-systemd",
    "zsh",
)


def test_unit_suite_passes_against_the_installed_packages(tmp_path: Path) -> None:
    program = need("autopkgtest", package="autopkgtest")
    need("mmdebstrap", package="mmdebstrap")
    need_root()
    wanted = Packages(
        name="autopkgtest-trixie", suite="trixie", architecture="amd64", include=_INSTALLED, installed=True
    )
    try:
        box = Chroot(tree(wanted, estimate="a minute"), tmp_path)
    except LabError as error:
        unavailable(str(error))
        raise
    # There is nothing to fetch.
    (box.upper / "etc/apt").mkdir(parents=True)
    (box.upper / "etc/apt/sources.list").touch()
    output, source = tmp_path / "output", autopkgtest.source(tmp_path)
    packages = [str(path) for path in payload().packages[0].parent.glob("*.deb")]
    command = [program, f"--output-dir={output}", "--test-name=unit", "--no-built-binaries", *packages, str(source)]
    try:
        verdicts = autopkgtest.verdicts(
            box.around([*command, "--", "chroot", str(box.root)]), output, name="chroot", seconds=900
        )
    finally:
        shutil.rmtree(box.upper)
    assert verdicts == {"unit": "PASS"}, autopkgtest.said(output)
