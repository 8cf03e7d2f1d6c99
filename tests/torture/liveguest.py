# SPDX-License-Identifier: Apache-2.0
"""A fake guest with one hook and a running detector, and what can be asked of the two from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from support.fakeguest import FakeGuest
from support.runningdaemon import environment, write_hook
from torture.scenario import PATIENCE_SEC, Broken, listens, problems_of, scratch
from torture.table import Row
from vmfork import history, state
from vmfork.page import STATE_REACTING, read_page
from vmfork.varlink.client import Client

# Leaves a line for each fork that it ran for.
HOOK = 'echo "$VMFORK_GENERATION" >>"$VMFORK_ROOT/ran"'


class LiveGuest:
    """A guest with one hook and a running detector; a context manager."""

    def __init__(self, name: str, *, hook: str = HOOK) -> None:
        self.row = Row(name=name, cases=1)
        self._directory = tempfile.TemporaryDirectory(prefix="vmfork-torture.", dir=scratch())
        self.top = Path(self._directory.name)
        self.guest = FakeGuest(self.top / "guest")
        write_hook(self.guest, "10-hook", hook)
        self.environment = environment()
        self._log = (self.top / "log").open("ab")
        self.process: subprocess.Popen[bytes] | None = None
        self.words: list[str] = [sys.executable, "-m", "vmfork.daemon"]

    def __enter__(self) -> LiveGuest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self._log.close()
        self.guest.close()
        self._directory.cleanup()

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the detector and wait for nothing."""
        self.process = subprocess.Popen(
            [*self.words, "--root", str(self.guest.root)],
            env=self.environment,
            stderr=self._log,
        )
        return self.process

    def start(self) -> int:
        """Start the detector and wait until it watches; its PID."""
        self.launch()
        self.await_watching()
        assert self.process is not None
        return self.process.pid

    def await_watching(self) -> None:
        self.until(lambda: listens(self.guest), "the daemon listens")
        self.until(lambda: read_page(self.guest.paths.generation_page).detection > 0, "the daemon watches")

    def configure(self, text: str) -> None:
        """What the admin wrote into vmfork.conf."""
        self.guest.put(f"{self.guest.paths.config_etc}/vmfork.conf", text.encode())

    def stop(self) -> None:
        """Tell it to end; it must do so by itself."""
        assert self.process is not None
        self.process.terminate()
        self.row.check(self.process.wait(PATIENCE_SEC) == 0, f"the daemon ended badly: {self.last_words()}")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE_SEC
        while not condition():
            assert self.process is not None
            if self.process.poll() is not None:
                raise Broken(f"the daemon ended with exit status {self.process.returncode}: {self.last_words()}")
            if time.monotonic() > end:
                raise Broken(f"it did not come true that {what}: {self.last_words()}")
            time.sleep(0.005)

    def log_text(self) -> str:
        """What the daemon and its reactors logged."""
        return (self.top / "log").read_text(errors="replace")

    def last_words(self) -> str:
        return " | ".join(self.log_text().splitlines()[-3:])

    def fork(self) -> bytes:
        value = os.urandom(16)
        self.guest.fork(value)
        self.row.sent += 1
        return value

    def shows(self, generation: int) -> bool:
        return read_page(self.guest.paths.generation_page).generation == generation

    def is_over(self) -> bool:
        return read_page(self.guest.paths.generation_page).state != STATE_REACTING

    def events(self) -> list[int]:
        """The generations of the history."""
        return [one.generation for one in history.load(self.guest.paths).events]

    def last_id(self) -> bytes | None:
        """The generation ID of the history's newest fork."""
        events = history.load(self.guest.paths).events
        return events[-1].generation_id if events else None

    def ran(self) -> list[str]:
        path = self.guest.root / "ran"
        return path.read_text().split() if path.exists() else []

    def problems(self) -> list[str]:
        return problems_of(self.guest)

    def reload(self) -> None:
        """Read the configuration and probe the sources again; returns when that is done."""
        with Client.connect(self.guest.paths.admin_socket) as client:
            client.call("io.vmfork.Reload", {})

    def is_written(self, generation: int, value: bytes | None) -> bool:
        """Disk and memory know of this fork and that it was handled; `value` is the ID, None where none is readable."""
        saved, remembered = state.load_saved(self.guest.paths), state.load_remembered(self.guest.paths)
        events = history.load(self.guest.paths).events
        if saved is None or remembered is None or [one.generation for one in events] != [*range(2, generation + 1)]:
            return False
        return (saved.generation, saved.generation_id, saved.handled_token) == (
            generation,
            value,
            events[-1].token,
        ) and (remembered.generation, remembered.handled) == (generation, True)
