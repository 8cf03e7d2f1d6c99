# SPDX-License-Identifier: Apache-2.0
"""A real vmforkd below the root of a fake guest, and vmforkctl to talk to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from support.fakeguest import FakeGuest

T = TypeVar("T")

AGENT = Path(__file__).resolve().parents[2] / "agent"
PATIENCE_SEC = 20.0


def environment() -> dict[str, str]:
    """Programs of this checkout, nothing of the tester's own settings."""
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(AGENT), "LANG": "C.UTF-8"}


def eventually(condition: Callable[[], T], *, seconds: float = PATIENCE_SEC) -> T:
    """The first true value of `condition`; fails when the time is up."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, "a condition did not become true in time"
        time.sleep(0.01)


class RunningDaemon:
    """vmforkd as a child; leaving the `with` stops it and puts its log into the test's output.

    `launcher` are words before the command that leave it its PID and parent.
    """

    def __init__(self, guest: FakeGuest, *, arguments: tuple[str, ...] = (), launcher: Sequence[str] = ()) -> None:
        self.guest = guest
        self._arguments = arguments
        self._launcher = launcher
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RunningDaemon:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Start it and wait until it watches, as its service manager would."""
        self.process = subprocess.Popen(
            [*self._launcher, sys.executable, "-m", "vmfork.daemon", "--root", str(self.guest.root), *self._arguments],
            env=environment(),
        )
        eventually(self._is_up)

    def _is_up(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, "vmforkd ended at its start"
        return self.ctl("status", "--json=short").returncode == 0

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        assert self.process.wait(PATIENCE_SEC) == 0

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE_SEC)

    def ctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return vmforkctl(self.guest, *arguments)

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.ctl("status", "--json=short").stdout))

    def forks(self) -> list[dict[str, Any]]:
        return list(json.loads(self.ctl("list", "--json=short").stdout))

    def settled(self, generation: int) -> dict[str, Any]:
        """Wait until this generation settled or failed; the event."""
        run = self.ctl(
            "wait", "--settled", "--after", str(generation - 1), "--timeout", str(PATIENCE_SEC), "--json=short"
        )
        assert run.returncode in (0, 1), run.stderr
        return dict(json.loads(run.stdout))


def vmforkctl(guest: FakeGuest, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One run of vmforkctl below the guest's root."""
    return _run("vmfork", guest, *arguments)


def vmforkd(guest: FakeGuest, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One run of vmforkd that ends by itself."""
    return _run("vmfork.daemon", guest, *arguments)


def _run(module: str, guest: FakeGuest, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, "--root", str(guest.root), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def write_hook(guest: FakeGuest, name: str, body: str) -> Path:
    """A hook of the admin."""
    path = Path(guest.paths.hooks_etc) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path
