# SPDX-License-Identifier: Apache-2.0
"""The list of forks, asked of a real vmforkd with a full history: right, and at nobody's cost."""

from __future__ import annotations

import os
import resource
import select
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.crowd import connected, connected_as
from support.fakeguest import FIRST_GENERATION_ID, FakeGuest
from support.privilege import NOBODY
from support.runningdaemon import RunningDaemon, eventually
from support.tools import need_root
from vmfork import state
from vmfork.history import KEPT, HistoryWriter
from vmfork.model import EventState, ForkEvent, HookOutcome, HookResult, Identity, IdentityPolicy, Kind
from vmfork.page import read_page
from vmfork.varlink import framing
from vmfork.varlink.client import Client, RemoteError

ASKERS = 100
# Each of the askers would have the daemon read for some 0.1 s, if it read the whole history at once: 10 s in all.
IN_TIME_SEC = 4.0


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
    """Not started yet; its history holds the forks 2 to 1001, and its state says so."""
    Path(guest.paths.state_dir).mkdir(parents=True, exist_ok=True)
    writer = HistoryWriter(guest.paths)
    for generation in range(2, KEPT + 2):
        writer.append(past_fork(generation))
    state.store_saved(guest.paths, state.Saved(generation=KEPT + 1, generation_id=FIRST_GENERATION_ID))
    return RunningDaemon(guest)


def generations(client: Client, limit: int | None) -> list[object]:
    forks = client.call("io.vmfork.ListForks", {"limit": limit})["forks"]
    assert isinstance(forks, list)
    return [one["generation"] for one in forks if isinstance(one, dict)]


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1])


def answered(clients: list[socket.socket]) -> int:
    """How many of them have something to read."""
    poll = select.poll()
    for client in clients:
        poll.register(client, select.POLLIN)
    return len(poll.poll(0))


def crowd_that_asks(guest: FakeGuest, stack: ExitStack) -> list[socket.socket]:
    """Connected, and each has asked for the whole history."""
    clients = [stack.enter_context(connected(guest.paths.public_socket)) for _ in range(ASKERS)]
    for client in clients:
        client.sendall(framing.encode_call("io.vmfork.ListForks"))
    return clients


def whole_answer(client: socket.socket) -> list[object]:
    """The forks in what was sent to this one."""
    decoder = framing.Decoder(limit=framing.REPLY_LIMIT, place="vmforkd")
    while (reply := decoder.take()) is None:
        data = client.recv(65536)
        assert data, "hung up before the end of the answer"
        decoder.feed(data)
    parameters = reply["parameters"]
    assert isinstance(parameters, dict)
    forks = parameters["forks"]
    assert isinstance(forks, list)
    return list(forks)


def test_the_list_ends_with_the_newest_fork_and_begins_where_the_limit_says(
    guest: FakeGuest, daemon: RunningDaemon
) -> None:
    with daemon:
        guest.fork(os.urandom(16))
        newest = daemon.settled(KEPT + 2)["generation"]
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
    # Without it, the start looks into the history for where the last daemon was.
    os.unlink(guest.paths.state)
    with daemon, Client.connect(guest.paths.public_socket) as client:
        assert generations(client, None) == []


def test_asking_for_a_full_history_does_not_make_the_daemon_grow(guest: FakeGuest, daemon: RunningDaemon) -> None:
    with daemon, Client.connect(guest.paths.public_socket) as client:
        # A short one first: the modules that read a list stay, once they are loaded.
        generations(client, 1)
        before = resident_kib(daemon.pid)
        for _ in range(5):
            assert len(generations(client, None)) == KEPT
        # The list has 2 MB, as objects 8.
        eventually(lambda: resident_kib(daemon.pid) - before <= 1024)


