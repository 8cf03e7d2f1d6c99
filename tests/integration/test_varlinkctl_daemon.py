# SPDX-License-Identifier: Apache-2.0
"""systemd's varlinkctl and a real vmforkd: what an administrator sees without any program of ours on his side."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import varlinkctl
from support.fakeguest import FakeGuest
from support.runningdaemon import PATIENCE_SEC, RunningDaemon
from vmfork import __version__


@pytest.fixture(scope="module")
def tool() -> list[str]:
    return varlinkctl.command()


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    with FakeGuest(tmp_path / "guest") as made, RunningDaemon(made):
        yield made


def run(tool: list[str], verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*tool, "--no-pager", "--json=short", verb, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SEC, check=False)


def call(tool: list[str], socket: str, method: str, parameters: str = "{}") -> dict[str, Any]:
    done = run(tool, "call", socket, f"io.vmfork.{method}", parameters)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_info_and_introspect_of_both_sockets(tool: list[str], guest: FakeGuest) -> None:
    for socket in (guest.paths.public_socket, guest.paths.admin_socket):
        assert json.loads(run(tool, "info", socket).stdout)["version"] == __version__
        assert "method Subscribe" in run(tool, "introspect", socket, "io.vmfork").stdout


def test_everybody_may_ask_and_only_the_admin_socket_steers(tool: list[str], guest: FakeGuest) -> None:
    public, admin = guest.paths.public_socket, guest.paths.admin_socket
    refused = run(tool, "call", public, "io.vmfork.Trigger", '{"reason":"a test"}')
    assert refused.returncode != 0
    assert "io.vmfork.PermissionDenied" in refused.stdout + refused.stderr
    assert call(tool, public, "GetStatus")["status"]["generation"] == 1
    event = call(tool, admin, "Trigger", '{"reason":"a test"}')["event"]
    assert (event["generation"], event["kind"], event["edges"]) == (2, "manual", ["manual"])
    told = {socket: call(tool, socket, "GetStatus")["status"] for socket in (public, admin)}
    assert [status["generation"] for status in told.values()] == [2, 2]
    assert told[public]["generation_id"] is None
    assert told[admin]["generation_id"]
    assert [one["generation"] for one in call(tool, public, "ListForks")["forks"]] == [2]


def test_call_more_is_told_of_a_fork_and_of_its_end(tool: list[str], guest: FakeGuest) -> None:
    arguments = ["--more", "--json=short", guest.paths.public_socket, "io.vmfork.Subscribe", "{}"]
    with subprocess.Popen(
        ["timeout", str(PATIENCE_SEC), *tool, "--no-pager", "call", *arguments], stdout=subprocess.PIPE, text=True
    ) as watching:
        assert watching.stdout is not None
        # --json=short marks records with RS (RFC 7464) in a stream.
        notices = (json.loads(line.lstrip("\x1e")) for line in watching.stdout)
        assert next(notices)["notice"] == "hello"
        guest.fork(os.urandom(16))
        fork, settled = next(notices), next(notices)
        watching.terminate()
    assert (fork["notice"], fork["generation"], fork["event"]["kind"]) == ("fork", 2, "live")
    assert (settled["notice"], settled["event"]["state"]) == ("settled", "settled")
    assert fork["event"]["generation_id"] is None
