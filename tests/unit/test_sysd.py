# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import resource
import socket
from pathlib import Path

import pytest

from vmfork import sysd


def test_the_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        sysd.notify("READY=1")
        assert manager.recv(100) == b"READY=1"


def test_nobody_ends_because_the_service_manager_cannot_be_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        sysd.notify("READY=1\nSTATUS=x")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    sysd.notify("STOPPING=1")
    assert caplog.messages == [
        "the service manager cannot be told READY=1: Too many open files",
        "the service manager cannot be told STOPPING=1: No such file or directory",
    ]


@pytest.mark.parametrize(("wait_sec", "why"), [(0.0, "Resource temporarily unavailable"), (0.05, "timed out")])
def test_a_service_manager_that_reads_nothing_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wait_sec: float, why: str
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as others,
    ):
        manager.bind(str(tmp_path / "notify"))
        others.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                others.sendto(b"STATUS=", str(tmp_path / "notify"))
        sysd.notify("STATUS=x", wait_sec=wait_sec)
    assert caplog.messages == [f"the service manager cannot be told STATUS=x: {why}"]
