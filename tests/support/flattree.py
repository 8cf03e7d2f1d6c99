# SPDX-License-Identifier: Apache-2.0
"""Devicetrees for tests: source text through the real dtc into a directory like /proc/device-tree.

A node becomes a directory, a property a file with its raw bytes, exactly as the kernel shows a tree.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from support.tools import need

_MAGIC = 0xD00DFEED
_BEGIN_NODE, _END_NODE, _PROPERTY, _NOP, _END = 1, 2, 3, 4, 9


def compile_tree(source: str) -> bytes:
    """The flattened tree that dtc makes of this text (without the `/dts-v1/;` line); warnings are not shown."""
    dtc = need("dtc", package="device-tree-compiler")
    command = [dtc, "-q", "-q", "-I", "dts", "-O", "dtb", "-o", "-", "-"]
    done = subprocess.run(command, input=f"/dts-v1/;\n{source}".encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def unflatten(blob: bytes, directory: Path) -> Path:
    """Lay a flattened tree out below `directory`, which becomes its root node."""
    magic, _, structure, strings = struct.unpack_from(">4I", blob)
    assert magic == _MAGIC
    node = directory
    depth = 0
    offset = structure
    while True:
        (token,) = struct.unpack_from(">I", blob, offset)
        offset += 4
        if token == _BEGIN_NODE:
            name = _string(blob, offset)
            offset += _padded(len(name) + 1)
            node = node / name if depth else directory
            depth += 1
            node.mkdir(parents=True, exist_ok=depth == 1)
        elif token == _END_NODE:
            depth -= 1
            node = node.parent
        elif token == _PROPERTY:
            length, name_offset = struct.unpack_from(">II", blob, offset)
            offset += 8
            (node / _string(blob, strings + name_offset)).write_bytes(blob[offset : offset + length])
            offset += _padded(length)
        elif token == _END:
            return directory
        else:
            assert token == _NOP, token


def grow(source: str, directory: Path) -> Path:
    """Compile and lay out in one step."""
    return unflatten(compile_tree(source), directory)


def _string(blob: bytes, offset: int) -> str:
    return blob[offset : blob.index(b"\0", offset)].decode("ascii")


def _padded(length: int) -> int:
    return (length + 3) & ~3
