# SPDX-License-Identifier: Apache-2.0
"""vmfork as a user installs it: the Debian packages that `debian/build.sh` makes from this checkout.

They are built once for each content of the tree and kept in the cache. An image is made from a base and this payload
in seconds, so a change of vmfork never rebuilds a base.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lab import cache
from lab.host import LabError

_TREE = Path(__file__).resolve().parents[3]
# What the packages are made of. Tests are not among it: a changed test needs no new package.
_SOURCES = ("agent", "completion", "debian", "docs", "hooks.d", "units", "pyproject.toml", "README.md", "LICENSE")
_INSTALLED = ("python3-vmfork", "vmfork")


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """The packages to install, in order, and a hash of their sources."""

    packages: tuple[Path, ...]
    key: str


def payload() -> Payload:
    """The packages of this checkout as it is now, uncommitted changes included."""
    key = cache.key_of("payload", _content())
    directory = cache.artefact("vmfork-packages", key, _build, estimate="about 15 s")
    packages = []
    for name in _INSTALLED:
        found = list(directory.glob(f"{name}_*.deb"))
        if len(found) != 1:
            raise LabError(f"debian/build.sh made {len(found)} packages {name}")
        packages.append(found[0])
    return Payload(packages=tuple(packages), key=key)


def unpack(made: Payload, root: Path) -> None:
    """Put the files of the packages into a root whose package manager cannot run here."""
    for package in made.packages:
        subprocess.run(["dpkg-deb", "--extract", os.fspath(package), os.fspath(root)], check=True)


def _build(partial: Path) -> None:
    command = [os.fspath(_TREE / "debian/build.sh"), os.fspath(partial)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise LabError(f"debian/build.sh failed:\n{done.stdout[-3000:]}")


def _content() -> str:
    digest = hashlib.sha256()
    for name in _SOURCES:
        top = _TREE / name
        files = sorted(path for path in top.rglob("*") if path.is_file()) if top.is_dir() else [top]
        for path in files:
            if "__pycache__" in path.parts or path.suffix == ".pyc" or ".egg-info" in str(path) or not path.is_file():
                continue
            digest.update(f"{path.relative_to(_TREE)}\0{path.stat().st_mode & 0o111:o}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
