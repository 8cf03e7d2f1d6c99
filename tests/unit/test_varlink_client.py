# SPDX-License-Identifier: Apache-2.0
"""The varlink client against the real server, and against peers that break the protocol."""

from __future__ import annotations

import itertools
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.privilege import unprivileged
from support.varlinkservice import STATUS, Loop
from vmfork.errors import DaemonUnreachable, ProtocolError
from vmfork.varlink import framing
from vmfork.varlink.client import Client, Overdue, RemoteError
from vmfork.varlink.shares import Limits


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    made = Loop(str(tmp_path / "io.vmfork"))
    with made.running():
        yield made
    made.close()


@pytest.fixture
def client(loop: Loop) -> Iterator[Client]:
    with Client.connect(loop.path) as connected:
        yield connected


@contextmanager
def strange_server(path: Path, *says: bytes, hang_up: bool = True, repeat: bool = False) -> Iterator[str]:
    """Accepts one client, waits for its first bytes, says these pieces once or for ever, and hangs up or is silent."""
    over = threading.Event()

    def work() -> None:
        accepted, _ = listener.accept()
        with accepted:
            accepted.recv(1000)
            for piece in itertools.cycle(says) if repeat else says:
                try:
                    accepted.sendall(piece)
                except OSError:
                    return
            if not hang_up:
                over.wait(20)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield str(path)
        finally:
            over.set()
            thread.join()


def test_call_gives_the_parameters_of_the_reply(client: Client) -> None:
    assert client.call("io.vmfork.GetStatus") == {"status": STATUS}


def test_calls_follow_each_other_on_one_connection(client: Client) -> None:
    for number in range(3):
        forks = client.call("io.vmfork.ListForks", {"limit": number})["forks"]
        assert isinstance(forks, list)
        assert len(forks) == number


def test_long_reply_arrives_whole(client: Client) -> None:
    forks = client.call("io.vmfork.ListForks", {"limit": 1000})["forks"]
    assert isinstance(forks, list)
    assert len(forks) == 1000


def test_remote_error_has_name_and_parameters(client: Client) -> None:
    with pytest.raises(RemoteError, match=r"io\.vmfork\.ListForks") as raised:
        client.call("io.vmfork.ListForks", {"limit": "many"})
    assert raised.value.name == "org.varlink.service.InvalidParameter"
    assert raised.value.parameters == {"parameter": "limit"}
    assert client.call("io.vmfork.GetStatus") == {"status": STATUS}


def test_stream_yields_every_reply(loop: Loop, client: Client) -> None:
    replies = client.stream("io.vmfork.Subscribe", {"track": False}, timeout=20)
    assert next(replies)["notice"] == "hello"
    with Client.connect(loop.path) as other:
        for generation in (8, 9, 10):
            other.call("io.vmfork.Trigger")
            assert next(replies)["generation"] == generation


def test_stream_ends_with_the_last_reply(tmp_path: Path) -> None:
    says = framing.encode_reply({"n": 1}, continues=True) + framing.encode_reply({"n": 2})
    with strange_server(tmp_path / "s", says, hang_up=False) as path, Client.connect(path) as client:
        assert list(client.stream("a.b.C")) == [{"n": 1}, {"n": 2}]
        assert not client.streaming


def test_stream_ends_with_an_error(tmp_path: Path) -> None:
    says = framing.encode_reply({"n": 1}, continues=True) + b'{"error":"a.b.Over","continues":true}\0'
    with strange_server(tmp_path / "s", says, hang_up=False) as path, Client.connect(path) as client:
        replies = client.stream("a.b.C")
        assert next(replies) == {"n": 1}
        with pytest.raises(RemoteError, match=r"a\.b\.Over"):
            next(replies)
        assert not client.streaming


def test_silent_stream_is_overdue_at_its_deadline(client: Client) -> None:
    replies = client.stream("io.vmfork.Subscribe", timeout=0.2)
    next(replies)
    started = time.monotonic()
    with pytest.raises(Overdue):
        next(replies)
    assert 0.1 < time.monotonic() - started < 5
    assert client.closed


def test_receive_never_blocks_and_gives_every_reply(loop: Loop, client: Client) -> None:
    client.send("io.vmfork.Subscribe", more=True)
    assert select.select([client], [], [], 20)[0]
    hello = client.receive()
    assert hello is not None
    assert hello["continues"] is True
    assert client.receive() is None
    with Client.connect(loop.path) as other:
        other.call("io.vmfork.Trigger")
        other.call("io.vmfork.Trigger")
    seen: list[object] = []
    deadline = time.monotonic() + 20
    while len(seen) < 2 and time.monotonic() < deadline:
        select.select([client], [], [], 1)
        while (message := client.receive()) is not None:
            assert isinstance(message["parameters"], dict)
            seen.append(message["parameters"]["generation"])
    assert seen == [8, 9]


def test_oneway_call_may_be_sent_beside_a_stream(loop: Loop, client: Client) -> None:
    replies = client.stream("io.vmfork.Subscribe", {"track": True}, timeout=20)
    next(replies)
    client.send("io.vmfork.Acknowledge", {"generation": 7}, oneway=True)
    with Client.connect(loop.path) as other:
        other.call("io.vmfork.Trigger")
    assert next(replies)["notice"] == "fork"
    deadline = time.monotonic() + 20
    while loop.service.acknowledged != [7] and time.monotonic() < deadline:
        select.select([], [], [], 0.01)
    assert loop.service.acknowledged == [7]


def test_second_call_beside_a_stream_is_refused(client: Client) -> None:
    next(client.stream("io.vmfork.Subscribe"))
    with pytest.raises(ValueError, match="still streams"):
        client.call("io.vmfork.GetStatus")


