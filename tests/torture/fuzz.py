# SPDX-License-Identifier: Apache-2.0
"""`make fuzz SECONDS=N` or `python -m torture.fuzz --seconds N`: all targets, or those named, for so long together.

With atheris (pip install atheris; wheels exist for Python 3.11 and later) the search is guided by coverage, else by
hypothesis. An input that breaks a target is kept in the corpus, and from then on every test run tries it again.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torture.scenario import scratch
from torture.table import Row

if TYPE_CHECKING:
    from hypothesis import strategies as st

CORPUS = Path(__file__).with_name("corpus")
NAMES = tuple(sorted(path.name for path in CORPUS.iterdir() if path.is_dir()))
_WORKERS = 2
_FOUND = ("crash-*", "timeout-*", "oom-*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How many inputs one target got, and the first one that broke it."""

    name: str
    tried: int
    broken: bytes | None = None
    said: str = ""


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


def _guided(name: str, seconds: int, directory: str) -> None:
    # No stubs, and not everywhere installed.
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["vmfork"]):
        from torture.targets import TARGETS, seeds

    for number, data in enumerate(seeds(name).values()):
        Path(directory, f"seed{number}").write_bytes(data)
    options = [
        f"-max_total_time={seconds}",
        "-max_len=4096",
        "-timeout=20",
        "-rss_limit_mb=1024",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={directory}/", directory], TARGETS[name])
    atheris.Fuzz()


def _searched(name: str, seconds: int, directory: str) -> None:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    from torture.targets import TARGETS, seeds

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


def _fuzz_one(name: str, seconds: int) -> Outcome:
    # The fuzzer ends its process without a clean-up: what a target writes has to be below what is removed here.
    with (
        tempfile.TemporaryDirectory(prefix="vmfork-fuzz.") as directory,
        tempfile.TemporaryDirectory(prefix="vmfork-fuzz.", dir=scratch()) as written,
    ):
        environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "TMPDIR": written}
        run = subprocess.run(
            [sys.executable, "-m", "torture.fuzz", "--one", name, "--seconds", str(seconds), "--directory", directory],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        runs = re.findall(r"(?:Done|executed_units:|^#)\s*(\d+)", run.stderr, re.MULTILINE)
        tried = max((int(number) for number in runs), default=0)
        found = [
            path.read_bytes()
            for path in Path(directory).iterdir()
            if path.name.startswith(("crash-", "timeout-", "oom-"))
        ]
        if not found and run.returncode != 0:
            found = [b""]
        for number, data in enumerate(found):
            text = data.hex()
            lines = "\n".join(text[at : at + 96] for at in range(0, len(text), 96))
            (CORPUS / name / f"found-{int(time.time())}-{number}.hex").write_text(lines + "\n")
        return Outcome(name=name, tried=tried, broken=found[0] if found else None, said=run.stderr[-2000:])


def fuzz(seconds: int, names: tuple[str, ...] = NAMES) -> Iterator[Outcome]:
    """Each target in turn, so that all together take about so long."""
    each = max(1, seconds * _WORKERS // len(names))
    with ThreadPoolExecutor(_WORKERS) as pool:
        yield from pool.map(lambda name: _fuzz_one(name, each), names)


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
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    parser.add_argument("target", nargs="*", choices=[*NAMES, []], help="only these")
    options = parser.parse_args()
    if options.one is not None:
        work = _guided if guided() else _searched
        work(options.one, options.seconds, options.directory)
        return 0
    broken = 0
    for outcome in fuzz(options.seconds, tuple(options.target) or NAMES):
        print(
            f"{outcome.name:<16} {outcome.tried:>12} inputs  {'BROKEN' if outcome.broken is not None else 'fine'}",
            flush=True,
        )
        if outcome.broken is not None:
            broken += 1
            print(outcome.said)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
