# SPDX-License-Identifier: Apache-2.0
"""The generation page: 4096 bytes in RAM that tell every program of this guest whether it was forked.

The layout is a stable ABI (docs/generation-page.md), little-endian, read by mmap from any language. This module reads
a consistent copy and holds the one writer. It imports only what a bare interpreter already has or gets for almost
nothing, because `import vmfork` in somebody else's program leads here.
"""

from __future__ import annotations

import mmap
import os
import struct
import time

from vmfork.errors import InputError, Unavailable
from vmfork.pagefile import open_in_place, warn

PAGE_SIZE = 4096
MAGIC = b"VMFK"
ABI_VERSION = 1
TOKEN_SIZE = 16

MAGIC_OFFSET = 0
ABI_OFFSET = 4
SEQ_OFFSET = 8
STATE_OFFSET = 12
GENERATION_OFFSET = 16
DETECTED_AT_OFFSET = 24
BOOTTIME_OFFSET = 32
TOKEN_OFFSET = 40
DETECTION_OFFSET = 56
END_OFFSET = 60

# All fields in the order of their offsets: magic, ABI version, seq, state, generation, times, token, detection.
LAYOUT = struct.Struct("<4sIIIQQQ16sI")

STATE_SETTLED = 0
STATE_REACTING = 1
STATE_FAILED = 2

DETECTION_NONE = 0
DETECTION_TIMER = 1
DETECTION_EVENT = 2

# A publish takes microseconds; a page that stays odd for this long lost its writer in the middle of one.
_PATIENCE_SEC = 0.25
_U32 = 0xFFFF_FFFF
# Generations must fit the signed integers of JSON and varlink: this many forks means garbage.
_NEVER_REACHED = 1 << 63


class PageContent:
    """One consistent copy of the page.

    `state` is a STATE_ and `detection` a DETECTION_ number, `generation` counts forks from 1, `detected_at_ns` is
    CLOCK_REALTIME and `boottime_ns` CLOCK_BOOTTIME of the last fork's detection (0 without one), `token` its 16 bytes.
    """

    # By hand and not a dataclass or NamedTuple: those modules cost more than the whole budget of `import vmfork`.
    __slots__ = ("boottime_ns", "detected_at_ns", "detection", "generation", "state", "token")

    state: int
    generation: int
    detected_at_ns: int
    boottime_ns: int
    token: bytes
    detection: int

    def __init__(
        self,
        state: int = STATE_SETTLED,
        generation: int = 1,
        detected_at_ns: int = 0,
        boottime_ns: int = 0,
        token: bytes = bytes(TOKEN_SIZE),
        detection: int = DETECTION_NONE,
    ) -> None:
        put = object.__setattr__
        put(self, "state", state)
        put(self, "generation", generation)
        put(self, "detected_at_ns", detected_at_ns)
        put(self, "boottime_ns", boottime_ns)
        put(self, "token", token)
        put(self, "detection", detection)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} of a PageContent cannot be changed")

    def values(self) -> tuple[int, int, int, int, bytes, int]:
        """The fields in the order of their offsets."""
        return self.state, self.generation, self.detected_at_ns, self.boottime_ns, self.token, self.detection

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PageContent) and self.values() == other.values()

    def __hash__(self) -> int:
        return hash(self.values())

    def __repr__(self) -> str:
        return f"PageContent{self.values()}"


