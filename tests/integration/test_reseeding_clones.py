# SPDX-License-Identifier: Apache-2.0
"""Five copies of one running Python program, told of a fork by a real vmforkd: what they draw afterwards differs.

os.fork() stands in for the snapshot. Python itself reseeds `random` in such children, and tempfile notices another
PID, which in a clone of the whole machine nobody does: the state of the original is put back in each copy first.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.fakeguest import FakeGuest
from support.runningdaemon import PATIENCE_SEC, RunningDaemon, environment

CLONES = 5

# argv: which kind of program, and whether it reseeds.
PROGRAM = r"""
import json, os, random, sys, tempfile, threading
import vmfork

kind, reseeding = sys.argv[1], sys.argv[2] == "reseed"
random.seed(1)
next(tempfile._get_candidate_names())
names = tempfile._name_sequence
state, names_state = random.getstate(), names.rng.getstate()
told = threading.Event()

def as_the_original():
    random.setstate(state)
    names._rng_pid, names._rng = os.getpid(), random.Random()
    names._rng.setstate(names_state)

def adapt():
    if reseeding:
        vmfork.reseed_on_fork()
    vmfork.register_after_fork(told.set)

def draw():
    return [random.random(), random.gauss(0, 1), next(names)]

def plain():
    adapt()
    yield
    told.wait()
    return {"main": draw()}

def threaded():
    # Its threads share the generator of `random`, and each has one of its own, which only its owner can reseed.
    own = [random.Random(number) for number in range(3)]
    drawn, turns, threads = {}, [threading.Event() for _ in range(4)], []
    adapt()
    def work(number):
        told.wait()
        turns[number].wait()
        drawn[f"shared {number}"] = draw()
        drawn[f"own {number}"] = [own[number].random()]
        turns[number + 1].set()
    if reseeding:
        vmfork.unregister_after_fork(told.set)
        for one in own:
            vmfork.register_after_fork(vmfork.reseed, one)
        vmfork.register_after_fork(told.set)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    turns[0].set()
    yield
    for thread in threads:
        thread.join()
    return drawn

def in_worker(number):
    told.wait()
    meeting.wait()
    return draw()

def begin_worker(barrier):
    global meeting
    meeting = barrier
    as_the_original()

def pool():
    import multiprocessing
    adapt()
    context = multiprocessing.get_context("fork")
    # The workers meet in each task, so each of them takes one.
    with context.Pool(2, begin_worker, (context.Barrier(2),)) as workers:
        found = workers.map_async(in_worker, range(2), chunksize=1)
        yield
        return {f"worker {number}": drawn for number, drawn in enumerate(found.get(60))}

def in_asyncio():
    import asyncio
    loop, woken, drawn = asyncio.new_event_loop(), asyncio.Event(), {}
    adapt()
    vmfork.register_after_fork(loop.call_soon_threadsafe, woken.set)
    async def task(number):
        await woken.wait()
        drawn[f"task {number}"] = draw()
    async def follow():
        await asyncio.gather(*(task(number) for number in range(3)))
    yield
    loop.run_until_complete(follow())
    return drawn

def run(make):
    as_the_original()
    steps = make()
    next(steps)
    os.write(1, b"ready\n")
    try:
        next(steps)
    except StopIteration as end:
        os.write(1, json.dumps(end.value).encode() + b"\n")
    os._exit(0)

make = {"plain": plain, "threaded": threaded, "pool": pool, "asyncio": in_asyncio}[kind]
children = []
for _ in range(5):
    child = os.fork()
    if child == 0:
        run(make)
    children.append(child)
for child in children:
    os.waitpid(child, 0)
"""


def drawn_after_a_fork(guest: FakeGuest, kind: str, what: str) -> list[dict[str, list[Any]]]:
    """What each of the copies drew; a copy that did not answer is missing."""
    with (
        RunningDaemon(guest),
        subprocess.Popen(
            ["timeout", "-k", "1", str(3 * PATIENCE_SEC), sys.executable, "-W", "ignore", "-c", PROGRAM, kind, what],
            env=environment() | {"VMFORK_ROOT": str(guest.root)},
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(CLONES)] == ["ready\n"] * CLONES
        guest.fork(os.urandom(16))
        return [json.loads(line) for line in process.stdout]


@pytest.mark.parametrize("kind", ["plain", "threaded", "pool", "asyncio"])
def test_without_reseeding_all_copies_draw_the_same(guest: FakeGuest, kind: str) -> None:
    drawn = drawn_after_a_fork(guest, kind, "keep")
    assert len(drawn) == CLONES
    assert all(one == drawn[0] for one in drawn)


@pytest.mark.parametrize("kind", ["plain", "threaded", "pool", "asyncio"])
def test_with_reseeding_no_two_copies_draw_the_same(guest: FakeGuest, kind: str) -> None:
    drawn = drawn_after_a_fork(guest, kind, "reseed")
    assert len(drawn) == CLONES
    values = [(name, number, value) for one in drawn for name in one for number, value in enumerate(one[name])]
    assert len(set(values)) == len(values) == CLONES * sum(len(one) for one in drawn[0].values())


def test_the_workers_of_one_pool_differ_too(guest: FakeGuest) -> None:
    for one in drawn_after_a_fork(guest, "pool", "reseed"):
        first, second = one.values()
        assert not set(first) & set(second)


# The functions of a spawned worker are found by import, so this is a module.
SPAWNING = """
import multiprocessing, random, threading
import vmfork

told = threading.Event()

def seed():
    random.seed(1)
    vmfork.register_after_fork(told.set)

def draw():
    told.wait()
    return random.random()

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1, vmfork.reseed_on_fork) as workers:
        workers.apply(seed)
        print("ready", flush=True)
        print(workers.apply(draw))
"""


def test_a_spawned_worker_is_reached_by_its_initializer(guest: FakeGuest, tmp_path: Path) -> None:
    (tmp_path / "spawning.py").write_text(SPAWNING)
    with (
        RunningDaemon(guest),
        subprocess.Popen(
            ["timeout", "-k", "1", str(3 * PATIENCE_SEC), sys.executable, str(tmp_path / "spawning.py")],
            env=environment() | {"VMFORK_ROOT": str(guest.root)},
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        guest.fork(os.urandom(16))
        assert float(process.stdout.readline()) != random.Random(1).random()
