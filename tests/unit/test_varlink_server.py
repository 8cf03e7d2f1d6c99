# SPDX-License-Identifier: Apache-2.0
"""The varlink server with well-behaved, careless and hostile clients, over real sockets and a real loop."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import selectors
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.tools import unavailable
from support.varlinkservice import Loop, RawClient
from vmfork.errors import InputError
from vmfork.jsonfields import JsonObject
from vmfork.varlink import framing, interface
from vmfork.varlink.server import Product, Server
from vmfork.varlink.shares import Limits

SERVICE = interface.SERVICE

MakeLoop = Callable[..., Loop]
Connect = Callable[..., RawClient]


@pytest.fixture
def make_loop(tmp_path: Path) -> Iterator[MakeLoop]:
    made: list[Loop] = []

    def make(*, limits: Limits | None = None, mode: int = 0o666) -> Loop:
        made.append(Loop(str(tmp_path / "io.vmfork"), limits=limits, mode=mode))
        return made[-1]

    yield make
    for loop in made:
        loop.close()


@pytest.fixture
def loop(make_loop: MakeLoop) -> Loop:
    return make_loop()


@pytest.fixture
def connect() -> Iterator[Connect]:
    made: list[RawClient] = []

    def make(loop: Loop) -> RawClient:
        made.append(RawClient(loop))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def client(loop: Loop, connect: Connect) -> RawClient:
    return connect(loop)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def subscribe(client: RawClient, *, track: bool = False) -> JsonObject:
    client.call("io.vmfork.Subscribe", {"track": track}, more=True)
    return client.answer()


# Calls and answers.


def test_call_is_answered(client: RawClient) -> None:
    client.call("io.vmfork.GetStatus")
    reply = client.answer()
    assert isinstance(reply["parameters"], dict)
    assert "continues" not in reply
    assert "error" not in reply


def test_served_values_fit_the_interface(client: RawClient) -> None:
    declared = interface.load(interface.VMFORK)
    calls: dict[str, JsonObject] = {"GetStatus": {}, "ListForks": {"limit": 2}, "Acknowledge": {"generation": 7}}
    for name, parameters in calls.items():
        client.call(f"io.vmfork.{name}", parameters)
        values = client.answer()["parameters"]
        assert isinstance(values, dict)
        assert declared.misfit(declared.methods[name].reply, values) is None


def test_get_info_names_product_and_interfaces(client: RawClient) -> None:
    client.call(f"{SERVICE}.GetInfo")
    info = client.answer()["parameters"]
    assert isinstance(info, dict)
    assert info["version"] == "1.2.3"
    assert info["interfaces"] == ["io.vmfork", "org.varlink.service"]


@pytest.mark.parametrize("name", ["io.vmfork", "org.varlink.service"])
def test_description_is_the_installed_text(client: RawClient, name: str) -> None:
    client.call(f"{SERVICE}.GetInterfaceDescription", {"interface": name})
    assert client.answer()["parameters"] == {"description": interface.load(name).text}


@pytest.mark.parametrize(
    ("method", "parameters", "error", "detail"),
    [
        ("io.vmfork.Nothing", {}, f"{SERVICE}.MethodNotFound", {"method": "io.vmfork.Nothing"}),
        (f"{SERVICE}.Nothing", {}, f"{SERVICE}.MethodNotFound", {"method": f"{SERVICE}.Nothing"}),
        ("com.example.Nothing", {}, f"{SERVICE}.InterfaceNotFound", {"interface": "com.example"}),
        ("Nothing", {}, f"{SERVICE}.InterfaceNotFound", {"interface": ""}),
        ("io.vmfork.Reload", {}, "io.vmfork.PermissionDenied", {}),
        ("io.vmfork.ReportHook", {"wrong": 1}, "io.vmfork.PermissionDenied", {}),
        ("io.vmfork.GetStatus", {"x": 1}, f"{SERVICE}.InvalidParameter", {"parameter": "x"}),
        ("io.vmfork.ListForks", {"limit": "1"}, f"{SERVICE}.InvalidParameter", {"parameter": "limit"}),
        ("io.vmfork.ListForks", {"limit": -1}, f"{SERVICE}.InvalidParameter", {"parameter": "limit"}),
        ("io.vmfork.Acknowledge", {}, f"{SERVICE}.InvalidParameter", {"parameter": "generation"}),
        ("io.vmfork.Acknowledge", {"generation": 0}, f"{SERVICE}.InvalidParameter", {"parameter": "generation"}),
        ("io.vmfork.Subscribe", {}, f"{SERVICE}.ExpectedMore", {}),
        (
            f"{SERVICE}.GetInterfaceDescription",
            {"interface": "a.b"},
            f"{SERVICE}.InterfaceNotFound",
            {"interface": "a.b"},
        ),
        (f"{SERVICE}.GetInterfaceDescription", {}, f"{SERVICE}.InvalidParameter", {"parameter": "interface"}),
    ],
)
def test_call_that_cannot_be_served_gets_its_error(
    client: RawClient, method: str, parameters: JsonObject, error: str, detail: JsonObject
) -> None:
    client.call(method, parameters)
    assert client.answer() == {"error": error, "parameters": detail}


def test_method_without_handler_is_not_implemented_unless_told_otherwise(tmp_path: Path) -> None:
    with selectors.DefaultSelector() as selector:
        path = str(tmp_path / "s")
        server = Server(selector, path, mode=0o600, methods={}, product=Product(version="1"))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.sendall(framing.encode_call("io.vmfork.GetStatus"))
            sock.settimeout(0)
            answer = b""
            deadline = time.monotonic() + 10
            while not answer and time.monotonic() < deadline:
                for key, mask in selector.select(0.1):
                    key.data(mask)
                try:
                    answer = sock.recv(1000)
                except BlockingIOError:
                    continue
            assert answer[:-1].decode() == (
                '{"error":"org.varlink.service.MethodNotImplemented","parameters":{"method":"io.vmfork.GetStatus"}}'
            )
        server.close()


def test_null_parameters_are_no_parameters(client: RawClient) -> None:
    client.send(b'{"method":"io.vmfork.GetStatus","parameters":null}\0')
    assert "error" not in client.answer()


def test_pipelined_calls_are_answered_in_order(client: RawClient) -> None:
    for number in range(100):
        client.call(f"io.vmfork.Nothing{number}")
    named = [client.answer()["parameters"] for _ in range(100)]
    assert named == [{"method": f"io.vmfork.Nothing{number}"} for number in range(100)]


def test_call_behind_one_in_progress_waits_for_it(loop: Loop, connect: Connect) -> None:
    first, second = connect(loop), connect(loop)
    first.call("io.vmfork.Prepare")
    first.call("io.vmfork.Trigger")
    loop.until(lambda: loop.service.prepared, "the first call")
    loop.turn()
    assert first.read() is None
    assert loop.service.generation == 7
    second.call("io.vmfork.Resume")
    second.answer()
    answers = [first.answer()["parameters"], first.answer()["parameters"]]
    assert [sorted(answer)[0] for answer in answers if isinstance(answer, dict)] == ["not_ready", "event"]


def test_waiting_pipelined_call_does_not_spin_the_loop(loop: Loop, client: RawClient) -> None:
    client.call("io.vmfork.Prepare")
    client.call("io.vmfork.GetStatus")
    loop.until(lambda: loop.service.prepared, "the call")
    while loop.turn(0.05):
        assert loop.turns < 100


def test_acknowledgement_beside_a_stream_acts_at_once(loop: Loop, client: RawClient) -> None:
    subscribe(client, track=True)
    client.call("io.vmfork.Acknowledge", {"generation": 7}, oneway=True)
    client.call("io.vmfork.Acknowledge", {"generation": 8})
    loop.until(lambda: loop.service.acknowledged == [7, 8], "both acknowledgements")
    loop.service.tell("settled")
    assert client.answer()["continues"] is True
    assert client.read() is None


def test_answer_beside_a_stream_comes_after_its_end(loop: Loop, client: RawClient) -> None:
    subscribe(client)
    client.call("io.vmfork.Acknowledge", {"generation": 8})
    loop.until(lambda: loop.service.acknowledged, "the acknowledgement")
    loop.service.subscribers[0].reply({"notice": "end"})
    assert client.answer() == {"parameters": {"notice": "end"}}
    assert client.answer() == {"parameters": {}}


def test_oneway_call_gets_no_answer(loop: Loop, client: RawClient) -> None:
    client.call("io.vmfork.Acknowledge", {"generation": 3}, oneway=True)
    client.call("io.vmfork.Nothing", oneway=True)
    client.call("io.vmfork.GetStatus")
    answer = client.answer()["parameters"]
    assert isinstance(answer, dict)
    assert "status" in answer
    assert loop.service.acknowledged == [3]


def test_peer_is_who_connected(loop: Loop, client: RawClient) -> None:
    subscribe(client)
    peer = loop.service.subscribers[0].peer
    assert (peer.uid, peer.pid) == (os.getuid(), os.getpid())


def test_answering_twice_is_refused(loop: Loop, client: RawClient) -> None:
    client.call("io.vmfork.Prepare")
    loop.until(lambda: loop.service.prepared, "the call")
    call = loop.service.prepared[0]
    call.reply({})
    with pytest.raises(ValueError, match="already answered"):
        call.error("io.vmfork.Failed")


def test_stream_for_a_plain_call_is_refused(loop: Loop, client: RawClient) -> None:
    client.call("io.vmfork.Prepare")
    loop.until(lambda: loop.service.prepared, "the call")
    with pytest.raises(ValueError, match="without more"):
        loop.service.prepared[0].reply({}, continues=True)


def test_error_of_a_handler_reaches_the_caller_as_failed(make_loop: MakeLoop, connect: Connect) -> None:
    loop = make_loop()

    def broken(_call: object) -> None:
        raise InputError("/etc/vmfork/vmfork.conf", "is broken")

    loop.server._methods["io.vmfork.GetStatus"] = broken
    client = connect(loop)
    client.call("io.vmfork.GetStatus")
    message = {"message": "/etc/vmfork/vmfork.conf: is broken"}
    assert client.answer() == {"error": "io.vmfork.Failed", "parameters": message}


def test_closing_client_tells_the_service(loop: Loop, client: RawClient) -> None:
    subscribe(client)
    client.close()
    loop.until(lambda: not loop.service.subscribers, "on_close")
    assert loop.server.connections == 0


def test_client_that_stops_sending_still_gets_its_answers(client: RawClient) -> None:
    for _ in range(3):
        client.call("io.vmfork.ListForks", {"limit": 200})
    client.socket.shutdown(socket.SHUT_WR)
    for _ in range(3):
        assert "error" not in client.answer()
    client._loop.until(client.is_dropped, "the end")


# The socket file.


def test_socket_has_the_asked_mode_whatever_the_umask(make_loop: MakeLoop) -> None:
    before = os.umask(0o077)
    try:
        loop = make_loop(mode=0o666)
    finally:
        os.umask(before)
    assert stat.filemode(os.stat(loop.path).st_mode) == "srw-rw-rw-"


def test_nothing_but_the_socket_is_left_in_the_directory(loop: Loop) -> None:
    assert os.listdir(os.path.dirname(loop.path)) == ["io.vmfork"]


def test_stale_socket_is_replaced(tmp_path: Path, make_loop: MakeLoop, connect: Connect) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "io.vmfork"))
    client = connect(make_loop())
    client.call("io.vmfork.GetStatus")
    assert "error" not in client.answer()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, make_loop: MakeLoop, kind: str) -> None:
    path = tmp_path / "io.vmfork"
    if kind == "file":
        path.write_text("precious", encoding="ascii")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/nonexistent")
    with pytest.raises(InputError, match=r"io\.vmfork: cannot listen on it"):
        make_loop()
    assert os.listdir(tmp_path) == ["io.vmfork"]
    assert not stat.S_ISSOCK(path.lstat().st_mode)


def test_missing_directory_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        Loop(str(tmp_path / "missing" / "io.vmfork"))


def test_path_longer_than_an_address_works(tmp_path: Path) -> None:
    directory = tmp_path.joinpath(*["d" * 100] * 5)
    directory.mkdir(parents=True)
    descriptors = len(os.listdir("/proc/self/fd"))
    loop = Loop(str(directory / "io.vmfork"))
    with socket.socket(socket.AF_UNIX) as sock:
        directory_fd = os.open(directory, os.O_PATH)
        sock.connect(f"/proc/self/fd/{directory_fd}/io.vmfork")
        os.close(directory_fd)
        loop.until(lambda: loop.server.connections == 1, "the connection")
    loop.close()
    assert os.listdir(directory) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_close_removes_the_socket_and_drops_clients(loop: Loop, client: RawClient) -> None:
    loop.until(lambda: loop.server.connections == 1, "the connection")
    loop.server.close()
    assert not os.path.lexists(loop.path)
    assert client.is_dropped()


def test_close_leaves_a_successors_socket(loop: Loop) -> None:
    successor = Loop(loop.path)
    loop.server.close()
    assert os.path.lexists(loop.path)
    successor.close()
    assert not os.path.lexists(loop.path)


# Hostile clients.


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0",
        b"GET / HTTP/1.1\r\n\r\n\0",
        b"[]\0",
        b"{}\0",
        b'{"method":1}\0',
        b'{"method":"io.vmfork.GetStatus","parameters":[]}\0',
        b'{"method":"io.vmfork.GetStatus","more":"yes"}\0',
        b'{"method":"io.vmfork.GetStatus","upgrade":true}\0',
        b'{"method":"io.vmfork.Subscribe","more":true,"oneway":true}\0',
        b'{"method":"a","parameters":' + b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"}\0",
        bytes(range(1, 256)) * 40 + b"\0",
    ],
)
def test_garbage_drops_its_sender_only(loop: Loop, connect: Connect, garbage: bytes) -> None:
    bad, good = connect(loop), connect(loop)
    bad.send(garbage)
    loop.until(bad.is_dropped, "the hang-up")
    good.call("io.vmfork.GetStatus")
    assert "error" not in good.answer()
    assert loop.server.connections == 1


def test_half_a_message_delays_nobody(loop: Loop, connect: Connect) -> None:
    half, other = connect(loop), connect(loop)
    half.send(b'{"method":"io.vmfork.Get')
    other.call("io.vmfork.GetStatus")
    assert "error" not in other.answer()
    half.send(b'Status"}\0')
    assert "error" not in half.answer()


def test_message_that_never_ends_is_cut_off_with_bounded_memory(loop: Loop, client: RawClient) -> None:
    before = resident_bytes()
    block = b"x" * 65536
    sent = 0
    while not client.hung_up and sent < 2**30:
        client.send(block)
        sent += len(block)
    assert client.hung_up
    assert sent < 2**20
    loop.until(lambda: loop.server.connections == 0, "the end of the connection")
    assert resident_bytes() - before < 2**20


def test_half_messages_of_one_user_are_bounded_together(make_loop: MakeLoop, connect: Connect) -> None:
    loop = make_loop(limits=Limits(buffered_per_uid=200_000))
    clients = [connect(loop) for _ in range(10)]
    for client in clients:
        client.send(b"x" * 50_000)
    loop.until(lambda: sum(client.is_dropped() for client in clients) == 6, "the hang-ups")
    for _ in range(10):
        loop.turn(0)
    assert loop.server.connections == 4


def test_freed_buffers_count_no_longer(make_loop: MakeLoop, connect: Connect) -> None:
    loop = make_loop(limits=Limits(buffered_per_uid=60_000))
    for _ in range(5):
        client = connect(loop)
        client.send(b"x" * 50_000)
        loop.until(lambda: loop.server.buffered == 50_000, "the half message")
        client.close()
        loop.until(lambda: loop.server.connections == 0, "the hang-up")
    assert loop.server.buffered == 0


def test_subscriber_that_never_reads_is_dropped_and_slows_nobody(loop: Loop, connect: Connect) -> None:
    deaf, good = connect(loop), connect(loop)
    subscribe(deaf)
    subscribe(good)
    told = 0
    while len(loop.service.subscribers) == 2:
        started = time.monotonic()
        loop.service.tell("fork")
        assert time.monotonic() - started < 0.25
        assert good.answer()["continues"] is True
        told += 1
        assert told < 2000
    loop.service.tell("fork")
    assert "error" not in good.answer()
    assert loop.server.connections == 1
    print(f"dropped after {told} notices that it did not read")


def test_client_that_pipelines_and_never_reads_is_not_read_from(loop: Loop, connect: Connect) -> None:
    greedy, good = connect(loop), connect(loop)
    call = framing.encode_call("io.vmfork.ListForks", {"limit": 50})
    stuck = False
    for _ in range(10_000):
        try:
            greedy.socket.send(call)
        except BlockingIOError:
            stuck = True
            break
        loop.turn(0)
    assert stuck
    good.call("io.vmfork.GetStatus")
    assert "error" not in good.answer()
    assert loop.server.buffered < 300_000


def test_long_answer_passes_the_queue_limit_to_a_client_that_reads(client: RawClient) -> None:
    client.call("io.vmfork.ListForks", {"limit": 1000})
    forks = client.answer()["parameters"]
    assert isinstance(forks, dict)
    assert isinstance(forks["forks"], list)
    assert len(forks["forks"]) == 1000


def test_endless_calls_behind_a_stream_drop_the_client(loop: Loop, client: RawClient) -> None:
    subscribe(client)
    client.send(framing.encode_call("io.vmfork.GetStatus") * 5000)
    loop.until(client.is_dropped, "the hang-up")
    assert not loop.service.subscribers


def test_endless_acknowledgements_with_answers_are_bounded(make_loop: MakeLoop, connect: Connect) -> None:
    loop = make_loop(limits=Limits(queue=1000))
    client = connect(loop)
    subscribe(client)
    client.send(framing.encode_call("io.vmfork.Acknowledge", {"generation": 7}) * 100)
    loop.until(client.is_dropped, "the hang-up")
    assert len(loop.service.acknowledged) < 100


def test_answers_that_wait_behind_a_stream_take_no_more_memory_than_is_counted(loop: Loop, connect: Connect) -> None:
    acknowledgements = framing.encode_call("io.vmfork.Acknowledge", {"generation": 7}) * 100
    clients = [connect(loop) for _ in range(10)]
    for client in clients:
        subscribe(client)
    before = resident_bytes()
    for _ in range(50):
        for client in clients:
            client.send(acknowledgements)
    loop.until(lambda: len(loop.service.acknowledged) == 50_000, "the acknowledgements")
    assert loop.server.connections == 10
    assert resident_bytes() - before < loop.server.buffered + 8 * 2**20


def test_a_call_that_waits_behind_a_stream_takes_no_more_memory_than_is_counted(loop: Loop, connect: Connect) -> None:
    # Each of the empty objects takes twenty times as much as its text.
    call = framing.encode_call("io.vmfork.GetStatus", {"x": [{} for _ in range(20_000)]})
    clients = [connect(loop) for _ in range(30)]
    for client in clients:
        subscribe(client)
    before = resident_bytes()
    for client in clients:
        client.send(call)
    loop.until(lambda: loop.server.buffered == 30 * len(call), "the calls")
    for _ in range(3):
        loop.turn(0)
    assert resident_bytes() - before < loop.server.buffered + 8 * 2**20
    loop.service.subscribers[0].reply({"notice": "end"})
    assert clients[0].answer() == {"parameters": {"notice": "end"}}
    assert clients[0].answer() == {"error": f"{SERVICE}.InvalidParameter", "parameters": {"parameter": "x"}}


def test_an_answer_counts_until_its_end_is_sent(loop: Loop, client: RawClient) -> None:
    client.call("io.vmfork.ListForks", {"limit": 1000})
    loop.until(lambda: loop.server.buffered, "the answer")
    size, received = loop.server.buffered, 0
    assert size > 1_000_000
    while received < size:
        loop.turn(0)
        with contextlib.suppress(BlockingIOError):
            received += len(client.socket.recv(4096))
        # What the sockets of both sides hold has been sent.
        assert loop.server.buffered == size or received > size - 500_000
    loop.until(lambda: loop.server.buffered == 0, "the end")


def test_flood_of_calls_leaves_turns_for_others(loop: Loop, connect: Connect) -> None:
    flooding, other = connect(loop), connect(loop)
    loop.until(lambda: loop.server.connections == 2, "the connections")
    flooding.socket.send(framing.encode_call("io.vmfork.Nothing") * 100)
    before = loop.turns
    other.call("io.vmfork.GetStatus")
    assert "error" not in other.answer()
    answered = 0
    while flooding.read() is not None:
        answered += 1
    assert 0 < answered <= loop.server.limits.calls_per_turn * (loop.turns - before) < 100


def test_peer_that_dies_in_the_middle_of_a_reply_is_forgotten(loop: Loop, connect: Connect) -> None:
    dying = connect(loop)
    dying.call("io.vmfork.ListForks", {"limit": 1000})
    loop.until(lambda: loop.server.buffered > 100_000, "the queued reply")
    dying.close()
    loop.until(lambda: loop.server.connections == 0, "the end of the connection")
    assert loop.server.buffered == 0


def test_reply_to_a_dead_peer_is_dropped(loop: Loop, connect: Connect) -> None:
    dying = connect(loop)
    dying.call("io.vmfork.Prepare")
    loop.until(lambda: loop.service.prepared, "the call")
    dying.close()
    loop.until(lambda: loop.server.connections == 0, "the end of the connection")
    loop.service.prepared[0].reply({})


def test_one_user_gets_so_many_connections_and_is_told_why(make_loop: MakeLoop, connect: Connect) -> None:
    loop = make_loop(limits=Limits(connections_per_uid=3, connections_of_root=3))
    clients = [connect(loop) for _ in range(4)]
    busy: JsonObject = {"error": "io.vmfork.Busy", "parameters": {"limit": "connections"}}
    assert clients[3].answer() == busy
    loop.until(clients[3].is_dropped, "the hang-up")
    clients[0].close()
    loop.until(lambda: loop.server.connections == 2, "a place")
    late = connect(loop)
    late.call("io.vmfork.GetStatus")
    assert "error" not in late.answer()


def test_exhausted_descriptors_neither_spin_nor_stop_the_server(loop: Loop, connect: Connect) -> None:
    good = connect(loop)
    good.call("io.vmfork.GetStatus")
    good.answer()
    waiting = [RawClient(loop) for _ in range(5)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    fillers = []
    try:
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.dup(0))
        before = loop.turns
        loop.until(lambda: all(client.is_dropped() for client in waiting), "the refusals")
        assert loop.turns - before < 20
        assert loop.turn(0.05) == 0
        good.call("io.vmfork.GetStatus")
        assert "error" not in good.answer()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for filler in fillers:
            os.close(filler)
        for client in waiting:
            client.close()
    late = connect(loop)
    late.call("io.vmfork.GetStatus")
    assert "error" not in late.answer()


class FullSelector(selectors.EpollSelector):
    """Refuses to watch anything more while `full`, as epoll does beyond fs.epoll.max_user_watches."""

    full = False

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().register(fileobj, events, data)


def test_a_client_that_cannot_be_watched_is_dropped_and_nobody_else(tmp_path: Path) -> None:
    selector = FullSelector()
    loop = Loop(str(tmp_path / "s"), selector=selector)
    good = RawClient(loop)
    good.call("io.vmfork.GetStatus")
    good.answer()
    selector.full = True
    unlucky = RawClient(loop)
    loop.until(unlucky.is_dropped, "the hang-up")
    assert loop.server.connections == 1
    selector.full = False
    for client in (good, RawClient(loop)):
        client.call("io.vmfork.GetStatus")
        assert "error" not in client.answer()
        client.close()
    loop.close()


def test_a_listener_that_cannot_be_watched_again_waits_for_another_end(tmp_path: Path) -> None:
    selector = FullSelector()
    loop = Loop(str(tmp_path / "s"), selector=selector)
    early = [RawClient(loop) for _ in range(2)]
    loop.until(lambda: loop.server.connections == 2, "the connections")
    late = RawClient(loop)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        # Nothing is left, not even the descriptor in reserve: it accepts nobody until a connection ends.
        loop.turn()
        assert loop.turn(0) == 0
        selector.full = True
        early[0].close()
        loop.until(lambda: loop.server.connections == 1, "the first end")
        selector.full = False
        early[1].close()
        loop.until(lambda: loop.server.connections == 0, "the second end")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    late.call("io.vmfork.GetStatus")
    assert "error" not in late.answer()
    late.close()
    loop.close()


def test_a_thousand_subscribers_are_told_in_time(make_loop: MakeLoop, connect: Connect) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Both ends, and what the process has open already.
    needed = 2100 + len(os.listdir("/proc/self/fd"))
    if hard < needed:
        unavailable(f"needs {needed} file descriptors in one process (ulimit -n)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    try:
        loop = make_loop()
        before = resident_bytes()
        clients = [connect(loop) for _ in range(1000)]
        for client in clients:
            client.call("io.vmfork.Subscribe", more=True)
        loop.until(lambda: len(loop.service.subscribers) == 1000, "all subscribers")
        for client in clients:
            client.answer()
        grown = resident_bytes() - before
        started = time.monotonic()
        loop.service.tell("fork")
        took = time.monotonic() - started
        told = sum(client.socket.recv(65536)[-1:] == b"\0" for client in clients)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(f"1000 subscribers told in {took * 1000:.1f} ms; both ends of them take {grown / 2**20:.1f} MiB")
    assert told == 1000
    assert took < 0.25


CONNECT_OFTEN = """
import resource, socket, sys
path, wanted = sys.argv[1], int(sys.argv[2])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted + 50, max(wanted + 50, hard)))
except ValueError:
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    wanted = hard - 50
made = []
for _ in range(wanted):
    one = socket.socket(socket.AF_UNIX)
    one.connect(path)
    made.append(one)
print(len(made), flush=True)
sys.stdin.read()
"""


def test_ten_thousand_connections_leave_room_for_others(tmp_path: Path) -> None:
    """As many as the limit on descriptors allows, where it cannot be raised so far."""
    path = str(tmp_path / "s")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "support.varlinkservice", path]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    rss = Path(f"/proc/{server.pid}/statm")
    before = int(rss.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    attack = subprocess.Popen(
        [sys.executable, "-c", CONNECT_OFTEN, path, "10000"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert attack.stdout is not None
        made = int(attack.stdout.readline())
        held = len(os.listdir(f"/proc/{server.pid}/fd"))
        after = int(rss.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
        print(f"{made} connections: server holds {held} descriptors and grew by {(after - before) / 2**20:.1f} MiB")
        assert made > 500
        assert held < 2500
        assert after - before < 16 * 2**20
        attack.communicate(timeout=20)
        with socket.socket(socket.AF_UNIX) as late:
            late.settimeout(20)
            late.connect(path)
            late.sendall(framing.encode_call("io.vmfork.GetStatus"))
            assert late.recv(65536).startswith(b'{"parameters":{"status"')
    finally:
        for process in (attack, server):
            process.kill()
            process.communicate()
