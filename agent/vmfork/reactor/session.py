# SPDX-License-Identifier: Apache-2.0
"""One life of the reactor, `vmforkctl react`: take the lock, ask the daemon what is to be done, do it, report it.

The lock is held until this process ends, so two reactors never run at once, and before the first hook starts what a
killed predecessor left running is ended: hooks of two reactions never run at once either. Nothing is remembered here;
what was done is with the daemon, which runs the reactor again until it got a result.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from vmfork import ids
from vmfork.annotations import Protocol
from vmfork.errors import DaemonUnreachable, VmforkError
from vmfork.jsonfields import Fields
from vmfork.model import EventState, ForkEvent, HookResult
from vmfork.paths import Paths
from vmfork.reactor.descendants import die_with
from vmfork.reactor.discovery import discover, runnable
from vmfork.reactor.engine import Engine, Reporter
from vmfork.reactor.environment import PATH
from vmfork.reactor.inprocess import InProcess
from vmfork.reactor.ledger import Ledger
from vmfork.reactor.phases import Occasion, Phase
from vmfork.reactor.process import Limits
from vmfork.reactor.reports import DaemonReporter, Reporters
from vmfork.varlink.client import Client, Overdue, RemoteError

log = logging.getLogger(__name__)

NOTHING_TO_DO = "io.vmfork.NothingToDo"
_CONNECT_SEC = 5.0
_CONNECT_PAUSE_SEC = 0.05
# A hook that is disabled in a file that cannot be read now must not run: that is worth a wait. In the end the hooks
# that make this clone differ from its siblings are worth more.
_CONFIGURATION_SEC = 10.0
_CONFIGURATION_PAUSE_SEC = 0.2
_TARGET = "vmfork.target"


class OneHook(Protocol):
    """What the configuration says of one hook."""

    @property
    def enable(self) -> str: ...
    @property
    def timeout_sec(self) -> float | None: ...
    @property
    def keys(self) -> Mapping[str, str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the reactor wants of the configuration: the general time-out, and the settings of one hook by its name.

    `spread_sec` is what the hooks named in `spreading` get on top of their time-out, to wait for this clone's turn.
    """

    timeout_sec: float
    hook: Callable[[str], OneHook]
    spread_sec: float = 0.0
    spreading: frozenset[str] = frozenset()

    def limits(self, name: str, *, early: bool = False) -> Limits:
        """The bounds of one hook."""
        own = self.hook(name).timeout_sec
        turn_sec = self.spread_sec if os.path.splitext(name)[0] in self.spreading and not early else 0.0
        return Limits(timeout_sec=(self.timeout_sec if own is None else own) + turn_sec, retries=not early)

    def keys(self, name: str) -> Mapping[str, str]:
        """The hook's own keys."""
        return self.hook(name).keys


