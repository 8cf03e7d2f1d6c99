# SPDX-License-Identifier: Apache-2.0
"""Reseeding: clones of one process, made by os.fork() without its own reseeding, draw different numbers."""

from __future__ import annotations

import json
import os
import random
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

import vmfork
from support.forkservice import ForkService
from support.tools import unavailable


@pytest.fixture(autouse=True)
def empty_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMFORK_ROOT", str(tmp_path))


def test_a_reseeded_generator_leaves_its_sequence() -> None:
    drawn = set()
    for _ in range(5):
        generator = random.Random(1)
        vmfork.reseed(generator)
        drawn.add(generator.random())
    assert len(drawn) == 5
    assert random.Random(1).random() not in drawn


def test_a_pending_gaussian_is_forgotten() -> None:
    generators = [random.Random(1), random.Random(1)]
    for generator in generators:
        generator.gauss(0, 1)
        vmfork.reseed(generator)
    assert generators[0].gauss(0, 1) != generators[1].gauss(0, 1)


def test_system_random_is_left_alone() -> None:
    vmfork.reseed(random.SystemRandom())


def test_the_generator_of_the_kernel_is_accepted_through_a_subclass() -> None:
    class Mine(random.Random):
        pass

    generator = Mine(1)
    vmfork.reseed(generator)
    assert generator.random() != Mine(1).random()


@pytest.mark.parametrize("thing", [object(), random, ssl, None, 7])
def test_what_is_no_generator_is_refused(thing: object) -> None:
    with pytest.raises(TypeError, match="no generator"):
        vmfork.reseed(thing)


# A process whose clones are copies of it in memory: os.fork() here, a snapshot there. Python reseeds `random` in its
# own children and tempfile notices another PID, so both are put back into the state of the parent, as a VM fork leaves
# them. Each child waits until its parent was told of the fork, and then says what it draws.
CLONES = r"""
import json, os, random, sys, tempfile, warnings
import vmfork
warnings.simplefilter("ignore")
random.seed(1)
next(tempfile._get_candidate_names())
names = tempfile._name_sequence
state, temporary = random.getstate(), names.rng.getstate()

def draw():
    drawn = {"random": random.random(), "gauss": random.gauss(0, 1), "tempfile": next(names)}
    if "numpy" in sys.modules:
        drawn["numpy"] = float(sys.modules["numpy"].random.random())
    os.write(1, json.dumps(drawn).encode() + b"\n")
    os._exit(0)

def clone():
    random.setstate(state)
    names._rng_pid = os.getpid()
    names._rng = random.Random()
    names._rng.setstate(temporary)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(1)

PREPARE

children = []
for _ in range(5):
    child = os.fork()
    if child == 0:
        clone()
        if "reseed" in sys.argv:
            vmfork.reseed_on_fork()
            vmfork.reseed_on_fork()
            vmfork.register_after_fork(draw)
            import signal; signal.alarm(30)
            while True: signal.pause()
        draw()
    children.append(child)
for child in children:
    os.waitpid(child, 0)
"""


def draws(root: Path, prepare: str, *arguments: str, interpreter: str = sys.executable) -> list[dict[str, object]]:
    agent = Path(vmfork.__file__).parents[1]
    environment = {**os.environ, "VMFORK_ROOT": str(root), "PYTHONPATH": str(agent)}
    with ForkService(root) as service:
        command = [interpreter, "-c", CLONES.replace("PREPARE", prepare), *arguments]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            if "reseed" in arguments:
                service.await_subscribers(5)
                service.fork()
            output, _ = process.communicate(timeout=60)
    return [json.loads(line) for line in output.splitlines()]


def test_without_reseeding_clones_draw_the_same(tmp_path: Path) -> None:
    drawn = draws(tmp_path, "")
    assert len(drawn) == 5
    assert all(one == drawn[0] for one in drawn)


def test_with_reseeding_clones_draw_pairwise_different_values(tmp_path: Path) -> None:
    drawn = draws(tmp_path, "", "reseed")
    for name in ("random", "gauss", "tempfile"):
        assert len({one[name] for one in drawn}) == 5, name


def test_openssl_still_draws_after_a_reseed_of_the_process(tmp_path: Path) -> None:
    drawn = draws(tmp_path, "import ssl; ssl.RAND_bytes(8)", "reseed")
    assert len(drawn) == 5


def python_with_numpy() -> str:
    for interpreter in (sys.executable, "/usr/bin/python3"):
        if subprocess.run([interpreter, "-c", "import numpy"], capture_output=True, check=False).returncode == 0:
            return interpreter
    unavailable("numpy is not installed (apt-get install python3-numpy)")
    return ""


def test_the_legacy_state_of_numpy_is_reseeded(tmp_path: Path) -> None:
    interpreter = python_with_numpy()
    same = draws(tmp_path / "same", "import numpy.random", interpreter=interpreter)
    assert len({one["numpy"] for one in same}) == 1
    drawn = draws(tmp_path / "different", "import numpy.random", "reseed", interpreter=interpreter)
    assert len({one["numpy"] for one in drawn}) == 5


def test_generators_of_numpy_are_reseeded() -> None:
    program = """
import numpy, vmfork
from numpy.random import MT19937, PCG64, SFC64, Generator, Philox, RandomState
for make in (lambda: numpy.random.default_rng(1), lambda: RandomState(1), lambda: Generator(SFC64(1)),
             lambda: Generator(Philox(1)), lambda: Generator(MT19937(1))):
    first, second = make(), make()
    vmfork.reseed(first)
    vmfork.reseed(second)
    assert len({float(g.random()) for g in (first, second, make())}) == 3, first
bits = PCG64(1)
vmfork.reseed(bits)
assert bits.random_raw() != PCG64(1).random_raw()
"""
    agent = Path(vmfork.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(agent)}
    done = subprocess.run(
        [python_with_numpy(), "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
