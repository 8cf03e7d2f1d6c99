# SPDX-License-Identifier: Apache-2.0
"""One trigger of root's, and everybody sees the new generation: C, a Python guard, a subscriber, a sysgenid reader."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.fakeguest import FakeGuest
from support.runningdaemon import AGENT, PATIENCE_SEC, RunningDaemon, environment
from support.tools import need
from vmfork.varlink.client import Client

# From the moment at which root asked to the moment at which the program knew; tests/bench has the exact figures.
IN_TIME_SEC = 0.5

C_GUARD = r"""
#define _GNU_SOURCE
#include <stdio.h>
#include <time.h>
#include <vmfork.h>

int main(void)
{
    vmfork_guard guard;
    struct timespec pause = {0, 50000}, now;

    vmfork_guard_init(&guard);
    puts("ready");
    fflush(stdout);
    while (!vmfork_forked(&guard))
        nanosleep(&pause, NULL);
    clock_gettime(CLOCK_MONOTONIC, &now);
    printf("%llu %lld%09ld\n", (unsigned long long)vmfork_generation(), (long long)now.tv_sec, now.tv_nsec);
    return 0;
}
"""

# As AWS-LC reads it: one word of a mapping, made once.
C_SYSGENID = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>

int main(int argc, char **argv)
{
    struct timespec pause = {0, 50000}, now;
    int file = argc == 2 ? open(argv[1], O_RDONLY) : -1;
    const volatile uint32_t *word = mmap(NULL, 4096, PROT_READ, MAP_SHARED, file, 0);
    uint32_t before;

    if (word == MAP_FAILED)
        return 1;
    before = *word;
    puts("ready");
    fflush(stdout);
    while (*word == before)
        nanosleep(&pause, NULL);
    clock_gettime(CLOCK_MONOTONIC, &now);
    printf("%u %lld%09ld\n", *word, (long long)now.tv_sec, now.tv_nsec);
    return 0;
}
"""

PYTHON_GUARD = """
import time, vmfork
guard = vmfork.Guard(strict=True)
print("ready", flush=True)
while not guard.forked():
    time.sleep(0.00005)
now = time.monotonic_ns()
print(vmfork.generation(), now)
"""

SUBSCRIBER = """
import time
from vmfork.library.root import paths
from vmfork.varlink.client import Client
for reply in Client.connect(paths().public_socket).stream("io.vmfork.Subscribe", {"track": False, "after": None}):
    if reply["notice"] == "hello":
        print("ready", flush=True)
    elif reply["notice"] == "fork":
        now = time.monotonic_ns()
        print(reply["generation"], now)
        break
"""


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    with FakeGuest(tmp_path / "guest") as made:
        made.put(made.paths.config_etc + "/vmfork.conf", b"[Publish]\nSysGenId=yes\n")
        yield made


def built(source: str, place: Path) -> str:
    compiler = need("gcc", package="gcc")
    place.with_suffix(".c").write_text(source)
    options = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{AGENT}/include"]
    subprocess.run([compiler, *options, "-o", place, place.with_suffix(".c")], check=True, timeout=60)
    return str(place)


class Reader:
    """A program that says "ready", then the generation it saw and when."""

    def __init__(self, guest: FakeGuest, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, env=environment() | {"VMFORK_ROOT": str(guest.root)}, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Reader:
        assert self._line() == ["ready"]
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate(timeout=PATIENCE_SEC)

    def _line(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def saw(self) -> tuple[int, int]:
        """The generation, and when in nanoseconds of CLOCK_MONOTONIC."""
        generation, when = self._line()
        return int(generation), int(when)


def by_call(daemon: RunningDaemon) -> None:
    with Client.connect(daemon.guest.paths.admin_socket) as admin:
        admin.call("io.vmfork.Trigger", {"reason": "a test", "identity": None})


def by_vmforkctl(daemon: RunningDaemon) -> None:
    assert daemon.ctl("trigger", "--reason", "a test").returncode == 0


# The command has to start first, which says more about this machine than about vmforkd.
@pytest.mark.parametrize(("trigger", "in_time"), [(by_call, IN_TIME_SEC), (by_vmforkctl, PATIENCE_SEC)])
def test_a_trigger_reaches_everybody(
    guest: FakeGuest, tmp_path: Path, trigger: Callable[[RunningDaemon], None], in_time: float
) -> None:
    commands = {
        "C program": [built(C_GUARD, tmp_path / "guard")],
        "sysgenid reader": [built(C_SYSGENID, tmp_path / "sysgenid"), guest.paths.dev_sysgenid],
        "Python guard": [sys.executable, "-c", PYTHON_GUARD],
        "varlink subscriber": [sys.executable, "-c", SUBSCRIBER],
    }
    with RunningDaemon(guest) as daemon, ExitStack() as stack:
        readers = {name: stack.enter_context(Reader(guest, command)) for name, command in commands.items()}
        asked = time.monotonic_ns()
        trigger(daemon)
        for name, reader in readers.items():
            generation, when = reader.saw()
            print(f"{name}: {(when - asked) / 1e6:.2f} ms")
            assert generation == 2
            assert 0 < when - asked <= in_time * 1e9


def test_a_fork_reaches_everybody_who_kept_the_page_over_a_restart(guest: FakeGuest, tmp_path: Path) -> None:
    with RunningDaemon(guest) as daemon, ExitStack() as stack:
        lax = PYTHON_GUARD.replace("strict=True", "")
        commands = [built(C_GUARD, tmp_path / "guard")], [sys.executable, "-c", lax]
        readers = [stack.enter_context(Reader(guest, command)) for command in commands]
        daemon.stop()
        daemon.start()
        daemon.kill()
        daemon.start()
        guest.fork(os.urandom(16))
        assert [reader.saw()[0] for reader in readers] == [2, 2]