def test_a_crowd_that_asks_for_the_whole_history_delays_no_fork(guest: FakeGuest, daemon: RunningDaemon) -> None:
    with daemon, ExitStack() as stack:
        before = read_page(guest.paths.generation_page).generation
        clients = crowd_that_asks(guest, stack)
        begin = time.monotonic()
        guest.fork(os.urandom(16))
        eventually(lambda: read_page(guest.paths.generation_page).generation > before)
        assert time.monotonic() - begin < IN_TIME_SEC
        assert answered(clients) < ASKERS // 2
        for client in clients[:3]:
            assert len(whole_answer(client)) >= KEPT - 1


def test_missing_memory_for_the_list_is_said_to_who_asks(guest: FakeGuest, daemon: RunningDaemon) -> None:
    with daemon, Client.connect(guest.paths.public_socket) as client:
        mapped = int(Path(f"/proc/{daemon.pid}/statm").read_text().split()[0]) * resource.getpagesize()
        # Only the memory of the list itself is too much then, not the modules that read it.
        generations(client, 1)
        before = resource.prlimit(daemon.pid, resource.RLIMIT_AS, (mapped + (4 << 20), resource.RLIM_INFINITY))
        with pytest.raises(RemoteError, match="no memory for the list of forks"):
            generations(client, 1)
        resource.prlimit(daemon.pid, resource.RLIMIT_AS, before)
        assert generations(client, 1) == [KEPT + 1]


# --- who asks and does not wait for the answer


def forget_the_peak(pid: int) -> int:
    """From here on the peak of the memory is counted anew (proc_pid_clear_refs(5)); what there is now, in KiB."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return resident_kib(pid)


def peak_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])


def descriptors_of(daemon: RunningDaemon) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


def test_calls_that_want_no_answer_do_not_make_the_daemon_grow(guest: FakeGuest, daemon: RunningDaemon) -> None:
    flood = framing.encode_call("io.vmfork.ListForks", oneway=True) * 1000
    question = framing.encode_call("org.varlink.service.GetInfo")
    with daemon, ExitStack() as stack:
        with Client.connect(guest.paths.public_socket) as client:
            generations(client, 1)
        before = forget_the_peak(daemon.pid)
        clients = [stack.enter_context(connected(guest.paths.public_socket)) for _ in range(10)]
        for _ in range(5):
            for flooding in clients:
                flooding.sendall(flood)
        for flooding in clients:
            flooding.sendall(question)
            assert b'"product":"vmforkd"' in flooding.recv(4096)
        assert peak_kib(daemon.pid) - before <= 8192


def test_who_asks_and_hangs_up_leaves_nothing_behind(guest: FakeGuest, daemon: RunningDaemon) -> None:
    question = framing.encode_call("io.vmfork.ListForks")
    with daemon:
        with Client.connect(guest.paths.public_socket) as client:
            generations(client, 1)
        before, quiet = forget_the_peak(daemon.pid), descriptors_of(daemon)
        for _ in range(20_000):
            with connected(guest.paths.public_socket) as leaving:
                leaving.sendall(question)
        eventually(lambda: descriptors_of(daemon) <= quiet)
        assert peak_kib(daemon.pid) - before <= 8192


# --- whose turn it is


def test_root_is_not_behind_the_crowd_on_the_public_socket(guest: FakeGuest, daemon: RunningDaemon) -> None:
    with daemon, ExitStack() as stack:
        clients = crowd_that_asks(guest, stack)
        with Client.connect(guest.paths.admin_socket, timeout=60) as root:
            assert len(generations(root, None)) == KEPT
        assert answered(clients) < ASKERS // 2


def test_a_user_is_not_behind_all_the_calls_of_another_one(guest: FakeGuest, daemon: RunningDaemon) -> None:
    need_root()
    with daemon, ExitStack() as stack:
        clients = crowd_that_asks(guest, stack)
        other = stack.enter_context(connected_as(NOBODY, guest.paths.public_socket))
        with Client(other, "the public socket", timeout=60) as user:
            assert len(generations(user, None)) == KEPT
        assert answered(clients) < ASKERS // 2