def test_end_of_the_server_is_noticed_by_receive(loop: Loop, client: Client) -> None:
    client.send("io.vmfork.Subscribe", more=True)
    deadline = time.monotonic() + 20
    while not loop.service.subscribers and time.monotonic() < deadline:
        select.select([], [], [], 0.01)
    loop.service.subscribers[0].connection.close("for the test")
    assert client.receive() is not None
    assert select.select([client], [], [], 20)[0]
    with pytest.raises(DaemonUnreachable, match="ended the connection"):
        client.receive()
    assert client.closed


def test_absent_socket_is_unreachable_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable, match="No such file") as raised:
        Client.connect(str(tmp_path / "nobody"))
    assert raised.value.hint == "is vmforkd running? systemctl start vmforkd"


def test_absent_directory_of_a_long_path_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable, match="No such file"):
        Client.connect(str(tmp_path / ("d" * 120) / "io.vmfork"))


def test_socket_without_listener_is_unreachable_with_a_hint(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    with pytest.raises(DaemonUnreachable, match="refused") as raised:
        Client.connect(str(tmp_path / "s"))
    assert raised.value.hint == "vmforkd has ended: systemctl restart vmforkd"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_admin_socket_is_closed_to_others(tmp_path: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents[:3]):
        if parent.stat().st_uid == 0 and parent != Path("/tmp"):
            parent.chmod(0o755)
    loop = Loop(str(tmp_path / "admin"), mode=0o600)
    try:
        with unprivileged(), pytest.raises(DaemonUnreachable, match="Permission denied") as raised:
            Client.connect(loop.path)
        assert raised.value.hint == "this needs root"
    finally:
        loop.close()


def test_path_longer_than_an_address_is_reached(tmp_path: Path) -> None:
    directory = tmp_path.joinpath(*["d" * 100] * 5)
    directory.mkdir(parents=True)
    loop = Loop(str(directory / "io.vmfork"))
    with loop.running(), Client.connect(loop.path) as client:
        assert client.call("io.vmfork.GetStatus") == {"status": STATUS}
    loop.close()


def test_name_too_long_for_any_address_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable, match="too long"):
        Client.connect(str(tmp_path / ("n" * 110)))


def test_refused_client_learns_why(tmp_path: Path) -> None:
    loop = Loop(str(tmp_path / "s"), limits=Limits(connections_per_uid=0, connections_of_root=0))
    with loop.running(), Client.connect(loop.path) as client:
        deadline = time.monotonic() + 20
        assert select.select([client], [], [], max(0, deadline - time.monotonic()))[0]
        with pytest.raises(RemoteError) as raised:
            client.call("io.vmfork.GetStatus")
    loop.close()
    assert raised.value.name == "io.vmfork.Busy"
    assert raised.value.parameters == {"limit": "connections"}


def test_silent_server_is_overdue(tmp_path: Path) -> None:
    with strange_server(tmp_path / "s", hang_up=False) as path, Client.connect(path, timeout=0.1) as client:
        with pytest.raises(Overdue, match="did not answer in time"):
            client.call("io.vmfork.GetStatus")
        assert client.closed


def test_server_that_drips_is_overdue_too(tmp_path: Path) -> None:
    with strange_server(tmp_path / "s", b'{"par', hang_up=False) as path, Client.connect(path) as client:
        with pytest.raises(Overdue):
            client.call("io.vmfork.GetStatus", timeout=0.1)
        assert client.closed


def test_server_that_never_stops_talking_is_overdue_too(tmp_path: Path) -> None:
    with strange_server(tmp_path / "s", b"x", repeat=True) as path, Client.connect(path) as client:
        with pytest.raises(Overdue):
            client.call("io.vmfork.GetStatus", timeout=0.2)
        assert client.closed


def test_full_queue_of_a_busy_server_is_overdue(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        # A backlog of 0 holds one client.
        with Client.connect(str(tmp_path / "s")), pytest.raises(Overdue, match="too busy"):
            Client.connect(str(tmp_path / "s"), timeout=0.1)


@pytest.mark.parametrize("says", [b"", b'{"parameters":{}'])
def test_hang_up_instead_of_an_answer_is_unreachable(tmp_path: Path, says: bytes) -> None:
    with strange_server(tmp_path / "s", says) as path, Client.connect(path) as client:
        with pytest.raises(DaemonUnreachable, match="ended the connection"):
            client.call("io.vmfork.GetStatus")
        assert client.closed


@pytest.mark.parametrize(
    "says",
    [b"nonsense\0", b"[]\0", b'{"parameters":1}\0', b'{"continues":1}\0', b'{"parameters":{},"continues":true}\0'],
)
def test_nonsense_instead_of_an_answer_is_a_protocol_error(tmp_path: Path, says: bytes) -> None:
    with strange_server(tmp_path / "s", says, hang_up=False) as path, Client.connect(path) as client:
        with pytest.raises(ProtocolError):
            client.call("io.vmfork.GetStatus")
        assert client.closed


def test_reply_that_never_ends_is_cut_off(tmp_path: Path) -> None:
    block = b"x" * 2**20
    with strange_server(tmp_path / "s", *[block] * 64) as path, Client.connect(path, timeout=60) as client:
        with pytest.raises(ProtocolError, match="longer than"):
            client.call("io.vmfork.GetStatus")
        assert client.closed


def test_importing_the_client_loads_nothing_heavy() -> None:
    code = "import sys, vmfork.varlink.client; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # -S: the site module of a virtual environment loads whatever it likes.
    command = [sys.executable, "-S", "-c", code]
    loaded = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert "vmfork.varlink.framing" in loaded
    assert not {"asyncio", "contextlib", "dataclasses", "inspect", "logging", "threading", "typing"} & set(loaded)
