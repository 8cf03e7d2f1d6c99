# SPDX-License-Identifier: Apache-2.0
"""The reader of vmfork.h, in a program with gcc's sanitizers for addresses and undefined behaviour.

The inputs are those of the other targets' fuzzers, so what C does with them guides no search: clang's own fuzzer could,
but its runtime library is in no package that the tests need otherwise.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("page_reader.c")
INCLUDE = Path(__file__).resolve().parents[2] / "agent/include"
_FLAGS = ("-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-format-truncation")
_SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


class _Reader:
    """The program, built and running in a directory that `close` removes."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="vmfork-fuzz."))
        program = self.directory / "page_reader"
        subprocess.run(["gcc", *_FLAGS, *_SANITIZERS, f"-I{INCLUDE}", SOURCE, "-o", program], check=True)
        for root in ("odd", "live"):
            (self.directory / root / "run/vmfork").mkdir(parents=True)
        with (self.directory / "said").open("wb") as said:
            self.process = subprocess.Popen(
                [program, self.directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
            )

    def reads(self, data: bytes) -> bool:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(struct.pack("=I", len(data)) + data)
            self.process.stdin.flush()
        except BrokenPipeError:
            return False
        return self.process.stdout.readline() == b"fine\n"

    def said(self) -> str:
        """Its last words; it has ended, or does now."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        return (self.directory / "said").read_text(errors="replace")[:2000]


_readers: list[_Reader] = []


def c_page(data: bytes) -> None:
    """A page with these bytes: read rightly, or refused, without a step beside it."""
    if not _readers:
        _readers.append(_Reader())
    if not _readers[0].reads(data[:65536]):
        raise AssertionError(end())


def end() -> str:
    """End the program, if it runs; what it said."""
    if not _readers:
        return ""
    reader = _readers.pop()
    said = reader.said()
    shutil.rmtree(reader.directory, ignore_errors=True)
    return said
