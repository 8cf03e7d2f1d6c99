# SPDX-License-Identifier: Apache-2.0
"""Which host keys, certificates and ports sshd is configured with, drop-ins included.

Reads what sshd_config(5) says about HostKey, HostCertificate, Port, ListenAddress and Include, and nothing else.
Files, lines and depth are bounded; a file that cannot be read is an ActionError, since keys could be missed.
"""

from __future__ import annotations

import glob
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from vmfork.errors import ActionError
from vmfork.paths import Paths

_MAX_DEPTH = 16
_MAX_BYTES = 1 << 20
_MAX_FILES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class SshdConfig:
    """Paths as written (absolute, not below the root), ports, and the addresses that sshd is bound to (none: all)."""

    host_keys: tuple[str, ...] = ()
    certificates: tuple[str, ...] = ()
    ports: tuple[int, ...] = (22,)
    addresses: tuple[str, ...] = ()


def read(paths: Paths) -> SshdConfig:
    """The configuration; without a file, sshd's defaults."""
    keys: list[str] = []
    certificates: list[str] = []
    ports: list[int] = []
    addresses: list[str] = []
    for keyword, words in _directives(paths, paths.sshd_config, depth=0, budget=[_MAX_FILES]):
        if keyword == "hostkey" and words[0].lower() != "none":
            keys.append(_absolute(words[0]))
        elif keyword == "hostcertificate" and words[0].lower() != "none":
            certificates.append(_absolute(words[0]))
        elif keyword == "port" and words[0].isdecimal() and 0 < int(words[0]) < 65536:
            ports.append(int(words[0]))
        elif keyword == "listenaddress":
            addresses.append(words[0])
    return SshdConfig(
        host_keys=tuple(dict.fromkeys(keys)),
        certificates=tuple(dict.fromkeys(certificates)),
        ports=tuple(dict.fromkeys(ports)) or (22,),
        addresses=tuple(dict.fromkeys(addresses)),
    )


def _absolute(path: str) -> str:
    # sshd resolves a relative HostKey against its working directory at start, which is / under every init.
    return os.path.join("/", path)


def _directives(paths: Paths, file: str, *, depth: int, budget: list[int]) -> Iterator[tuple[str, list[str]]]:
    """Keyword in lower case and its words, in the order in which sshd reads them, without conditional blocks."""
    budget[0] -= 1
    if depth > _MAX_DEPTH or budget[0] < 0:
        raise ActionError(f"{file}: too many or too deeply nested Include lines")
    for line in _lines(file):
        keyword, words = _split(line)
        if keyword == "match":
            # Neither keys nor ports may stand in a Match block, which reaches to the end of its file.
            return
        if keyword == "include":
            for pattern in words:
                absolute = pattern if pattern.startswith("/") else f"/etc/ssh/{pattern}"
                for found in sorted(glob.glob(paths.at(absolute))):
                    yield from _directives(paths, found, depth=depth + 1, budget=budget)
        elif keyword and words:
            yield keyword, words


def _lines(file: str) -> list[str]:
    try:
        # O_NONBLOCK: a FIFO in this place must not stop the reaction.
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            data = os.read(fd, _MAX_BYTES + 1)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ActionError(f"{file}: cannot be read: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise ActionError(f"{file}: is larger than {_MAX_BYTES} bytes")
    return data.decode("utf-8", "replace").splitlines()


def _split(line: str) -> tuple[str, list[str]]:
    """`Keyword words`, `Keyword=words` or `Keyword = "words"`; comments and what is not understood give nothing."""
    stripped = line.strip()
    if not stripped or stripped.startswith("#"):
        return "", []
    end = next((i for i, letter in enumerate(stripped) if letter in " \t="), len(stripped))
    rest = stripped[end:].lstrip(" \t")
    rest = rest[1:] if rest.startswith("=") else rest
    try:
        return stripped[:end].lower(), shlex.split(rest, comments=True)
    except ValueError:
        return "", []