def configured(paths: Paths) -> Rules:
    """The rules of vmfork.conf; what is broken in there is logged and its default used."""
    from vmfork import config, settings

    deadline = time.monotonic() + _CONFIGURATION_SEC
    while not (loaded := config.load(paths)).is_whole and time.monotonic() < deadline:
        time.sleep(_CONFIGURATION_PAUSE_SEC)
    for problem in loaded.problems:
        log.warning("%s", problem, extra={"MESSAGE_ID": ids.CONFIGURATION_BROKEN})
    return Rules(
        timeout_sec=loaded.get(settings.TIMEOUT_SEC),
        hook=loaded.hook,
        spread_sec=loaded.get(settings.SPREAD_SEC),
        spreading=settings.SPREADING_HOOKS,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the daemon wants to have done."""

    token: str
    occasion: Occasion
    finished: tuple[HookResult, ...]


def react(
    paths: Paths, *, parent: int | None = None, rules: Rules | None = None, watcher: Reporter | None = None
) -> int:
    """Do what the daemon has for a reactor to do, if anything; the exit code of `vmforkctl react`.

    With `parent`, end when that process ends. `watcher` is told of everything that the daemon is told of. Raises
    DaemonUnreachable, and InputError for a daemon of another version.
    """
    if parent is not None and not die_with(parent):
        return 1
    _fill_standard_descriptors()
    with _locked(paths.react_lock), Ledger(paths) as ledger, _connected(paths.admin_socket) as client:
        try:
            job = _job(client.call("io.vmfork.BeginReaction"), paths)
        except RemoteError as error:
            if error.name == NOTHING_TO_DO:
                return 0
            raise
        return _do(job, paths, rules or configured(paths), client, ledger, watcher)


def _do(job: Job, paths: Paths, rules: Rules, client: Client, ledger: Ledger, watcher: Reporter | None) -> int:
    occasion = job.occasion
    hooks = runnable(discover(paths, rules.hook))
    reporter = DaemonReporter(client, job.token, lambda: engine.interrupt())
    everybody = Reporters(reporter, watcher) if watcher is not None else reporter
    starters = [InProcess(rules.keys)]

    def limits_of(name: str) -> Limits:
        return rules.limits(name, early=occasion.early)

    with Engine(occasion, limits_of, everybody, records=ledger, starters=starters) as engine, _ended_by_signals(engine):
        state = engine.run(hooks, job.finished)
    fields = {"VMFORK_GENERATION": occasion.generation}
    if reporter.trouble is not None:
        raise reporter.trouble
    if state is EventState.SUPERSEDED or reporter.superseded:
        log.info("superseded", extra={**fields, "MESSAGE_ID": ids.REACTION_SUPERSEDED})
        return 0
    if occasion.phase is Phase.AFTER_FORK and not occasion.early:
        start_target(paths)
    return 0 if state is EventState.SETTLED else 1


def _job(reply: Mapping[str, object], paths: Paths) -> Job:
    fields = Fields(dict(reply), "answer to BeginReaction")  # type: ignore[arg-type]
    told = fields.object_or_none("event")
    event = None if told is None else ForkEvent.from_json(told)
    occasion = Occasion(
        phase=fields.choice("phase", Phase),
        generation=event.generation if event is not None else generation_of(paths),
        event=event,
        identity=event.identity.policy if event is not None else None,
        early=fields.flag("early"),
        root=paths.root,
    )
    finished = tuple(HookResult.from_json(item) for item in fields.objects("finished"))
    return Job(token=fields.text("token"), occasion=occasion, finished=finished)


def generation_of(paths: Paths) -> int:
    """The generation of the page, 1 where there is none; before the first fork there is no event to ask."""
    from vmfork import page

    try:
        return page.read_page(paths.generation_page).generation
    except VmforkError:
        return 1


def start_target(paths: Paths) -> None:
    """Start vmfork.target for the admin's own units; waits for nothing, and not below a root prefix."""
    if paths.is_fake or not os.path.isdir(paths.systemd_runs):
        return
    # Only now: its import would delay the first hook.
    import subprocess

    command = ["systemctl", "--no-block", "start", _TARGET]
    try:
        subprocess.run(command, check=True, timeout=10, env={"PATH": PATH}, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s was not started: %s", _TARGET, error)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold the lock; waits for its present holder's end. It goes with this process, however that ends."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        hint = "is vmforkd running? systemctl start vmforkd"
        raise DaemonUnreachable(f"cannot open {path}: {error.strerror}", hint=hint) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _connected(path: str) -> Client:
    """The daemon may be just starting again: try for a few seconds."""
    deadline = time.monotonic() + _CONNECT_SEC
    while True:
        try:
            return Client.connect(path)
        except DaemonUnreachable as error:
            if isinstance(error, Overdue) or time.monotonic() > deadline:
                raise
        time.sleep(_CONNECT_PAUSE_SEC)


@contextlib.contextmanager
def _ended_by_signals(engine: Engine) -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: engine.interrupt()) for number in numbers}
    wakeup = signal.set_wakeup_fd(engine.wakeup, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)


def _fill_standard_descriptors() -> None:
    """A pipe that took the place of a closed 0, 1 or 2 would be overwritten in the hooks."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.dup(descriptor)
    os.close(descriptor)
