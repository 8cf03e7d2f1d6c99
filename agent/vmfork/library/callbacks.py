# SPDX-License-Identifier: Apache-2.0
"""Functions that run in this process after a fork of the virtual machine, and before a snapshot of it.

They run one after the other in a daemon thread of the library, which starts with the first registration and again in
each child of os.fork(). The thread is a tracked subscriber: `vmforkctl prepare` and "settled" wait for the functions.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from vmfork.annotations import ParamSpec, TypeVar
from vmfork.errors import VmforkError
from vmfork.library.root import paths
from vmfork.library.subscription import Notice, Subscription
from vmfork.page import read_page

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_Entry = tuple[Callable[..., object], tuple[object, ...], dict[str, object]]


class _Thread:
    """The functions of this process and the thread that runs them."""

    def __init__(self) -> None:
        self.after_fork: list[_Entry] = []
        self.before_snapshot: list[_Entry] = []
        self._lock = threading.Lock()
        self._subscription: Subscription | None = None
        self._handled: int | None = None

    def start(self) -> None:
        """Start the thread unless it runs."""
        with self._lock:
            if self._subscription is not None:
                return
            where = paths()
            if self._handled is None:
                try:
                    self._handled = read_page(where.generation_page).generation
                except VmforkError as error:
                    log.debug("the daemon is waited for: %s", error)
            self._subscription = Subscription(where, track=True, after=self._handled, patient=True)
            threading.Thread(target=self._run, args=(self._subscription,), name="vmfork-callbacks", daemon=True).start()

    def restart_in_child(self) -> None:
        """After os.fork(): the thread is the parent's, and so is its connection."""
        self._lock = threading.Lock()
        inherited, self._subscription = self._subscription, None
        if inherited is not None:
            inherited.abandon()
            self.start()

    def _run(self, subscription: Subscription) -> None:
        while True:
            notice = subscription.wait()
            if notice is not None:
                self._handle(subscription, notice)

    def _handle(self, subscription: Subscription, notice: Notice) -> None:
        if notice.kind == "fork":
            _call_all(self.after_fork[:])
            self._handled = notice.generation
            subscription.acknowledge(notice.generation)
        elif notice.kind == "before-snapshot":
            _call_all(self.before_snapshot[::-1])
            subscription.acknowledge(notice.generation, notice.snapshot)
        elif notice.kind == "hello":
            self._handled = notice.generation


def _call_all(entries: list[_Entry]) -> None:
    for func, args, kwargs in entries:
        try:
            func(*args, **kwargs)
        except (Exception, SystemExit):
            log.exception("%r, registered with vmfork, failed", func)


_thread = _Thread()
os.register_at_fork(after_in_child=_thread.restart_in_child)


def register_after_fork(func: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Callable[P, R]:
    """Call `func(*args, **kwargs)` after each fork that vmforkd noticed; returns `func`, so it is a decorator too.

    Functions run in the order of their registration, in the library's thread, some time after the fork: code that
    must not run in between needs `unforked` or a Guard. What a function raises is logged, the others still run.
    Several forks while vmforkd was away count as one. Works before vmforkd is installed or running; never raises.
    """
    _thread.after_fork.append((func, args, kwargs))
    _thread.start()
    return func


def unregister_after_fork(func: Callable[..., object]) -> None:
    """Forget all registrations of `func`; nothing happens if there is none."""
    _thread.after_fork[:] = [entry for entry in _thread.after_fork if entry[0] != func]


def register_before_snapshot(func: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Callable[P, R]:
    """Call `func(*args, **kwargs)` when root announces a snapshot with `vmforkctl prepare`, which waits for it.

    The last registered function runs first. A snapshot that nobody announces runs nothing. Also a decorator.
    """
    _thread.before_snapshot.append((func, args, kwargs))
    _thread.start()
    return func


def unregister_before_snapshot(func: Callable[..., object]) -> None:
    """Forget all registrations of `func`; nothing happens if there is none."""
    _thread.before_snapshot[:] = [entry for entry in _thread.before_snapshot if entry[0] != func]