def read_page(path: str) -> PageContent:
    """A consistent copy of the page at `path`.

    Raises Unavailable where there is no page, InputError where the file is no generation page (magic, size) or where
    its writer died in the middle of an update and nobody has repaired it yet.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise Unavailable(
            f"no generation page: {path}: {error.strerror}", hint="is vmforkd installed and running?"
        ) from error
    try:
        return read_descriptor(fd, path)
    finally:
        os.close(fd)


def read_descriptor(fd: int, place: str) -> PageContent:
    """Like `read_page`, from a descriptor that is already open; `place` names the file in errors."""
    # Two equal copies in a row with an even seq. Loads within one copy may come in any order, on arm64 at least, but
    # each pread() runs through value-returning atomics on the page's reference count, which Linux defines as full
    # barriers (Documentation/atomic_t.txt), so the second copy is read entirely after the first.
    give_up_at = earlier = None
    while True:
        try:
            raw = os.pread(fd, LAYOUT.size, 0)
        except OSError as error:
            raise InputError(place, f"cannot be read: {error.strerror}") from error
        if len(raw) < LAYOUT.size:
            raise InputError(place, "is too short for a generation page")
        magic, abi, seq, content = _parse(raw)
        if magic != MAGIC or abi < ABI_VERSION:
            raise InputError(place, "is not a generation page")
        if raw == earlier and seq % 2 == 0:
            return content
        if seq % 2:
            now = time.monotonic()
            give_up_at = give_up_at or now + _PATIENCE_SEC
            if now > give_up_at:
                raise InputError(place, "an update of the page was never finished", hint="is vmforkd running?")
            time.sleep(0.0005)
        earlier = raw


def _parse(raw: bytes) -> tuple[bytes, int, int, PageContent]:
    magic, abi, seq, *fields = LAYOUT.unpack(raw)
    return magic, abi, seq, PageContent(*fields)


def _packed(content: PageContent) -> bytes:
    return LAYOUT.pack(MAGIC, ABI_VERSION, 0, *content.values()).ljust(PAGE_SIZE, b"\0")


class PageWriter:
    """The one writer of the page at `path`; opens it, repairs it, or creates it with `initial_generation`.

    The file keeps its inode as long as it is sound, so programs that mapped it keep seeing updates over restarts of the
    writer. `torn` says that the last writer was killed inside an update: its last fork may be half recorded. Raises
    InputError where the page can neither be used nor replaced.
    """

    def __init__(self, path: str, *, initial_generation: int = 1) -> None:
        self.path = path
        self.torn = False
        try:
            self._fd = open_in_place(path, _packed(PageContent(generation=initial_generation)))
            self._map = mmap.mmap(self._fd, PAGE_SIZE)
        except OSError as error:
            raise InputError(path, f"cannot be opened as the generation page: {error.strerror}") from error
        self._bytes = memoryview(self._map)
        # Through these views an aligned field changes in one store of its width: CPython packs an element of a native
        # memoryview with a memcpy of constant size. The page is little-endian and so is every machine with a vmgenid.
        self._u32 = self._bytes.cast("I")
        self._u64 = self._bytes.cast("Q")
        self._current = self._repaired(initial_generation)

    @property
    def current(self) -> PageContent:
        """What the page says now."""
        return self._current

    def publish(
        self,
        *,
        generation: int,
        token: bytes,
        detected_at_ns: int,
        boottime_ns: int,
        state: int = STATE_REACTING,
        detection: int | None = None,
    ) -> None:
        """Announce a fork: all fields change together for readers of seq; `detection` None keeps it."""
        if len(token) != TOKEN_SIZE:
            raise ValueError("a fork token has 16 bytes")
        if detection is None:
            detection = self._current.detection
        self._write(PageContent(state, generation, detected_at_ns, boottime_ns, token, detection))

    def set_state(self, state: int) -> None:
        """How far the reaction to the current fork has come."""
        self._write(PageContent(state, *self._current.values()[1:]))

    def set_detection(self, detection: int) -> None:
        """Who watches from now on."""
        self._write(PageContent(*self._current.values()[:-1], detection))

    def close(self) -> None:
        """Let go of the page; its content stays for its readers."""
        for view in (self._u32, self._u64, self._bytes):
            view.release()
        self._map.close()
        os.close(self._fd)

    def __enter__(self) -> PageWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, content: PageContent) -> None:
        u32, u64, old = self._u32, self._u64, self._current
        seq = (u32[SEQ_OFFSET // 4] + 1) | 1
        u32[SEQ_OFFSET // 4] = seq & _U32
        self._barrier()
        # Only what differs: the u64 generation is the word that readers without seq watch, it must not flicker.
        if content.generation != old.generation:
            u64[GENERATION_OFFSET // 8] = content.generation
        u32[STATE_OFFSET // 4] = content.state
        u64[DETECTED_AT_OFFSET // 8] = content.detected_at_ns
        u64[BOOTTIME_OFFSET // 8] = content.boottime_ns
        self._bytes[TOKEN_OFFSET:DETECTION_OFFSET] = content.token
        u32[DETECTION_OFFSET // 4] = content.detection
        self._barrier()
        u32[SEQ_OFFSET // 4] = (seq + 1) & _U32
        self._current = content

    def _barrier(self) -> None:
        """Order the stores before this call against those after it, for readers on other CPUs."""
        # Python has no memory barrier, and entering the kernel is none by itself on arm64 (membarrier(2)'s own source
        # notes that). What this needs is a system call that contains one on every path. pread() of a page in the page
        # cache takes a reference with atomic_add_unless() and drops it with atomic_dec_and_test(); both return a value
        # and are therefore fully ordered (Documentation/atomic_t.txt). It costs 0.4 us; membarrier's PRIVATE_EXPEDITED
        # returns without any barrier in a process of one thread, its GLOBAL form sleeps for milliseconds.
        try:
            os.pread(self._fd, 1, 0)
        except OSError:
            # Refused (no memory, a bad page of RAM), perhaps before it came to the barrier. Raised, it would leave seq
            # odd and every reader waiting. So another one: sched_yield() never fails on Linux, and all its paths lead
            # through __schedule(), which has smp_mb__after_spinlock() (since 4.14).
            os.sched_yield()

    def _repaired(self, initial_generation: int) -> PageContent:
        magic, abi, seq, found = _parse(bytes(self._bytes[: LAYOUT.size]))
        content = found
        if magic != MAGIC or not 0 < found.generation < _NEVER_REACHED:
            warn("%s held no generation page, it is written anew", self.path)
            content = PageContent(generation=initial_generation)
        else:
            self.torn = seq % 2 == 1
            if abi == ABI_VERSION and not self.torn:
                return content
        # Readers that check seq wait while it is odd; a generation that is already right is not touched.
        self._current = found
        self._bytes[ABI_OFFSET:SEQ_OFFSET] = ABI_VERSION.to_bytes(4, "little")
        self._bytes[END_OFFSET:PAGE_SIZE] = bytes(PAGE_SIZE - END_OFFSET)
        self._write(content)
        self._bytes[MAGIC_OFFSET:ABI_OFFSET] = MAGIC
        return content
