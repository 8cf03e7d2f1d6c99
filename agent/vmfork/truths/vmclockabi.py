# SPDX-License-Identifier: Apache-2.0
"""The vmclock page of a hypervisor, as Linux's struct vmclock_abi lays it out (include/uapi/linux/vmclock-abi.h).

Offsets and flag bits are the header's; version 1.0 of UAPI.13 printed others by mistake. Little-endian throughout.
Nothing here tells the time: of the page's clock only what status and doctor show is read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmfork.errors import AbsentError, InputError

MAGIC = 0x4B4C4356
"""`VCLK` as it stands in memory."""
VERSION = 1
PAGE_BYTES = 0x70
"""Up to the end of the generation counter: all that is read of the page."""

FLAG_GENERATION_COUNTER = 1 << 8
FLAG_NOTIFICATION = 1 << 9
_FLAG_TAI_OFFSET = 1 << 0

# magic, size, version, counter_id, time_type, seq_count, disruption_marker, flags, pad, clock_status, smearing hint,
# tai_offset_sec.
_HEADER = struct.Struct("<IIHBBIQQ2xBxh")
_COUNTER_OFFSET = 0x68
_COUNTER = struct.Struct("<Q")
# The struct as it was before Linux 7.0 ends where the counter now begins.
_BYTES_WITHOUT_COUNTER = 0x68


@dataclass(frozen=True, slots=True, kw_only=True)
class VmclockPage:
    """What one consistent read of the page said.

    `generation_counter` is None where the hypervisor keeps none. `disruption_marker` changes whenever the counter
    behind the clock was disrupted, live migration included, and is no sign of a fork. `tai_offset_sec` is None where
    the page does not vouch for it.
    """

    size: int
    counter_id: int
    time_type: int
    seq_count: int
    disruption_marker: int
    flags: int
    clock_status: int
    tai_offset_sec: int | None
    generation_counter: int | None

    @property
    def is_consistent(self) -> bool:
        """False while the hypervisor is in the middle of an update."""
        return self.seq_count % 2 == 0

    @property
    def notifies(self) -> bool:
        """True where the hypervisor raises an interrupt with each change."""
        return bool(self.flags & FLAG_NOTIFICATION)


def parse(page: bytes, place: str) -> VmclockPage:
    """The page from its first bytes (`PAGE_BYTES` or more of them); InputError where it is no vmclock of version 1."""
    if len(page) < _BYTES_WITHOUT_COUNTER:
        raise InputError(place, f"ends after {len(page)} bytes, a vmclock has at least {_BYTES_WITHOUT_COUNTER}")
    magic, size, version, counter_id, time_type, seq_count, marker, flags, status, tai_offset = _HEADER.unpack_from(
        page
    )
    if magic != MAGIC:
        raise InputError(place, "does not start with the magic number of a vmclock")
    if version != VERSION:
        raise InputError(place, f"is a vmclock of version {version}, only version {VERSION} is known")
    if size < _BYTES_WITHOUT_COUNTER:
        raise InputError(place, f"says that it has {size} bytes, a vmclock has at least {_BYTES_WITHOUT_COUNTER}")
    return VmclockPage(
        size=size,
        counter_id=counter_id,
        time_type=time_type,
        seq_count=seq_count,
        disruption_marker=marker,
        flags=flags,
        clock_status=status,
        tai_offset_sec=tai_offset if flags & _FLAG_TAI_OFFSET else None,
        generation_counter=_generation_counter(page, place, size=size, flags=flags),
    )


def _generation_counter(page: bytes, place: str, *, size: int, flags: int) -> int | None:
    # The header: the field is valid only if the flag says so, and only in a structure large enough to hold it.
    if not flags & FLAG_GENERATION_COUNTER or size < PAGE_BYTES:
        return None
    if len(page) < PAGE_BYTES:
        raise InputError(place, f"ends after {len(page)} bytes, within the generation counter")
    (counter,) = _COUNTER.unpack_from(page, _COUNTER_OFFSET)
    return int(counter)


def counter_bytes(page: VmclockPage, place: str) -> bytes:
    """The generation counter as its 8 bytes in memory; AbsentError with the reason where the page has none."""
    if page.generation_counter is not None:
        return _COUNTER.pack(page.generation_counter)
    if page.flags & FLAG_GENERATION_COUNTER:
        reason = f"its {page.size} bytes end before the generation counter that its flags promise"
    else:
        reason = "its flags say that the hypervisor keeps no generation counter"
    raise AbsentError(f"{place}: {reason}")
