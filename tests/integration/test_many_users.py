# SPDX-License-Identifier: Apache-2.0
"""Several users at one varlink socket: what one takes, or many together, is not taken from the others."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from support.crowd import connected, connected_as, descriptors, is_hung_up
from support.fakeguest import FakeGuest
from support.runningdaemon import RunningDaemon, eventually
from support.tools import need_root, unavailable
from support.varlinkservice import Loop, RawClient
from vmfork.varlink import framing
from vmfork.varlink.client import Client
from vmfork.varlink.shares import Limits

ROOT, ALICE, BOB, CAROL, DAVE, ERIN, FRANK = 0, 61001, 61002, 61003, 61004, 61005, 61006
STATUS = framing.encode_call("io.vmfork.GetStatus")
HALF = b"x" * 50_000

Connect = Callable[..., list[RawClient]]


@pytest.fixture
def connect() -> Iterator[Connect]:
    need_root()
    made: list[RawClient] = []

    def make(loop: Loop, uid: int, count: int = 1) -> list[RawClient]:
        new = []
        for _ in range(count):
            new.append(RawClient(loop, uid=uid))
            loop.turn(0)
        made.extend(new)
        return new

    yield make
    for client in made:
        client.close()


@pytest.fixture
def make_loop(tmp_path: Path) -> Iterator[Callable[[Limits], Loop]]:
    with ExitStack() as stack:

        def make(limits: Limits) -> Loop:
            # pytest's own directory is shut to other users.
            (tmp_path / "public").mkdir(mode=0o755)
            loop = Loop(str(tmp_path / "public" / "io.vmfork"), limits=limits)
            stack.callback(loop.close)
            return loop

        yield make


MakeLoop = Callable[[Limits], Loop]


def is_served(client: RawClient) -> bool:
    client.call("io.vmfork.GetStatus")
    return "error" not in client.answer()


def still_there(*clients: list[RawClient]) -> list[int]:
    """How many of each have not been hung up on."""
    return [sum(not client.is_dropped() for client in some) for some in clients]


# --- connections


def test_when_all_places_are_taken_the_newest_of_the_user_with_most_yields(
    make_loop: MakeLoop, connect: Connect
) -> None:
    loop = make_loop(Limits(connections=10))
    many, few = connect(loop, ALICE, 7), connect(loop, BOB, 3)
    late = connect(loop, CAROL)
    assert is_served(late[0])
    assert [client.is_dropped() for client in many] == [False] * 6 + [True]
    assert still_there(few) == [3]


def test_users_who_want_all_get_equal_shares(make_loop: MakeLoop, connect: Connect) -> None:
    loop = make_loop(Limits(connections=12))
    crowds = [connect(loop, uid, 12) for uid in (ALICE, BOB, CAROL)]
    for client in (client for crowd in crowds for client in crowd):
        client.read()
    assert still_there(*crowds) == [4, 4, 4]
    assert loop.server.connections == 12


def test_nobody_yields_to_a_user_who_would_have_as_much(make_loop: MakeLoop, connect: Connect) -> None:
    loop = make_loop(Limits(connections=2))
    early = connect(loop, ALICE) + connect(loop, BOB)
    (late,) = connect(loop, CAROL)
    assert late.answer() == {"error": "io.vmfork.Busy", "parameters": {"limit": "connections"}}
    assert still_there(early) == [2]


def test_root_has_places_that_nobody_else_can_take(make_loop: MakeLoop, connect: Connect) -> None:
    loop = make_loop(Limits(connections=3, connections_of_root=2))
    early = [connect(loop, uid)[0] for uid in (ALICE, BOB, CAROL)]
    roots = connect(loop, ROOT, 3)
    assert [is_served(client) for client in roots[:2]] == [True, True]
    assert roots[2].answer()["error"] == "io.vmfork.Busy"
    assert still_there(early) == [3]


def test_root_takes_no_place_of_the_others(make_loop: MakeLoop, connect: Connect) -> None:
    loop = make_loop(Limits(connections=3, connections_of_root=5))
    connect(loop, ROOT, 5)
    assert all(is_served(connect(loop, uid)[0]) for uid in (ALICE, BOB, CAROL))


# --- what is buffered


def test_when_too_much_is_buffered_the_user_with_most_yields(make_loop: MakeLoop, connect: Connect) -> None:
    loop = make_loop(Limits(buffered=400_000))
    greedy, modest = connect(loop, ALICE, 7), connect(loop, BOB)
    for client in greedy:
        client.send(HALF)
    loop.until(lambda: loop.server.buffered == 350_000, "the half messages")
    # The one that is too much is not the one that goes.
    modest[0].send(HALF + b"x" * 10_000)
    loop.until(lambda: loop.server.buffered == 360_000, "the modest one's")
    assert still_there(greedy, modest) == [6, 1]


def test_what_one_client_of_a_user_holds_does_not_end_the_others(make_loop: MakeLoop, connect: Connect) -> None:
    loop = make_loop(Limits(buffered_per_uid=60_000))
    greedy, modest = connect(loop, ALICE)[0], connect(loop, ALICE)[0]
    greedy.send(HALF)
    loop.until(lambda: loop.server.buffered == 50_000, "the half message")
    modest.send(b"x" * 20_000)
    loop.until(greedy.is_dropped, "the end of the one with most")
    loop.until(lambda: loop.server.buffered == 20_000, "the rest")
    assert not modest.is_dropped()


def test_what_users_buffer_is_not_taken_from_root(make_loop: MakeLoop, connect: Connect) -> None:
    loop = make_loop(Limits(buffered=100_000))
    users = connect(loop, ALICE) + connect(loop, BOB)
    for client in users:
        client.send(HALF)
    loop.until(lambda: loop.server.buffered == 100_000, "the half messages")
    (root,) = connect(loop, ROOT)
    root.send(HALF)
    loop.until(lambda: loop.server.buffered == 150_000, "root's")
    assert still_there(users, [root]) == [2, 1]


# --- vmforkd itself, with the limits that it has


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    with descriptors(8000):
        if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 8000:
            unavailable("needs 8000 descriptors")
        yield


def test_four_users_with_all_they_can_get_lock_nobody_out(
    guest: FakeGuest, many_descriptors: None, daemon: RunningDaemon
) -> None:
    need_root()
    path = guest.paths.public_socket
    with ExitStack() as stack:
        crowds = {
            uid: [stack.enter_context(connected_as(uid, path)) for _ in range(1200)]
            for uid in (ALICE, BOB, CAROL, DAVE)
        }
        for late in (connected_as(ERIN, path), connected(path)):
            with Client(late, path, timeout=60) as client:
                assert client.call("io.vmfork.GetStatus")["status"]
        held = {uid: sum(not is_hung_up(client) for client in crowd) for uid, crowd in crowds.items()}
        print(f"connections of each user: {held}")
        assert min(held.values()) >= 1000


def test_five_users_who_send_half_messages_end_no_other_connection(
    guest: FakeGuest, many_descriptors: None, daemon: RunningDaemon
) -> None:
    need_root()
    path = guest.paths.public_socket
    with ExitStack() as stack:
        patient = stack.enter_context(connected_as(ERIN, path))
        patient.sendall(STATUS[:-1])
        greedy = [
            stack.enter_context(connected_as(uid, path)) for uid in (ALICE, BOB, CAROL, DAVE, FRANK) for _ in range(300)
        ]
        for client in greedy:
            with suppress(ConnectionError):
                client.sendall(b"x" * 60_000)
        # All that is allowed is taken now, and what was too much has been dropped.
        allowed = Limits().buffered // 60_000
        eventually(lambda: sum(not is_hung_up(client) for client in greedy) <= allowed)
        patient.sendall(b" " * 60_000 + STATUS[-1:])
        assert patient.recv(65536).startswith(b'{"parameters":{"status"')
        with Client.connect(path, timeout=60) as root:
            assert root.call("io.vmfork.GetStatus")["status"]
        assert not is_hung_up(patient)
