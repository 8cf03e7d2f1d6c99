# SPDX-License-Identifier: Apache-2.0
"""A guard against getting slower: ratios of things measured in turns on the same machine, never absolute times.

Load only ever adds: so the best time of each is compared, out of more and more until they are within the bound. Beside
each bound stands what an idle machine shows.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from bench import growth
from bench.crowd import hook_times, xargs_ms
from bench.edge import Watched, simple, vmforkd
from bench.footprint import memory_mib, start_ms, wake_ups
from bench.growth import fill_history
from bench.place import AGENT, HERE, build, environment, fake_daemon, guest_python, on_cpu, scratch, until
from bench.reaction import shipped
from bench.samples import Curve
from support.fakeguest import FakeGuest
from support.tools import need
from vmfork.history import KEPT


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    need("cc", package="gcc")
    with scratch() as name:
        yield Path(name)


def stays_within(
    bound: float, one: Callable[[], float], other: Callable[[], float], *, rounds: int = 5, attempts: int = 6
) -> None:
    """Fail unless the best of one is within the bound times the best of the other, taken in turns."""
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(attempts):
        for _ in range(rounds):
            ours.append(one())
            theirs.append(other())
        if min(ours) <= bound * min(theirs):
            return
    pytest.fail(f"{min(ours) / min(theirs):.2f} times as long, more than {bound:g}")


def rested(watched: Watched) -> float:
    """From the edge to the page, after a moment in which it went to sleep; watched from another CPU than its own."""
    with on_cpu(0):
        time.sleep(0.005)
        return watched.latency_us()


def seconds(*command: str, **more: str) -> float:
    """How long a program takes from its start to its end."""
    begin = time.perf_counter()
    subprocess.run(command, env=environment(**more), stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def bare_start() -> float:
    return seconds(guest_python(), "-I", "-c", "pass")


def test_edge_to_page_stays_within_reach_of_the_c_reference(directory: Path) -> None:
    reference = build("reference.c", directory / "reference")
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(vmforkd())
        other = stack.enter_context(simple(directory, "c", [str(reference)]))
        # Measured: 5 to 7; with all processors busy 8 to 11.
        stays_within(10, lambda: rested(own), lambda: rested(other), rounds=25)


def test_edge_to_page_stays_within_reach_of_a_bare_python_loop(directory: Path) -> None:
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(vmforkd())
        other = stack.enter_context(simple(directory, "python", [guest_python(), "-I", str(HERE / "bare.py")]))
        # Measured: 4 to 5; with all processors busy 4 to 6.
        stays_within(7, lambda: rested(own), lambda: rested(other), rounds=25)


def test_the_default_reaction_takes_no_longer_than_some_starts_of_python() -> None:
    with fake_daemon(prepare=shipped) as daemon:

        def reaction() -> float:
            begin = time.perf_counter()
            daemon.fork()
            return time.perf_counter() - begin

        # Measured: 10 to 19.
        stays_within(25, reaction, bare_start)


def test_the_daemon_starts_in_no_more_than_some_starts_of_python(tmp_path: Path) -> None:
    with FakeGuest(tmp_path / "guest") as guest:
        # Measured: 6.
        stays_within(8, lambda: start_ms(guest) / 1000, bare_start)


def test_fifty_hooks_cost_little_more_than_xargs(directory: Path) -> None:
    need("xargs", package="findutils")
    program = build("stamp.c", directory / "stamp")

    def hooks() -> float:
        times = hook_times(50, 3)
        return min(end - first for first, end in zip(times.firsts, times.ends, strict=True))

    # Measured: 1 to 2.
    stays_within(3.5, hooks, lambda: xargs_ms(program, 50), rounds=3)


def test_the_idle_daemon_sleeps() -> None:
    with fake_daemon() as daemon:
        woken, since = wake_ups(daemon.pid), time.monotonic()

        def has_rested() -> bool:
            nonlocal woken, since
            before, woken = woken, wake_ups(daemon.pid)
            since = since if woken == before else time.monotonic()
            return time.monotonic() - since > 2.5

        # Its timer, where it needs one, goes off every second.
        until(has_rested, "two and a half seconds without a wake-up", seconds=20, pause=0.05)


def test_the_idle_daemon_holds_no_more_than_some_bare_interpreters() -> None:
    with fake_daemon() as daemon:
        ours = memory_mib(daemon.pid)["Private_Dirty"]
    program = "import sys; print('up', flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [guest_python(), "-I", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        bare = memory_mib(child.pid)["Private_Dirty"]
        assert child.stdin is not None
        child.stdin.close()
    # What is private and written: what is shared depends on what else runs. Measured: 3.6.
    assert ours < 4 * bare


def test_vmforkctl_status_starts_like_any_small_python_program() -> None:
    with fake_daemon() as daemon:
        root = str(daemon.guest.root)
        # Measured: 3.
        stays_within(
            4,
            lambda: seconds(guest_python(), "-m", "vmfork", "status", VMFORK_ROOT=root),
            lambda: seconds(guest_python(), "-c", "import argparse, json, socket"),
        )


def test_importing_the_library_costs_a_fraction_of_importing_json() -> None:
    def cost(module: str) -> float:
        program = f"import time; begin = time.perf_counter(); import {module}; print(time.perf_counter() - begin)"
        command = [guest_python(), "-c", program]
        return float(subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout)

    # Measured: 0.04.
    stays_within(0.15, lambda: cost("vmfork"), lambda: cost("json"))


def test_a_full_history_does_not_slow_down_the_start(tmp_path: Path) -> None:
    with FakeGuest(tmp_path / "full") as full, FakeGuest(tmp_path / "empty") as empty:
        fill_history(full, KEPT)
        # Measured: 1.
        stays_within(1.25, lambda: start_ms(full), lambda: start_ms(empty))


@pytest.mark.parametrize(
    "measure",
    [
        pytest.param(lambda: growth.hooks(3, (1, 100, 400)), id="hooks"),
        pytest.param(lambda: growth.devicetree(5, (10, 300, 3000)), id="devicetree nodes"),
        pytest.param(lambda: growth.acpi(5, (1 << 10, 1 << 14, 1 << 17)), id="ACPI tables"),
    ],
)
def test_a_cost_grows_no_faster_than_its_cause(measure: Callable[[], Curve]) -> None:
    best: dict[float, list[float]] = {}
    for _ in range(4):
        for size, values in measure().samples:
            best[size] = [min(best.get(size, []) + values)]
        bend = Curve(key="", what="", over="", unit="", samples=list(best.items())).bend
        # Measured: 0.5 to 1.3; a square: 5 to 11.
        if bend is None or bend <= 2.5:
            return
    pytest.fail(f"one more costs {bend:.2f} times as much in the last step")


def test_asking_a_guard_costs_no_more_than_a_few_calls_of_time() -> None:
    program = """
