# SPDX-License-Identifier: Apache-2.0
"""Python's bytecode for trees that were only unpacked, so that an emulated guest need not compile it at every boot.

Bytecode is the same on every architecture: an unpacked Python of this host's architecture and of the guest's release
compiles for the guest too, run by its own dynamic loader. It is marked as never to be checked, for the times of files
are not kept.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from lab.host import LabError


def compile_tree(root: Path, *, python_root: Path) -> None:
    """Compile every module below `root`/usr/lib/python3* with the Python that lies, unpacked, in `python_root`."""
    usr = python_root / "usr"
    interpreters = [path for path in (usr / "bin").glob("python3.*") if path.name.removeprefix("python3.").isdigit()]
    libraries = list((root / "usr/lib").glob("python3*"))
    if len(interpreters) != 1:
        raise LabError(f"{python_root}: expected one Python, found {[path.name for path in interpreters]}")
    loader = (usr / "lib64/ld-linux-x86-64.so.2", "--library-path", usr / "lib/x86_64-linux-gnu")
    options = ("-q", "-q", "--invalidation-mode", "unchecked-hash", "-x", "/tests?/", "-s", root, "-p", "/")
    words: tuple[str | Path, ...] = (*loader, interpreters[0], "-m", "compileall", *options, *libraries)
    # A few files are broken on purpose, so the exit code says nothing.
    subprocess.run(
        [os.fspath(word) for word in words],
        env={"PYTHONHOME": os.fspath(usr), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        capture_output=True,
        check=False,
    )
    if not next(libraries[0].rglob("*.pyc"), None):
        raise LabError(f"no bytecode was made below {libraries[0]}")
