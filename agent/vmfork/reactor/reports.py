# SPDX-License-Identifier: Apache-2.0
"""Reports of a reaction: to the daemon over its admin socket, and line by line to a person at a terminal.

A daemon that is gone, or that already reacts to a newer fork, ends the run: the report that finds it out calls
`interrupt`, and nothing more is sent. What the daemon did not hear of is run again, which hooks are made for.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping

from vmfork.annotations import Protocol, TextIO
from vmfork.errors import VmforkError
from vmfork.jsonfields import JsonObject, JsonValue
from vmfork.model import EventState, HookOutcome, HookResult
from vmfork.reactor.discovery import Hook
from vmfork.reactor.engine import Reporter
from vmfork.varlink.client import RemoteError

log = logging.getLogger(__name__)

SUPERSEDED = "io.vmfork.Superseded"


class Caller(Protocol):
    """The part of varlink's client that reports need."""

    def call(self, method: str, parameters: Mapping[str, JsonValue] | None = None) -> JsonObject: ...


class DaemonReporter:
    """Tells the daemon. `trouble` says why it could not be told any more; `superseded` that a newer fork came."""

    def __init__(self, client: Caller, token: str, interrupt: Callable[[], None]) -> None:
        self.superseded = False
        self.trouble: VmforkError | None = None
        self._client = client
        self._token = token
        self._interrupt = interrupt

    def started(self, hook: Hook) -> None:
        self._say("ReportHook", {"name": hook.name, "path": hook.path})

    def ended(self, result: HookResult) -> None:
        self._say("ReportHook", result.to_json())

    def finished(self, state: EventState, clock_step_ns: int | None) -> None:
        self._say("EndReaction", {"state": state.value, "clock_step_ns": clock_step_ns})

    def _say(self, method: str, parameters: JsonObject) -> None:
        if self.superseded or self.trouble is not None:
            return
        try:
            self._client.call(f"io.vmfork.{method}", {"token": self._token, **parameters})
        except RemoteError as error:
            self.superseded = error.name == SUPERSEDED
            self.trouble = None if self.superseded else error
            self._interrupt()
        except VmforkError as error:
            self.trouble = error
            self._interrupt()


class TerminalReporter:
    """Prints one line for each hook when it ends, and on a terminal one that names what runs now."""

    _SIGNS: Mapping[HookOutcome, tuple[str, str]] = {
        HookOutcome.OK: ("32", "ok"),
        HookOutcome.SKIPPED: ("2", "skipped"),
        HookOutcome.MASKED: ("2", "masked"),
    }

    def __init__(self, stream: TextIO | None = None, *, colour: bool | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._live = self._stream.isatty()
        self._colour = self._live if colour is None else colour
        self._running: list[str] = []
        self._shown: set[str] = set()

    def started(self, hook: Hook) -> None:
        self._running.append(hook.name)
        self._show_running()

    def ended(self, result: HookResult) -> None:
        self._running = [name for name in self._running if name != result.name]
        self._shown.add(result.name)
        self._clear()
        colour, word = self._SIGNS.get(result.result, ("31", result.result.value))
        took = "" if result.duration_ms is None else f"{result.duration_ms} ms"
        shown = f"\x1b[{colour}m{word:<11}\x1b[0m" if self._colour else f"{word:<11}"
        print(f"  {result.name:<24} {shown} {took}".rstrip(), file=self._stream, flush=True)
        self._show_running()

    def finished(self, state: EventState, clock_step_ns: int | None) -> None:
        self._clear()
        step = "" if clock_step_ns is None else f", the clock was stepped by {clock_step_ns / 1e9:+.3f} s"
        print(f"{state.value}{step}", file=self._stream, flush=True)

    def follow(self, results: tuple[HookResult, ...]) -> None:
        """Show those of somebody else's results that were not shown yet: for a reaction that runs elsewhere."""
        for result in results:
            if result.name not in self._shown:
                self.ended(result)

    def _show_running(self) -> None:
        if self._live and self._running:
            names = ", ".join(self._running)
            self._stream.write(f"\r\x1b[K  {names[:70]} …")
            self._stream.flush()

    def _clear(self) -> None:
        if self._live:
            self._stream.write("\r\x1b[K")


class Reporters:
    """Several reporters as one, told in this order."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def started(self, hook: Hook) -> None:
        for reporter in self._reporters:
            reporter.started(hook)

    def ended(self, result: HookResult) -> None:
        for reporter in self._reporters:
            reporter.ended(result)

    def finished(self, state: EventState, clock_step_ns: int | None) -> None:
        for reporter in self._reporters:
            reporter.finished(state, clock_step_ns)