import timeit, time, vmfork
guard = vmfork.Guard(source="page")
for _ in range(20):
    print(*(timeit.timeit(function, number=20000) for function in (guard.forked, time.monotonic)))
"""
    # Measured: 1.
    assert quotient([guest_python(), "-c", program]) < 2.5


def test_the_c_header_costs_no_more_than_a_load(directory: Path) -> None:
    program = build("guard.c", directory / "guard", f"-I{AGENT / 'include'}")
    # Measured: 1.
    assert quotient([str(program), "30"]) < 2


def quotient(command: Sequence[str]) -> float:
    """Of the best of the two columns that a program prints, beside a daemon."""
    with fake_daemon() as daemon:
        more = environment(VMFORK_ROOT=str(daemon.guest.root))
        done = subprocess.run(command, env=more, capture_output=True, text=True, check=False)
    rows = [[float(word) for word in line.split()] for line in done.stdout.splitlines()]
    return min(row[0] for row in rows) / min(row[1] for row in rows)


def test_the_bench_s_own_machinery_runs_on_this_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--help"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(map(str, _python_path()))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert shutil.which(guest_python()) is not None


def _python_path() -> tuple[Path, ...]:
    top = HERE.parent.parent
    return top / "agent", top / "tests", top / "tests/vm"
