# SPDX-License-Identifier: Apache-2.0
"""`make fuzz FUZZ_SECONDS=N` or `python -m torture.fuzz --seconds N`: all targets or those named, for so long together.

With atheris (pip install atheris; wheels exist for Python 3.11 and later) the search is guided by coverage, else by
hypothesis. An input that breaks a target is kept in the corpus, and from then on every test run tries it again; with
`--keep` so are inputs that reach code which no kept one does, within the bounds of `torture.kept`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torture.kept import CORPUS, keep, seeds, write
from torture.scenario import scratch
from torture.table import Row, aligned

if TYPE_CHECKING:
    from hypothesis import strategies as st

NAMES = tuple(sorted(path.name for path in CORPUS.iterdir() if path.is_dir()))
_WORKERS = 2
_FOUND = ("crash-", "timeout-", "oom-")
_HEADS = ("target", "inputs", "seconds", "edges", "corpus", "kept", "findings")
# The merge runs every input again, and begins anew behind one that it does not survive.
_MERGE_SEC = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How many inputs one target got in how many seconds, and the first one that broke it.

    `edges` of the code were reached, by `corpus` inputs that each reached something new; None without coverage. `kept`
    of these are new files.
    """

    name: str
    tried: int
    seconds: float
    edges: int | None = None
    corpus: int | None = None
    kept: int = 0
    broken: bytes | None = None
    said: str = ""

    def cells(self) -> tuple[str, ...]:
        known = ("-" if number is None else str(number) for number in (self.edges, self.corpus))
        finding = "-" if self.broken is None else f"BROKEN by {len(self.broken)} bytes"
        return (self.name, str(self.tried), f"{self.seconds:.0f}", *known, str(self.kept), finding)


def table(outcomes: Iterable[Outcome]) -> str:
    """All targets, one a line."""
    return aligned([_HEADS, *(outcome.cells() for outcome in outcomes)])


