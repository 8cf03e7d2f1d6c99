# SPDX-License-Identifier: Apache-2.0
"""A class of faults in a process of its own, so that one that hangs is ended and said, and the next has its turn."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

from torture.table import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultClass:
    """What `rows` tries takes at most `bound_sec`, or does not end."""

    name: str
    bound_sec: float
    rows: Callable[[], Iterator[Row]]


def bounded(one: FaultClass) -> Iterator[Row]:
    """The rows of this class, each when it is done; the last one says so if the class did not end well.

    All that it started and that stayed in its process group is gone afterwards. The directory of a guest in which a
    class hung is left where `scenario.scratch` put it, with its log.
    """
    # Forked, not spawned: nothing has to be named, pickled or imported again. This process has no threads.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(one, sender))
    child.start()
    sender.close()
    try:
        yield from _received(one, receiver)
    finally:
        assert child.pid is not None
        # Before the child is waited for: until then its number is not another's.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.join()
        receiver.close()


def _send(one: FaultClass, sender: Connection) -> None:
    os.setpgid(0, 0)
    for row in one.rows():
        sender.send(row)
    sender.send(None)


def _received(one: FaultClass, receiver: Connection) -> Iterator[Row]:
    end = time.monotonic() + one.bound_sec
    while receiver.poll(max(0.0, end - time.monotonic())):
        try:
            row = receiver.recv()
        except EOFError:
            yield _cut_short(one, "ended by itself before all was tried")
            return
        if row is None:
            return
        row.balance()
        yield row
    yield _cut_short(one, f"did not end within {one.bound_sec:.0f} s")


def _cut_short(one: FaultClass, why: str) -> Row:
    row = Row(name=one.name)
    row.check(False, why)
    return row
