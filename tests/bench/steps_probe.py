# SPDX-License-Identifier: Apache-2.0
"""vmforkd with a clock between the steps from the edge to the page: `steps_probe.py FILE --root DIR`.

Runs until it is terminated, then writes to FILE, for each fork, the nanoseconds that each step took, and what the
kernel counted from the first instruction after the wake-up to the page. No reactor is started, so that nothing else
runs on its processor between two forks.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from vmfork.daemon import announcer, freshness, ledger, sources, watch
from vmfork.daemon.agent import Vmforkd
from vmfork.daemon.reactorprocess import ReactorProcess
from vmfork.edges import kmsg
from vmfork.intent import IntentFile
from vmfork.paths import Paths

now = time.monotonic_ns
marks: list[tuple[str, int]] = []
forks: list[dict[str, dict[str, int]]] = []
at_begin: dict[str, int] = {}


def counted() -> dict[str, int]:
    """So far: waits (the CPU was given up), preemptions (it was taken away), page faults, ns of computing, ns."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "waits": usage.ru_nvcsw,
        "preemptions": usage.ru_nivcsw,
        "faults": usage.ru_minflt + usage.ru_majflt,
        "computing": time.thread_time_ns(),
        "all": now(),
    }


def between(owner: Any, name: str, before: str | None, during: str) -> None:
    """Note when the function begins (what came before it is the step `before`) and when it ends (the step `during`)."""
    plain: Callable[..., object] = getattr(owner, name)

    @functools.wraps(plain)
    def timed(*arguments: Any, **named: Any) -> object:
        if before is not None:
            marks.append((before, now()))
        result = plain(*arguments, **named)
        marks.append((during, now()))
        return result

    setattr(owner, name, timed)


def begin(owner: Any, name: str) -> None:
    """The first step ends where this function begins."""
    plain: Callable[..., object] = getattr(owner, name)

    def timed(*arguments: Any) -> object:
        marks[:] = [("waking up", now())]
        at_begin.update(counted())
        return plain(*arguments)

    setattr(owner, name, timed)


def finish(owner: Any, name: str) -> None:
    """How old the record is comes after the page: the kernel's stamp, where the first step began, is known here."""

    plain: Callable[..., int | None] = getattr(owner, name)

    def timed(paths: Paths, record_us: int | None, **named: Any) -> int | None:
        if record_us is not None and marks[-1][0] == "page":
            end = counted()
            last, found = record_us * 1000, dict[str, int]()
            for step, at in marks:
                found[step] = found.get(step, 0) + at - last
                last = at
            forks.append({"steps": found, "counted": {name: end[name] - at_begin[name] for name in end}})
        return plain(paths, record_us, **named)

    setattr(owner, name, timed)


def main() -> None:
    begin(watch.Watch, "_on_readable")
    finish(announcer, "record_age_us")
    between(kmsg.Kmsg, "drain", "asking who is ready", "reading the log")
    between(sources.Sources, "read_truths", None, "reading the truths, twice")
    between(watch, "decide", None, "deciding")
    between(freshness, "new_token", None, "drawing a token")
    between(IntentFile, "write", "making the event", "note in RAM")
    between(ledger.Ledger, "publish", None, "page")
    ReactorProcess.start = lambda self: None  # type: ignore[method-assign]
    try:
        Vmforkd(Paths(sys.argv[3])).run()
    finally:
        with open(sys.argv[1], "w", encoding="ascii") as file:
            json.dump(forks, file)


if __name__ == "__main__":
    main()
