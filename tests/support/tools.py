# SPDX-License-Identifier: Apache-2.0
"""Tests that need a tool or a privilege say so here: a skip on a developer's machine, a loud failure in CI."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest


def unavailable(reason: str) -> None:
    """Skip the running test with this reason; where CI=true a missing thing is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"needed in CI: {reason}", pytrace=False)
    pytest.skip(reason)


def need(tool: str, *, package: str) -> str:
    """The path of an installed tool; without it the test does not run."""
    found = shutil.which(tool)
    if found is None:
        unavailable(f"{tool} is not installed (apt-get install {package})")
    return str(found)


def need_root() -> None:
    """Without root the test does not run."""
    if os.geteuid() != 0:
        unavailable("needs root")


def need_ptrace() -> None:
    """Without strace, or where it may trace nothing (a container's seccomp profile), the test does not run."""
    strace = need("strace", package="strace")
    tried = subprocess.run([strace, "-D", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        unavailable(f"strace may not trace here: {tried.stderr.strip()}")
