# SPDX-License-Identifier: Apache-2.0
"""What programs and people call: vmforkctl status, `import vmfork`, the guards in Python and C; beside their likes."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from bench.place import AGENT, build, environment, fake_daemon, guest_python, scratch
from bench.samples import Chapter, Series

_GUARD = """
import os, random, sys, time, vmfork
guard = vmfork.Guard(source="page")
reseed = (lambda: random.seed(os.urandom(16)), (), {})
def read():
    with open(sys.argv[1], "rb") as file:
        return file.read(60)
def callbacks(*registry):
    # AWS SnapStart's style: a list of callables that the platform runs after a restore; nobody can ask in between.
    def run():
        for func, args, kwargs in registry:
            func(*args, **kwargs)
    return run
def cost(function, calls):
    loop = range(calls)
    begin = time.perf_counter_ns()
    for _ in loop:
        pass
    empty = time.perf_counter_ns() - begin
    begin = time.perf_counter_ns()
    for _ in loop:
        function()
    return (time.perf_counter_ns() - begin - empty) / calls
for _ in range(int(sys.argv[2])):
    print(*(cost(f, n) for f, n in (
        (guard.forked, 200000), (os.getpid, 200000), (time.monotonic, 200000), (read, 5000),
        (callbacks(), 200000), (callbacks(reseed), 5000),
    )))
"""

_IMPORT = """
import time
begin = time.perf_counter_ns()
{statement}
used = time.perf_counter_ns() - begin
for line in open("/proc/self/status"):
    if line.startswith("VmRSS"):
        print(used / 1e6, int(line.split()[1]) / 1024)
"""


def status(rounds: int) -> list[Series]:
    found = {
        "status": ["-m", "vmfork", "status"],
        "json": ["-c", "import argparse, json, socket"],
        "bare": ["-c", "pass"],
    }
    values: dict[str, list[float]] = {key: [] for key in found}
    with fake_daemon() as daemon:
        more = environment(VMFORK_ROOT=str(daemon.guest.root))
        for _ in range(rounds):
            for key, arguments in found.items():
                begin = time.perf_counter_ns()
                subprocess.run([guest_python(), *arguments], env=more, stdout=subprocess.DEVNULL, check=True)
                values[key].append((time.perf_counter_ns() - begin) / 1e6)
    return [
        Series(key="status", what="vmforkctl status", unit="ms", values=values["status"], budget=120.0),
        Series(
            key="status-floor", what="Python with argparse, json, socket", unit="ms", values=values["json"], peer=True
        ),
        Series(key="status-bare", what="bare Python, start to end", unit="ms", values=values["bare"], peer=True),
    ]


def imports(rounds: int) -> list[Series]:
    times: dict[str, list[float]] = {"pass": [], "import vmfork": [], "import json": []}
    sizes: dict[str, list[float]] = {key: [] for key in times}
    for _ in range(rounds):
        for statement, values in times.items():
            program = _IMPORT.format(statement=statement)
            done = subprocess.run(
                [guest_python(), "-c", program], env=environment(), capture_output=True, text=True, check=True
            )
            used, size = map(float, done.stdout.split())
            values.append(used)
            sizes[statement].append(size)
    more = [with_it - bare for with_it, bare in zip(sizes["import vmfork"], sizes["pass"], strict=True)]
    return [
        Series(key="import", what="import vmfork", unit="ms", values=times["import vmfork"], budget=5.0),
        Series(key="import-json", what="import json", unit="ms", values=times["import json"], peer=True),
        Series(key="import-rss", what="import vmfork: RSS over bare Python", unit="MiB", values=more, budget=1.0),
    ]


def guards(rounds: int) -> list[Series]:
    with fake_daemon() as daemon, scratch() as name:
        more = environment(VMFORK_ROOT=str(daemon.guest.root))
        command = [guest_python(), "-c", _GUARD, daemon.page_path, str(rounds)]
        lines = subprocess.run(command, env=more, capture_output=True, text=True, check=True).stdout.splitlines()
        rows = list(zip(*(map(float, line.split()) for line in lines), strict=True))
        program = build("guard.c", Path(name) / "guard", f"-I{AGENT / 'include'}")
        done = subprocess.run([str(program), str(rounds)], env=more, capture_output=True, text=True, check=False)
        pairs = list(zip(*(map(float, line.split()) for line in done.stdout.splitlines()), strict=True))
    names = (
        ("guard", "guard.forked(), Python", 100.0),
        ("getpid", "os.getpid()", None),
        ("monotonic", "time.monotonic()", None),
        ("read", "opening and reading the page", None),
        ("registry", "running an empty callback registry (SnapStart's style)", None),
        ("registry-one", "running a registry of one callback, which seeds module random", None),
    )
    found = [
        Series(key=key, what=what, unit="ns", values=list(values), budget=budget, peer=budget is None)
        for (key, what, budget), values in zip(names, rows, strict=True)
    ]
    return [
        *found,
        Series(key="guard-c", what="vmfork_forked(), C", unit="ns", values=list(pairs[0]), budget=2.0),
        Series(key="load-c", what="one atomic load, C", unit="ns", values=list(pairs[1]), peer=True),
    ]


def measure(rounds: int) -> Chapter:
    return Chapter(name="calls", series=[*status(rounds), *imports(rounds), *guards(max(5, rounds // 2))])
