# SPDX-License-Identifier: Apache-2.0
"""What the clients of one server use, by user: connections, and bytes that are buffered for them.

Root has places of its own, which nobody else can take. All other users share the rest, and who is late is not refused
because others were early: when all is taken, the user with the most yields, as long as that leaves them no less than
the one who comes. So every user gets what falls to each where all get the same, and nobody is dropped who has no more
than that. A user is a uid as the kernel shows it: one with a range of subordinate uids is as many users.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmfork.annotations import Generic, Protocol, TypeVar
from vmfork.varlink.call import Peer
from vmfork.varlink.framing import CALL_LIMIT

T = TypeVar("T")

ROOT = 0
_PAGE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What clients may use. Sizes in bytes; `buffered` counts what is queued in both directions.

    `connections` and `buffered` are for all users but root together: the root of a container must not lock everybody
    else out, nor they the root of this guest.
    """

    connections: int = 4096
    connections_per_uid: int = 1200
    connections_of_root: int = 2400
    message: int = CALL_LIMIT
    queue: int = 128 * 1024
    buffered: int = 64 * 1024 * 1024
    buffered_per_uid: int = 16 * 1024 * 1024
    calls_per_turn: int = 8
    accepts_per_turn: int = 64


class Client(Protocol):
    """What is counted: a connection, with the bytes that are buffered for it."""

    @property
    def peer(self) -> Peer: ...

    @property
    def charged(self) -> int: ...

    def close(self, reason: str) -> None: ...


class _Ranking(Generic[T]):
    """Items by a number of theirs, of which the one with most is found without a look at each: thousands of users with
    next to nothing must not make it dear. There are few different numbers: their sum is bounded by Limits."""

    __slots__ = ("_items",)

    def __init__(self) -> None:
        self._items: dict[int, dict[T, None]] = {}

    def move(self, item: T, old: int, new: int) -> None:
        """Its number was `old` and is `new`; who has 0 is not ranked."""
        if old == new:
            return
        if old:
            same = self._items[old]
            del same[item]
            if not same:
                del self._items[old]
        if new:
            self._items.setdefault(new, {})[item] = None

    def first(self) -> T | None:
        """The one with most; of equal ones the latest to get there. None if nobody has anything."""
        return next(reversed(self._items[max(self._items)])) if self._items else None


class _User:
    __slots__ = ("buffered", "by_pages", "clients")

    def __init__(self) -> None:
        # In the order in which they came.
        self.clients: dict[Client, None] = {}
        self.buffered = 0
        self.by_pages: _Ranking[Client] = _Ranking()


class Shares:
    """Counts, and decides who yields. A client that yields is closed at once, and is then taken off with `remove`."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._users: dict[int, _User] = {}
        # All but root.
        self._by_connections: _Ranking[int] = _Ranking()
        self._by_pages: _Ranking[int] = _Ranking()
        self.connections = 0
        self.buffered = 0

    def clients(self) -> list[Client]:
        """All of them; they may be closed meanwhile."""
        return [client for user in self._users.values() for client in user.clients]

    def admits(self, uid: int) -> bool:
        """Whether this user may have one more connection; the newest one of another user is closed where it must."""
        own = self._connections_of(uid)
        if own >= (self._limits.connections_of_root if uid == ROOT else self._limits.connections_per_uid):
            return False
        if uid == ROOT or self.connections - self._connections_of(ROOT) < self._limits.connections:
            return True
        greediest = self._by_connections.first()
        if greediest is None or self._connections_of(greediest) <= own + 1:
            return False
        next(reversed(self._users[greediest].clients)).close("makes room for another user")
        return True

    def add(self, client: Client) -> None:
        uid = client.peer.uid
        user = self._users.setdefault(uid, _User())
        user.clients[client] = None
        self.connections += 1
        if uid != ROOT:
            self._by_connections.move(uid, len(user.clients) - 1, len(user.clients))

    def remove(self, client: Client) -> None:
        """It has ended, with whatever was buffered for it."""
        uid = client.peer.uid
        user = self._users[uid]
        self._count(client, user, -client.charged, was=client.charged)
        del user.clients[client]
        self.connections -= 1
        if uid != ROOT:
            self._by_connections.move(uid, len(user.clients) + 1, len(user.clients))
        if not user.clients:
            del self._users[uid]

    def charge(self, client: Client, amount: int) -> bool:
        """Count more bytes, or fewer, which are in the client's `charged` already. Where that is too much, who has the
        most is closed; False if it was this client."""
        uid = client.peer.uid
        user = self._users[uid]
        self._count(client, user, amount, was=client.charged - amount)
        while user.buffered > self._limits.buffered_per_uid:
            _drop_largest(user, "its user has too much waiting")
        while uid != ROOT and self.buffered - self._buffered_of_root() > self._limits.buffered:
            greediest = self._by_pages.first()
            assert greediest is not None
            _drop_largest(self._users[greediest], "all users have too much waiting")
        return client in user.clients

    def _count(self, client: Client, user: _User, amount: int, *, was: int) -> None:
        self.buffered += amount
        user.buffered += amount
        user.by_pages.move(client, _pages(was), _pages(was + amount))
        if client.peer.uid != ROOT:
            self._by_pages.move(client.peer.uid, _pages(user.buffered - amount), _pages(user.buffered))

    def _connections_of(self, uid: int) -> int:
        user = self._users.get(uid)
        return 0 if user is None else len(user.clients)

    def _buffered_of_root(self) -> int:
        user = self._users.get(ROOT)
        return 0 if user is None else user.buffered


def _pages(size: int) -> int:
    # Who has more by less than a page does not have more.
    return (size + _PAGE - 1) // _PAGE


def _drop_largest(user: _User, reason: str) -> None:
    largest = user.by_pages.first()
    assert largest is not None
    largest.close(reason)
