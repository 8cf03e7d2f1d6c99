# SPDX-License-Identifier: Apache-2.0
"""One varlink call as the service sees it: what is asked, by whom, and the way to answer.

A call is answered by exactly one final `reply` or `error`, at once or later; a call with `more` may be sent replies
with `continues` before that. Answers to a oneway call, or to a peer that has gone, are dropped silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vmfork.annotations import Protocol
from vmfork.errors import InputError, ProtocolError
from vmfork.jsonfields import Fields, JsonObject, JsonValue
from vmfork.varlink import framing


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who connected, as the kernel noted it at connect(): uid in our user namespace, pid in ours or 0.

    No proof of privilege: uid 0 may be the root of a container that was given the socket.
    """

    uid: int
    pid: int


class Caller(Protocol):
    """The connection that a call came over. `on_close` is called once, when it has ended for whatever reason."""

    peer: Peer
    closed: bool
    on_close: Callable[[], None] | None

    def send_encoded(self, message: bytes) -> None: ...

    def deliver(self, call: Call, message: bytes | memoryview, *, final: bool) -> None: ...

    def close(self, reason: str) -> None: ...


class InvalidParameter(InputError):
    """A parameter of a call has a wrong type or value; `parameter` names it."""

    def __init__(self, place: str, parameter: str, wanted: str) -> None:
        super().__init__(place, f"parameter {parameter!r} is not {wanted}")
        self.parameter = parameter


class Parameters(Fields):
    """A call's parameters; a getter that finds something else than it wants raises InvalidParameter."""

    __slots__ = ()

    def wrong(self, name: str, wanted: str) -> InvalidParameter:
        return InvalidParameter(self.place, name, wanted)


class Call:
    """One call in progress on `connection`. `on_abandoned` is called if that ends before the call was answered."""

    __slots__ = ("connection", "finished", "held", "method", "more", "on_abandoned", "oneway", "parameters", "values")

    def __init__(self, connection: Caller, message: JsonObject) -> None:
        """ProtocolError if the message is no call."""
        place = f"varlink peer {connection.peer.pid}"
        fields = Fields(message, place)
        try:
            self.method = fields.text("method")
            self.more = fields.flag("more")
            self.oneway = fields.flag("oneway")
            upgrade = fields.flag("upgrade")
        except InputError as error:
            raise ProtocolError(place, f"sent something that is no call: {error.problem}") from error
        values = message.get("parameters")
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise ProtocolError(place, "sent a call whose parameters are no object")
        if upgrade or (self.more and self.oneway):
            raise ProtocolError(place, "sent a call with flags that cannot be served")
        self.connection = connection
        self.values = values
        self.parameters = Parameters(values, f"call of {self.method}")
        self.finished = False
        self.held = bytearray()
        self.on_abandoned: Callable[[], None] | None = None

    @property
    def peer(self) -> Peer:
        return self.connection.peer

    def reply(self, parameters: Mapping[str, JsonValue] | None = None, *, continues: bool = False) -> None:
        """Answer; with `continues` (only where the call asked for `more`) the call stays open for the next reply."""
        if continues and not self.more:
            raise ValueError(f"{self.method} was called without more: it gets one reply")
        self._deliver(framing.encode_reply(parameters, continues=continues), final=not continues)

    def reply_encoded(self, message: bytes | memoryview) -> None:
        """Answer with what is encoded already."""
        self._deliver(message, final=True)

    def error(self, name: str, parameters: Mapping[str, JsonValue] | None = None) -> None:
        """Answer with an error, by its qualified name."""
        self._deliver(framing.encode_error(name, parameters), final=True)

    def _deliver(self, message: bytes | memoryview, *, final: bool) -> None:
        if self.finished:
            raise ValueError(f"{self.method} was already answered")
        self.finished = final
        if not self.oneway and not self.connection.closed:
            self.connection.deliver(self, message, final=final)