def changed(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """Good inputs with pieces taken out, put in, doubled and cut off."""
    from hypothesis import strategies as st

    def change(seed: bytes, cuts: list[tuple[float, int, bytes]], end: float) -> bytes:
        for place, drop, insert in cuts:
            at = int(place * len(seed))
            seed = seed[:at] + insert + seed[at + drop :]
        return seed[: int(end * len(seed)) + 1]

    telling = st.sampled_from(
        [b"", b"\0", b"\n", b"\xff\xff\xff\xff", b'"', b"{", b"}", b"-1", b"0" * 20, b"9" * 20, b"null"]
    )
    cut = st.tuples(st.floats(0, 1), st.integers(0, 12), st.one_of(telling, st.binary(max_size=6)))
    ends = st.one_of(st.just(1.0), st.floats(0, 1))
    return st.builds(change, st.sampled_from(seeds), st.lists(cut, max_size=5), ends)


# --- one target in a process of its own


def _searched(name: str, seconds: int, directory: str) -> None:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    from torture.targets import TARGETS

    tried = 0
    last = b""

    @settings(max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(changed(list(seeds(name).values())), st.binary(max_size=300)))
    def once(data: bytes) -> None:
        nonlocal tried, last
        tried, last = tried + 1, data
        TARGETS[name](data)

    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            once()
    except BaseException:
        Path(directory, "crash-found").write_bytes(last)
        raise
    finally:
        print(f"Done {tried} runs", file=sys.stderr)


# --- all of them


def guided() -> bool:
    """Whether the search is guided by coverage."""
    return importlib.util.find_spec("atheris") is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """One target in processes of their own, with what they write: their own files, and those of the target."""

    name: str
    directory: Path
    written: str

    def made(self, folder: str, inputs: Iterable[bytes] = ()) -> Path:
        """A folder with these inputs."""
        path = self.directory / folder
        path.mkdir()
        for number, data in enumerate(inputs):
            (path / f"seed{number}").write_bytes(data)
        return path

    def run(self, *words: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """A module of these, with its options, in a process of its own."""
        environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "TMPDIR": self.written}
        return subprocess.run(
            [sys.executable, "-m", *words],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )

    def guide(self, *options: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """libFuzzer with these options. It runs itself again to merge, by the name of a program: so it gets one."""
        program = self.directory / "again"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m torture.guided {self.name} $0 "$@"\n')
        program.chmod(0o755)
        limits = ("-max_len=4096", "-timeout=20", "-rss_limit_mb=1024", f"-artifact_prefix={self.directory}/")
        return self.run("torture.guided", self.name, os.fspath(program), *limits, *options, timeout=timeout)

    def new_ones(self, found: Path) -> list[bytes]:
        """The inputs that reach what the kept ones do not: libFuzzer's merge."""
        merged = self.made("merged", seeds(self.name).values())
        before = {path.name for path in merged.iterdir()}
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.guide("-merge=1", os.fspath(merged), os.fspath(found), timeout=_MERGE_SEC)
        return [path.read_bytes() for path in merged.iterdir() if path.name not in before]


def _fuzz_one(name: str, seconds: int, *, keeps: bool) -> Outcome:
    # The fuzzer ends its process without a clean-up: what a target writes has to be below what is removed here.
    with (
        tempfile.TemporaryDirectory(prefix="vmfork-fuzz.") as directory,
        tempfile.TemporaryDirectory(prefix="vmfork-fuzz.", dir=scratch()) as written,
    ):
        search, began = _Search(name=name, directory=Path(directory), written=written), time.monotonic()
        found = search.made("found", seeds(name).values())
        if guided():
            run = search.guide(f"-max_total_time={seconds}", "-print_final_stats=1", os.fspath(found))
        else:
            run = search.run("torture.fuzz", "--one", name, "--seconds", str(seconds), "--directory", directory)
        took = time.monotonic() - began
        broken = [path.read_bytes() for path in search.directory.iterdir() if path.name.startswith(_FOUND)]
        if not broken and run.returncode != 0:
            broken = [b""]
        for number, data in enumerate(broken):
            write(name, f"found-{int(time.time())}-{number}", data)
        runs = re.findall(r"(?:Done|executed_units:|^#)\s*(\d+)", run.stderr, re.MULTILINE)
        reached = re.findall(r"cov: (\d+) ft: \d+ corp: (\d+)/", run.stderr)
        return Outcome(
            name=name,
            tried=max((int(number) for number in runs), default=0),
            seconds=took,
            edges=int(reached[-1][0]) if reached else None,
            corpus=int(reached[-1][1]) if reached else None,
            kept=keep(name, search.new_ones(found)) if keeps and guided() and not broken else 0,
            broken=broken[0] if broken else None,
            said=run.stderr[-2000:],
        )


def fuzz(seconds: int, names: tuple[str, ...] = NAMES, *, keeps: bool = False) -> Iterator[Outcome]:
    """Each target in turn, so that all together take about so long; with `keeps` what is interesting is kept."""
    each = max(1, seconds * _WORKERS // len(names))
    with ThreadPoolExecutor(_WORKERS) as pool:
        yield from pool.map(lambda name: _fuzz_one(name, each, keeps=keeps), names)


def fuzz_row(seconds: int) -> Iterator[Row]:
    """All targets as one row."""
    row = Row(name="hostile input")
    for outcome in fuzz(seconds):
        row.cases += outcome.tried
        row.check(outcome.tried > 0, f"{outcome.name} tried nothing: {outcome.said[-300:]}")
        row.check(outcome.broken is None, f"{outcome.name} was broken: {outcome.said[-600:]}")
    row.note = f"{len(NAMES)} targets, {'atheris' if guided() else 'hypothesis'}"
    yield row


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz everything that reads what somebody else wrote.")
    parser.add_argument("--seconds", type=int, default=3600, help="for all targets together (3600)")
    parser.add_argument("--keep", action="store_true", help="keep inputs that reach new code in the corpus")
    parser.add_argument("--output", type=Path, help="write the table into this file, too")
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    parser.add_argument("target", nargs="*", choices=[*NAMES, []], help="only these")
    options = parser.parse_args()
    if options.one is not None:
        _searched(options.one, options.seconds, options.directory)
        return 0
    outcomes = []
    for outcome in fuzz(options.seconds, tuple(options.target) or NAMES, keeps=options.keep):
        outcomes.append(outcome)
        print("  ".join(outcome.cells()), file=sys.stderr, flush=True)
        if outcome.broken is not None:
            print(outcome.said, file=sys.stderr)
    told = table(outcomes)
    print(told)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(told + "\n")
    return 1 if any(outcome.broken is not None for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
