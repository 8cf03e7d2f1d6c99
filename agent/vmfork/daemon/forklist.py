# SPDX-License-Identifier: Apache-2.0
"""Answers ListForks, a few forks in each round of the loop.

Everybody may ask for the whole history, as often as they like: a thousand forks take 0.1 s to read, and many askers at
once must neither keep the loop from noticing a fork nor make the daemon grow. So one asker is served at a time, of what
was read only the encoded text is kept, and who hangs up is forgotten: a connection has at most one call in progress, so
no more can wait than are connected. Users are served in turn, whole answers each, however often one of them asks. A
history that cannot be read is an empty one here: `vmforkctl list` reads it itself where there is no daemon, and says
what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vmfork import history
from vmfork.daemon.loop import Loop
from vmfork.errors import InputError
from vmfork.jsonfields import JsonObject
from vmfork.model import ForkEvent
from vmfork.paths import Paths
from vmfork.varlink.call import Call
from vmfork.varlink.listreply import ListReply

# One fork with a dozen hooks takes 0.1 ms.
_IN_ONE_ROUND = 8
# Half of what a client accepts: forks with very many hooks are left out from the oldest on.
_MOST_BYTES = 8 << 20


class _Answer:
    """One call being answered: `forks` gives the forks as JSON, the newest first, None for one that is unreadable."""

    __slots__ = ("call", "forks", "reply")

    def __init__(self, call: Call, forks: Iterator[JsonObject | None]) -> None:
        self.call = call
        self.forks = forks
        self.reply: ListReply | None = None

    def go_on(self) -> bool:
        """Read some more; False when it is complete."""
        try:
            reply = self.reply = self.reply or ListReply("forks", capacity=_MOST_BYTES)
        except OSError as error:
            # Strict overcommit, or more mappings than one process may have.
            self.call.error("io.vmfork.Failed", {"message": f"no memory for the list of forks: {error.strerror}"})
            return False
        try:
            for _ in range(_IN_ONE_ROUND):
                fork = next(self.forks)
                if fork is not None and not reply.prepend(fork):
                    break
            else:
                return True
        except (StopIteration, InputError):
            pass
        self.call.reply_encoded(reply.message())
        return False


class ForkList:
    """The newest forks, for who asks; `newest` gives the one that may not be in the history yet."""

    def __init__(self, loop: Loop, paths: Paths, *, newest: Callable[[], ForkEvent | None]) -> None:
        self._loop = loop
        self._paths = paths
        self._newest = newest
        self._current: _Answer | None = None
        # By user, whose turn is next first; of each user in the order of the calls.
        self._waiting: dict[int, dict[Call, _Answer]] = {}
        self._at_work = False

    @property
    def unanswered(self) -> int:
        """How many calls are not answered yet."""
        return (self._current is not None) + sum(map(len, self._waiting.values()))

    def answer(self, call: Call, *, with_ids: bool) -> None:
        """Take up the call; it is answered after those of its user that came before it."""
        limit = call.parameters.integer_or_none("limit", maximum=history.KEPT)
        shown = self._shown(history.KEPT if limit is None else limit, with_ids=with_ids)
        self._waiting.setdefault(call.peer.uid, {})[call] = _Answer(call, shown)
        call.on_abandoned = lambda: self._forget(call)
        if not self._at_work:
            self._go_on()

    def _go_on(self) -> None:
        answer = self._current = self._current or self._next()
        if answer is not None and not answer.go_on():
            self._current = None
        self._at_work = self._current is not None or bool(self._waiting)
        if self._at_work:
            self._loop.after(0, self._go_on)

    def _next(self) -> _Answer | None:
        if not self._waiting:
            return None
        uid, calls = next(iter(self._waiting.items()))
        answer = calls.pop(next(iter(calls)))
        del self._waiting[uid]
        if calls:
            self._waiting[uid] = calls
        return answer

    def _forget(self, call: Call) -> None:
        if self._current is not None and self._current.call is call:
            self._current = None
        calls = self._waiting.get(call.peer.uid, {})
        if calls.pop(call, None) is not None and not calls:
            del self._waiting[call.peer.uid]

    def _shown(self, limit: int, *, with_ids: bool) -> Iterator[JsonObject | None]:
        for event in self._forks():
            if limit == 0:
                return
            if event is None:
                yield None
                continue
            limit -= 1
            yield event.to_json(with_ids=with_ids)

    def _forks(self) -> Iterator[ForkEvent | None]:
        newest = self._newest()
        if newest is not None:
            yield newest
        for event in history.newest_first(self._paths):
            if event is None or newest is None or event.token != newest.token:
                yield event
