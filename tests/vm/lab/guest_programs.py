# SPDX-License-Identifier: Apache-2.0
"""Runs in the guest: programs that hold random state when the snapshot is taken, and go on in each clone.

One Python process each that is plain, threaded, has a pool of worker processes, or runs an asyncio loop; each of them
once with `vmfork.reseed_on_fork()` and once without, which shows what clones share. They draw before the snapshot, and
again when vmfork has told them of a fork. argv[1] is a path: with ".ready" appended it appears when all of them wait
for a fork, itself when all have drawn after one. Standard library and vmfork only, Python 3.11.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import multiprocessing.synchronize
import os
import random
import ssl
import sys
import tempfile
import threading
import traceback
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import vmfork

# Who drew (a thread, a worker, a task): what: the value.
Drawn = dict[str, dict[str, str]]
Ready = Callable[[Drawn], None]

_PATIENCE_SEC = 170
_PARALLEL = range(3)
_WORKERS = 2


def draw() -> dict[str, str]:
    """One of everything that clones must not share."""
    with tempfile.NamedTemporaryFile() as file:
        return {
            "random": random.random().hex(),
            # Drawn in pairs, of which the second is kept for later: state beside that of the generator.
            "gauss": random.gauss(0, 1).hex(),
            "tempfile": os.path.basename(file.name),
            "openssl": ssl.RAND_bytes(16).hex(),
            "urandom": os.urandom(16).hex(),
            "uuid4": str(uuid.uuid4()),
        }


def adapt(*, reseeding: bool) -> threading.Event:
    """What each program does at its start; the event is set after each fork, when this process is reseeded or not."""
    told = threading.Event()
    if reseeding:
        vmfork.reseed_on_fork()
    vmfork.register_after_fork(told.set)
    return told


def await_fork(told: threading.Event) -> None:
    """Wait until this process was told."""
    if not told.wait(_PATIENCE_SEC):
        raise TimeoutError("nobody told this process of a fork")


def plain(reseeding: bool, ready: Ready) -> Drawn:
    """One thread of its own, and the library's."""
    told = adapt(reseeding=reseeding)
    ready({"main": draw()})
    await_fork(told)
    return {"main": draw()}


def threaded(reseeding: bool, ready: Ready) -> Drawn:
    """Threads share `random` and `tempfile`; in OpenSSL each of them has a generator of its own."""
    told = adapt(reseeding=reseeding)
    threads = [ThreadPoolExecutor(1) for _ in _PARALLEL]

    def in_turn() -> Drawn:
        return {f"thread {number}": threads[number].submit(draw).result() for number in _PARALLEL}

    ready(in_turn())
    await_fork(told)
    return in_turn()


_told: threading.Event
_meeting: multiprocessing.synchronize.Barrier


def _begin_worker(told: threading.Event, meeting: multiprocessing.synchronize.Barrier) -> None:
    # The worker's own copy, which the library's thread in the worker sets.
    global _told, _meeting
    _told, _meeting = told, meeting


def _in_worker(forked: bool) -> tuple[int, dict[str, str]]:
    if forked:
        await_fork(_told)
    # They meet in each task, so each of them takes one.
    _meeting.wait(_PATIENCE_SEC)
    return os.getpid(), draw()


def pool(reseeding: bool, ready: Ready) -> Drawn:
    """Worker processes that live before the snapshot and take tasks after it."""
    told = adapt(reseeding=reseeding)
    context = multiprocessing.get_context("fork")
    with context.Pool(_WORKERS, _begin_worker, (told, context.Barrier(_WORKERS))) as workers:

        def in_each(*, forked: bool) -> Drawn:
            found = sorted(workers.map(_in_worker, [forked] * _WORKERS, chunksize=1))
            return {f"worker {number}": drawn for number, (_, drawn) in enumerate(found)}

        ready(in_each(forked=False))
        return in_each(forked=True)


def in_asyncio(reseeding: bool, ready: Ready) -> Drawn:
    """A loop that runs, with tasks that wait."""

    async def task(woken: asyncio.Event) -> dict[str, str]:
        await asyncio.wait_for(woken.wait(), _PATIENCE_SEC)
        return draw()

    async def main() -> Drawn:
        adapt(reseeding=reseeding)
        woken = asyncio.Event()
        vmfork.register_after_fork(asyncio.get_running_loop().call_soon_threadsafe, woken.set)
        tasks = {f"task {number}": asyncio.create_task(task(woken)) for number in _PARALLEL}
        ready({"main": draw()})
        return {name: await one for name, one in tasks.items()}

    return asyncio.run(main())


PROGRAMS = {"plain": plain, "threaded": threaded, "pool": pool, "asyncio": in_asyncio}


def start(program: Callable[[bool, Ready], Drawn], *, reseeding: bool) -> int:
    """Run a program in a process of its own; the descriptor has a line when it is ready and one when it is done."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        return reader

    def say(drawn: Drawn) -> None:
        os.write(writer, json.dumps(drawn).encode() + b"\n")

    try:
        say(program(reseeding, say))
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def main(path: str) -> None:
    """Start all, and write down what they drew."""
    started = {
        f"{name}, {how}": os.fdopen(start(program, reseeding=how == "reseeded"))
        for name, program in PROGRAMS.items()
        for how in ("reseeded", "as it was")
    }
    before = {name: json.loads(lines.readline()) for name, lines in started.items()}
    os.close(os.open(f"{path}.ready", os.O_WRONLY | os.O_CREAT))
    after = {name: json.loads(lines.readline()) for name, lines in started.items()}
    with open(f"{path}.part", "w", encoding="ascii") as file:
        json.dump({name: {"before": before[name], "after": after[name]} for name in started}, file)
    os.rename(f"{path}.part", path)


if __name__ == "__main__":
    main(sys.argv[1])
