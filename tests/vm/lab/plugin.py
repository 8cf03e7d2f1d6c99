# SPDX-License-Identifier: Apache-2.0
"""The lab's fixtures for pytest: a workspace, images with vmfork in them, clones that end with their test.

A guest that a failed test used leaves its console, journal and vmfork's own view below artifacts/vm. What the lab does
meanwhile is shown at once, past pytest's capture: the first run builds images for minutes.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import host, view
from lab.clones import ARTIFACTS, Clones, ready
from lab.guest import Guest, Saved
from lab.guests import Guests
from lab.latency import LatencyTable, sample
from lab.payload import payload
from lab.workspace import workspace
from support.tools import unavailable

_failed = pytest.StashKey[bool]()
_table = LatencyTable()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """Let fixtures see whether their test failed."""
    outcome = yield
    if outcome.get_result().failed:
        item.stash[_failed] = True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the latency table, and keep it."""
    if _table.samples:
        terminalreporter.section("latencies (emulated)")
        for line in _table.lines():
            terminalreporter.write_line(line)
        _table.keep(ARTIFACTS)


class _Terminal(logging.Handler):
    """Shows the lab's progress on the terminal, past the capture."""

    def __init__(self, capture: Any, terminal: pytest.TerminalReporter) -> None:
        super().__init__(logging.INFO)
        self._capture = capture
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        text = f"lab: {record.getMessage()}"
        if self._capture is None:
            self._terminal.write_line(text)
            return
        with self._capture.global_and_fixture_disabled():
            self._terminal.write_line(text)


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Iterator[Path]:
    """The workspace of this run. Without the lab's tools there is none, and the test does not run."""
    missing = host.missing()
    if missing:
        unavailable(missing)
    plugins = request.config.pluginmanager
    terminal = plugins.get_plugin("terminalreporter")
    logger = logging.getLogger("lab")
    logger.setLevel(logging.INFO)
    handler = _Terminal(plugins.get_plugin("capturemanager"), terminal) if terminal else logging.NullHandler()
    logger.addHandler(handler)
    shutil.rmtree(ARTIFACTS, ignore_errors=True)
    with workspace() as directory:
        yield directory
    logger.removeHandler(handler)


@pytest.fixture(scope="session")
def guests(lab: Path) -> Guests:
    """Every kind of guest, with vmfork installed from this checkout."""
    return Guests(payload())


@pytest.fixture(scope="session")
def trixie(guests: Guests, lab: Path) -> Saved:
    """A Debian 13 guest that was saved while vmforkd and a program with random state ran in it."""
    return ready(Guest(guests.trixie(), "trixie", lab, guid=uuid.uuid4(), smbios_uuid=uuid.uuid4())).save()


@pytest.fixture
def clones(request: pytest.FixtureRequest) -> Iterator[Clones]:
    """Restored guests of this test."""
    made = Clones()
    try:
        yield made
    finally:
        failed = request.node.stash.get(_failed, False)
        made.end(ARTIFACTS / request.node.name if failed else None)


@pytest.fixture
def measured() -> Callable[[Guest, view.Event], view.Event]:
    """Puts an event's times into the table of latencies, and hands the event on."""

    def measure(guest: Guest, event: view.Event) -> view.Event:
        _table.add(sample(guest.spec.name, event, view.hook_trace(guest)))
        return event

    return measure
