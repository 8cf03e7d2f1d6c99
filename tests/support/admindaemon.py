# SPDX-License-Identifier: Apache-2.0
"""The daemon's side of a reaction, and nothing else of the daemon: a real varlink server that has jobs to give."""

from __future__ import annotations

import os
import selectors
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from support.hooks import event
from vmfork.jsonfields import Fields, JsonObject
from vmfork.model import ForkEvent, HookOutcome, HookResult
from vmfork.paths import Paths
from vmfork.varlink.server import Call, Product, Server


@dataclass
class Work:
    """One job, and what was reported of it."""

    token: str
    phase: str = "after-fork"
    early: bool = False
    event: ForkEvent | None = field(default_factory=event)
    finished: dict[str, HookResult] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)
    state: str | None = None
    step: int | None = None

    def ok(self) -> set[str]:
        return {name for name, result in self.finished.items() if result.result is HookOutcome.OK}


class AdminDaemon:
    """Serves the admin socket of a fake guest from a thread; `next_job` gives what follows a job that ended."""

    def __init__(
        self, paths: Paths, job: Work | None, next_job: Callable[[Work], Work | None] = lambda _: None
    ) -> None:
        Path(paths.run_private).mkdir(parents=True, exist_ok=True)
        self.job = job
        self.done: list[Work] = []
        self.calls: list[str] = []
        self.before_answer: Callable[[Call], None] = lambda _: None
        self._next_job = next_job
        self._selector = selectors.DefaultSelector()
        self._stopped, self._stop = os.pipe()
        self._selector.register(self._stopped, selectors.EVENT_READ, None)
        methods = {"BeginReaction": self._begin, "ReportHook": self._report, "EndReaction": self._end}
        self._server = Server(
            self._selector,
            paths.admin_socket,
            mode=0o600,
            methods={f"io.vmfork.{name}": method for name, method in methods.items()},
            product=Product(version="0"),
        )
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._stop, b"x")
        self._thread.join()
        self._server.close()
        self._selector.close()
        os.close(self._stop)
        os.close(self._stopped)

    def _serve(self) -> None:
        while True:
            for key, mask in self._selector.select():
                if key.data is None:
                    return
                key.data(mask)

    def _begin(self, call: Call) -> None:
        self.calls.append("BeginReaction")
        job = self.job
        if job is None:
            call.error("io.vmfork.NothingToDo")
            return
        reply: JsonObject = {
            "phase": job.phase,
            "token": job.token,
            "event": None if job.event is None else job.event.to_json(with_ids=True),
            "finished": [result.to_json() for result in job.finished.values()],
            "early": job.early,
        }
        call.reply(reply)

    def _report(self, call: Call) -> None:
        self.before_answer(call)
        if call.connection.closed:
            return
        job = self._current(call)
        if job is None:
            return
        name = call.parameters.text("name")
        if "result" in call.parameters:
            job.finished[name] = HookResult.from_json(Fields(dict(call.values), "ReportHook"))
        else:
            job.begun.append(name)
        call.reply()

    def _end(self, call: Call) -> None:
        job = self._current(call)
        if job is None:
            return
        job.state = call.parameters.text("state")
        job.step = call.parameters.integer_or_none("clock_step_ns", minimum=-(2**63), maximum=2**63 - 1)
        self.done.append(job)
        self.job = self._next_job(job)
        call.reply()

    def _current(self, call: Call) -> Work | None:
        token = call.parameters.text("token")
        if self.job is None or token != self.job.token:
            call.error("io.vmfork.Superseded")
            return None
        return self.job
