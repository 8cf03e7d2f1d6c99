# SPDX-License-Identifier: Apache-2.0
"""The nouns of vmfork: what a fork is, what a hook did, what a source says. Frozen values with their JSON form.

The JSON forms are the public contract: field names and values are stable, absent values are null. A generation ID is
a secret of root, so `to_json` leaves it out unless it is asked for by name.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from enum import StrEnum

from vmfork.jsonfields import Fields, JsonObject, JsonValue

# Generations go through varlink and JSON, where integers are signed. No guest is ever forked that often: a file that
# says more is broken, and one more than it would not fit the page.
LAST_GENERATION = 2**63 - 2


class Kind(StrEnum):
    """What sort of fork: `live` in the same boot, `cold` found at another boot, `manual` asked for by root."""

    LIVE = "live"
    COLD = "cold"
    MANUAL = "manual"


class EventState(StrEnum):
    """How far the reaction to a fork has come."""

    REACTING = "reacting"
    SETTLED = "settled"
    FAILED = "failed"
    SUPERSEDED = "superseded"


class Detection(StrEnum):
    """Who watches: nobody, the timer, or an edge that wakes the detector by itself. The page holds the index."""

    NONE = "none"
    TIMER = "timer"
    EVENT = "event"


class Role(StrEnum):
    """An edge wakes the detector; a truth's change is a fork."""

    EDGE = "edge"
    TRUTH = "truth"


class IdentityPolicy(StrEnum):
    """Whether machine-id, host keys and hostname are made new."""

    ROTATE = "rotate"
    KEEP = "keep"


class HookOutcome(StrEnum):
    """What became of one hook in one reaction."""

    OK = "ok"
    SKIPPED = "skipped"
    FAILED = "failed"
    TIMEOUT = "timeout"
    INTERRUPTED = "interrupted"
    MASKED = "masked"
    UNTRUSTED = "untrusted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The identity policy chosen for a fork, and why."""

    policy: IdentityPolicy
    reason: str

    def to_json(self) -> JsonObject:
        return {"policy": self.policy.value, "reason": self.reason}

    @classmethod
    def from_json(cls, fields: Fields) -> Identity:
        return cls(policy=fields.choice("policy", IdentityPolicy), reason=fields.text("reason"))


