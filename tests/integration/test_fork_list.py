# SPDX-License-Identifier: Apache-2.0
"""The list of forks, asked of a real vmforkd with a full history: right, and at nobody's cost."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.fakeguest import FakeGuest
from support.runningdaemon import RunningDaemon, eventually
from vmfork.history import KEPT, HistoryWriter
from vmfork.model import EventState, ForkEvent, HookOutcome, HookResult, Identity, IdentityPolicy, Kind
from vmfork.page import read_page
from vmfork.varlink.client import Client

ASKERS = 100
# Each of the askers would have the daemon read for some 0.1 s, if it read the whole history at once.
IN_TIME_SEC = 0.5


def past_fork(generation: int) -> ForkEvent:
    hooks = tuple(
        HookResult(name=f"{n}0-hook", path=f"/usr/lib/vmfork/hooks.d/{n}0-hook", result=HookOutcome.OK, exit_code=0)
        for n in range(12)
    )
    return ForkEvent(
        generation=generation,
        token=generation.to_bytes(16, "big"),
        kind=Kind.LIVE,
        edges=("kmsg",),
        generation_id=os.urandom(16),
        detected_at_ns=1_700_000_000_000_000_000 + generation,
        boottime_ns=generation,
        identity=Identity(policy=IdentityPolicy.KEEP, reason="nothing else changed"),
        state=EventState.SETTLED,
        hooks=hooks,
    )


@pytest.fixture
def daemon(guest: FakeGuest) -> RunningDaemon:
    """Not started yet; its history holds the forks 2 to 1001."""
    Path(guest.paths.state_dir).mkdir(parents=True, exist_ok=True)
    writer = HistoryWriter(guest.paths)
    for generation in range(2, KEPT + 2):
        writer.append(past_fork(generation))
    return RunningDaemon(guest)


def generations(client: Client, limit: int | None) -> list[object]:
    forks = client.call("io.vmfork.ListForks", {"limit": limit})["forks"]
    assert isinstance(forks, list)
    return [one["generation"] for one in forks if isinstance(one, dict)]


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1])


def test_the_list_ends_with_the_newest_fork_and_begins_where_the_limit_says(
    guest: FakeGuest, daemon: RunningDaemon
) -> None:
    with daemon:
        guest.fork(os.urandom(16))
        newest = daemon.settled(2)["generation"]
        with Client.connect(guest.paths.public_socket) as client:
            assert generations(client, None) == [*range(3, KEPT + 2), newest]
            assert generations(client, 3) == [KEPT, KEPT + 1, newest]
            assert generations(client, 0) == []


def test_a_line_that_cannot_be_read_takes_no_place_in_a_limited_list(guest: FakeGuest, daemon: RunningDaemon) -> None:
    with open(guest.paths.history, "ab") as file:
        file.write(b"torn\n")
    with daemon, Client.connect(guest.paths.public_socket) as client:
        assert generations(client, 2) == [KEPT, KEPT + 1]


def test_a_pipe_in_the_place_of_the_history_does_not_hold_the_daemon_up(
    guest: FakeGuest, daemon: RunningDaemon
) -> None:
    os.unlink(guest.paths.history)
    os.mkfifo(guest.paths.history)
    with daemon, Client.connect(guest.paths.public_socket) as client:
        assert generations(client, None) == []


def test_asking_for_a_full_history_does_not_make_the_daemon_grow(guest: FakeGuest, daemon: RunningDaemon) -> None:
    with daemon, Client.connect(guest.paths.public_socket) as client:
        before = resident_kib(daemon.pid)
        for _ in range(5):
            assert len(generations(client, None)) == KEPT
        # The modules that read a list are 0.7 MiB of this; the list itself has 2 MB, as objects 8.
        eventually(lambda: resident_kib(daemon.pid) - before <= 1536)


def test_a_crowd_that_asks_for_the_whole_history_delays_no_fork(guest: FakeGuest, daemon: RunningDaemon) -> None:
    with daemon, ExitStack() as stack:
        clients = [stack.enter_context(Client.connect(guest.paths.public_socket)) for _ in range(ASKERS)]
        before = read_page(guest.paths.generation_page).generation
        for client in clients:
            client.send("io.vmfork.ListForks", {"limit": None})
        begin = time.monotonic()
        guest.fork(os.urandom(16))
        eventually(lambda: read_page(guest.paths.generation_page).generation > before)
        assert time.monotonic() - begin < IN_TIME_SEC
