# SPDX-License-Identifier: Apache-2.0
"""Varlink's framing: JSON objects, each ended by a NUL byte, in UTF-8.

The decoder takes bytes in any pieces and holds no more than one message of at most `limit` bytes plus what was fed
last. Whatever is no varlink message (too long, too deep, not UTF-8, not JSON, not an object) is a ProtocolError; the
stream cannot be trusted after it and must be closed.
"""

from __future__ import annotations

import json

from vmfork.annotations import TYPE_CHECKING
from vmfork.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmfork.jsonfields import JsonObject, JsonValue

CALL_LIMIT = 64 * 1024
"""Bytes of one message that a server accepts."""

REPLY_LIMIT = 16 * 1024 * 1024
"""Bytes of one message that a client accepts: the history may be long."""

DEPTH_LIMIT = 32
"""Levels of nested objects and arrays in one message."""


def _refuse_constant(text: str) -> JsonValue:
    raise ValueError(f"{text} is no JSON value")


_decoder = json.JSONDecoder(parse_constant=_refuse_constant)
_encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


class Decoder:
    """Cuts a stream of bytes into messages; `place` names the peer in errors."""

    __slots__ = ("_buffer", "_limit", "_searched", "place")

    def __init__(self, *, limit: int, place: str) -> None:
        self.place = place
        self._limit = limit
        self._buffer = bytearray()
        self._searched = 0

    def __len__(self) -> int:
        """Bytes held."""
        return len(self._buffer)

    @property
    def has_message(self) -> bool:
        """True while a complete message waits for `take`."""
        return self._buffer.find(0, self._searched) >= 0

    def feed(self, data: bytes) -> None:
        """Add bytes; ProtocolError as soon as the message at the front is longer than the limit."""
        self._buffer += data
        self._end()

    def take(self) -> JsonObject | None:
        """The next complete message, None if there is none yet; ProtocolError if it is no JSON object."""
        message = self.peek()
        if message is not None:
            self.skip()
        return message

    def peek(self) -> JsonObject | None:
        """As `take`, but its bytes stay: the values of a message can take thirty times as much."""
        end = self._end()
        return None if end < 0 else decode(self._buffer[:end], self.place)

    def skip(self) -> None:
        """Forget the message that `peek` gave."""
        del self._buffer[: self._searched + 1]
        self._searched = 0

    def clear(self) -> None:
        """Forget everything that was fed."""
        self._buffer = bytearray()
        self._searched = 0

    def _end(self) -> int:
        """Where the first message ends, -1 if it is not complete."""
        end = self._buffer.find(0, self._searched)
        self._searched = len(self._buffer) if end < 0 else end
        if self._searched > self._limit:
            raise ProtocolError(self.place, f"sent a message longer than {self._limit} bytes")
        return end


def decode(message: bytes | bytearray, place: str) -> JsonObject:
    """One message without its NUL; ProtocolError names `place`."""
    try:
        value = _decoder.decode(message.decode())
    except (ValueError, RecursionError) as error:
        raise ProtocolError(place, "sent a message that is not JSON") from error
    if not isinstance(value, dict):
        raise ProtocolError(place, "sent a message that is not a JSON object")
    # Each level costs one opening bracket, so few brackets cannot be deep: the usual message is never walked.
    if message.count(b"{") + message.count(b"[") > DEPTH_LIMIT and _deeper_than(value, DEPTH_LIMIT):
        raise ProtocolError(place, f"sent a message with more than {DEPTH_LIMIT} levels")
    return value


def _deeper_than(value: JsonValue, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        below: list[JsonValue] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        if not below:
            return False
        level = below
    return any(isinstance(item, dict | list) for item in level)


def encode(message: Mapping[str, JsonValue]) -> bytes:
    """One message with its NUL. Plain ASCII, so that no character can break a reader's decoding."""
    return encode_item(message) + b"\0"


def encode_call(
    method: str, parameters: Mapping[str, JsonValue] | None = None, *, more: bool = False, oneway: bool = False
) -> bytes:
    """A call; `more` asks for a stream of replies, `oneway` for none."""
    call: JsonObject = {"method": method, "parameters": dict(parameters or {})}
    if more:
        call["more"] = True
    if oneway:
        call["oneway"] = True
    return encode(call)


def encode_reply(parameters: Mapping[str, JsonValue] | None = None, *, continues: bool = False) -> bytes:
    """A reply; `continues` announces another one to the same call."""
    reply: JsonObject = {"parameters": dict(parameters or {})}
    if continues:
        reply["continues"] = True
    return encode(reply)


def encode_item(item: Mapping[str, JsonValue]) -> bytes:
    """An object within a message."""
    return _encoder.encode(item).encode("ascii")


def encode_error(name: str, parameters: Mapping[str, JsonValue] | None = None) -> bytes:
    """An error in place of a reply; `name` is the qualified name of an error in an interface."""
    return encode({"error": name, "parameters": dict(parameters or {})})