UNDECIDED = Identity(policy=IdentityPolicy.KEEP, reason="not decided yet")
"""Of a fork that is just being published: who this guest is to be is found out after that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HookResult:
    """What one hook did: `exit_code` or `signal` where it ended by itself, `duration_ms` where it ran."""

    name: str
    path: str
    result: HookOutcome
    exit_code: int | None = None
    signal: int | None = None
    duration_ms: int | None = None

    def to_json(self) -> JsonObject:
        return {
            "name": self.name,
            "path": self.path,
            "result": self.result.value,
            "exit_code": self.exit_code,
            "signal": self.signal,
            "duration_ms": self.duration_ms,
        }

    @classmethod
    def from_json(cls, fields: Fields) -> HookResult:
        return cls(
            name=fields.text("name"),
            path=fields.text("path"),
            result=fields.choice("result", HookOutcome),
            exit_code=fields.integer_or_none("exit_code"),
            signal=fields.integer_or_none("signal"),
            duration_ms=fields.integer_or_none("duration_ms"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkEvent:
    """One fork of this guest.

    `token` is 16 random bytes, unique to this fork in this clone. `generation_id` and `previous_generation_id` are the
    hypervisor's 16 bytes in memory order, None where unreadable. `detected_at_ns` is CLOCK_REALTIME, `boottime_ns`
    CLOCK_BOOTTIME, both at the moment of detection. `detect_latency_us` runs from the kernel's log record to the
    page. `clock_step_ns` is how far the clock was stepped by the reaction.
    """

    generation: int
    token: bytes
    kind: Kind
    edges: tuple[str, ...]
    generation_id: bytes | None = None
    previous_generation_id: bytes | None = None
    detected_at_ns: int
    boottime_ns: int
    detect_latency_us: int | None = None
    clock_step_ns: int | None = None
    identity: Identity
    state: EventState = EventState.REACTING
    hooks: tuple[HookResult, ...] = ()

    def with_hook(self, result: HookResult) -> ForkEvent:
        """The same event with this result in place of an earlier one of the same hook, else at the end."""
        kept = tuple(hook for hook in self.hooks if hook.name != result.name)
        return replace(self, hooks=(*kept, result))

    def to_json(self, *, with_ids: bool = False) -> JsonObject:
        """The public form; generation IDs are null unless `with_ids`, which is for root's own eyes and files."""

        def shown(value: bytes | None) -> JsonValue:
            return value.hex() if with_ids and value is not None else None

        return {
            "generation": self.generation,
            "token": self.token.hex(),
            "kind": self.kind.value,
            "edges": list(self.edges),
            "generation_id": shown(self.generation_id),
            "previous_generation_id": shown(self.previous_generation_id),
            "detected_at": format_time(self.detected_at_ns),
            "boottime_ns": self.boottime_ns,
            "detect_latency_us": self.detect_latency_us,
            "clock_step_ns": self.clock_step_ns,
            "identity": self.identity.to_json(),
            "state": self.state.value,
            "hooks": [hook.to_json() for hook in self.hooks],
        }

    @classmethod
    def from_json(cls, fields: Fields) -> ForkEvent:
        token = fields.hex_or_none("token", size=16)
        return cls(
            generation=fields.integer("generation", maximum=LAST_GENERATION),
            token=token if token is not None else bytes(16),
            kind=fields.choice("kind", Kind),
            edges=fields.texts("edges"),
            generation_id=fields.hex_or_none("generation_id", size=16),
            previous_generation_id=fields.hex_or_none("previous_generation_id", size=16),
            detected_at_ns=parse_time(fields, "detected_at"),
            boottime_ns=fields.integer("boottime_ns"),
            detect_latency_us=fields.integer_or_none("detect_latency_us"),
            clock_step_ns=fields.integer_or_none("clock_step_ns", minimum=-(2**63), maximum=2**63 - 1),
            identity=Identity.from_json(fields.object("identity")),
            state=fields.choice("state", EventState),
            hooks=tuple(HookResult.from_json(item) for item in fields.objects("hooks")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceStatus:
    """What one source says of itself: `detail` says why it is not live, or what it reads; `hint` what would help."""

    name: str
    role: Role
    live: bool
    detail: str
    hint: str | None = None

    def to_json(self, *, with_hint: bool = False) -> JsonObject:
        """The public form; `with_hint` is for the way from the daemon to `vmforkctl doctor`."""
        fields: JsonObject = {"name": self.name, "role": self.role.value, "live": self.live, "detail": self.detail}
        return {**fields, "hint": self.hint} if with_hint else fields

    @classmethod
    def from_json(cls, fields: Fields) -> SourceStatus:
        return cls(
            name=fields.text("name"),
            role=fields.choice("role", Role),
            live=fields.flag("live"),
            detail=fields.text("detail"),
            hint=fields.text_or_none("hint"),
        )


def format_time(ns: int) -> str:
    """Nanoseconds since 1970 as `YYYY-MM-DDTHH:MM:SS.ffffffZ`."""
    seconds, rest = divmod(ns, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest // 1000:06d}Z"


def parse_time(fields: Fields, name: str) -> int:
    """The inverse of `format_time`, to the microsecond; InputError names the field."""
    import datetime  # only who reads events needs it: 0.3 MiB that the idle detector does without

    text, ns = fields.text(name), -1
    try:
        moment = datetime.datetime.fromisoformat(text)
        ns = int(moment.replace(microsecond=0).timestamp()) * 1_000_000_000 + moment.microsecond * 1000
    except (ValueError, OverflowError):
        pass
    # The page holds 64 bits. strptime would do the comparison, in ten times as long and with two modules more.
    if not 0 <= ns < 2**64 or format_time(ns) != text:
        raise fields.wrong(name, "a time from 1970 to 2554 as YYYY-MM-DDTHH:MM:SS.ffffffZ")
    return ns
