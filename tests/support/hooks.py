# SPDX-License-Identifier: Apache-2.0
"""Hooks in a fake guest, and an engine run over them whose reports are kept."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmfork.model import EventState, ForkEvent, HookOutcome, HookResult, Identity, IdentityPolicy, Kind
from vmfork.paths import Paths
from vmfork.reactor.discovery import Hook, discover, runnable
from vmfork.reactor.engine import Engine
from vmfork.reactor.phases import Occasion, Phase
from vmfork.reactor.process import Limits
from vmfork.reactor.spawn import Starter

TOKEN = bytes(range(16))
QUICK = Limits(timeout_sec=0.4, kill_after_sec=0.3, retry_pause_sec=0.05)


@dataclass(frozen=True)
class Enabling:
    enable: str = "auto"
    timeout_sec: float | None = None


def always(_: str) -> Enabling:
    return Enabling()


def event(**changes: object) -> ForkEvent:
    fields: dict[str, object] = {
        "generation": 7,
        "token": TOKEN,
        "kind": Kind.LIVE,
        "edges": ("kmsg", "timer"),
        "generation_id": b"\xaa" * 16,
        "detected_at_ns": 1_700_000_000_000_000_000,
        "boottime_ns": 1,
        "identity": Identity(policy=IdentityPolicy.ROTATE, reason="a test"),
    }
    return ForkEvent(**{**fields, **changes})  # type: ignore[arg-type]


class Guest:
    """A fake guest below one directory, with both hooks directories."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths = Paths(str(root))
        self.lib = Path(self.paths.hooks_lib)
        self.etc = Path(self.paths.hooks_etc)
        for directory in (self.lib, self.etc):
            directory.mkdir(parents=True, mode=0o755)

    def hook(self, name: str, text: str, *, directory: Path | None = None, mode: int = 0o755) -> Path:
        """A shell hook, or with a #! line of its own anything else."""
        path = (directory or self.etc) / name
        body = textwrap.dedent(text)
        path.write_text(body if body.startswith("#!") else f"#!/bin/sh\n{body}")
        path.chmod(mode)
        return path

    def python_hook(self, name: str, text: str) -> Path:
        return self.hook(name, f"#!{sys.executable} -IS\n" + textwrap.dedent(text))

    def discover(self) -> dict[str, Hook]:
        return {hook.name: hook for hook in discover(self.paths, always)}


@dataclass
class Recorder:
    """A reporter that keeps what it is told; `on_start` may act like a daemon that supersedes."""

    on_start: Callable[[Hook], None] | None = None
    course: list[tuple[str, str]] = field(default_factory=list)
    results: dict[str, HookResult] = field(default_factory=dict)
    state: EventState | None = None
    step: int | None = None

    def started(self, hook: Hook) -> None:
        self.course.append(("start", hook.name))
        if self.on_start is not None:
            self.on_start(hook)

    def ended(self, result: HookResult) -> None:
        self.course.append(("end", result.name))
        assert result.name not in self.results, "a hook is reported once"
        self.results[result.name] = result

    def finished(self, state: EventState, clock_step_ns: int | None) -> None:
        self.state, self.step = state, clock_step_ns

    def outcomes(self) -> dict[str, HookOutcome]:
        return {name: result.result for name, result in self.results.items()}


def occasion(guest: Guest, phase: Phase = Phase.AFTER_FORK, **changes: object) -> Occasion:
    fields: dict[str, object] = {
        "phase": phase,
        "generation": 7,
        "event": event(),
        "identity": IdentityPolicy.ROTATE,
        "root": guest.paths.root,
    }
    return Occasion(**{**fields, **changes})  # type: ignore[arg-type]


def run(
    guest: Guest,
    *,
    on: Occasion | None = None,
    limits: Limits = QUICK,
    finished: Sequence[HookResult] = (),
    starters: Sequence[Starter] = (),
    reporter: Recorder | None = None,
) -> Recorder:
    """Discover and run all hooks of the guest."""
    recorder = reporter or Recorder()
    with Engine(on or occasion(guest), lambda _: limits, recorder, starters=starters) as engine:
        engine.run(runnable(discover(guest.paths, always)), finished)
    return recorder


def alive(pid: int) -> bool:
    """Whether a process lives, zombies not counted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def pids_in(path: Path) -> list[int]:
    """Process ids that hooks noted in a file, one per line."""
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def is_root() -> bool:
    return os.geteuid() == 0
