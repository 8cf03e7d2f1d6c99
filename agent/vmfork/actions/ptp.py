# SPDX-License-Identifier: Apache-2.0
"""The hypervisor's clocks, as PTP devices: which there are, and how far CLOCK_REALTIME is from one of them.

Only clocks of hypervisors count, unless others are named: a network card's clock may be anything. The sample with the
tightest bracket of system time is used. A clock whose time scale is not known for sure is refused, never guessed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from vmfork.actions.vdso import kernel_version
from vmfork.errors import AbsentError
from vmfork.paths import Paths

# include/uapi/linux/ptp_clock.h: _IOW('=', 5, struct ptp_sys_offset) with room for 25 samples.
PTP_SYS_OFFSET = 0x43403D05
SAMPLES = 25
_HEAD = struct.Struct("@I12x")
_TIME = struct.Struct("@qI4x")
_SIZE = _HEAD.size + (2 * SAMPLES + 1) * _TIME.size

# clock_name of drivers/ptp/ptp_kvm_common.c, ptp_vmclock.c, drivers/hv/hv_util.c, drivers/ptp/ptp_vmw.c.
_HYPERVISORS = re.compile(r"KVM virtual PTP|vmclock\d+|hyperv|ptp_vmw")
_VMCLOCK = re.compile(r"vmclock\d+")
_VMCLOCK_PAGE = struct.Struct("<IIHBBIQQ2xBBh")
_VMCLOCK_MAGIC = 0x4B4C4356
_TAI_OFFSET_VALID = 1
_UTC, _TAI = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """One PTP device and the name that its driver gave it."""

    device: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Offset:
    """How far the system's clock must be moved to be right, and how wide the bracket of that sample was, both in ns."""

    ns: int
    bracket_ns: int


def clocks(paths: Paths, wanted: Sequence[str]) -> tuple[Clock, ...]:
    """The PTP clocks to use, in the order of preference: those named, or with "auto" those of the hypervisor."""
    try:
        entries = sorted(name for name in os.listdir(paths.ptp_class) if name.startswith("ptp"))
    except OSError:
        entries = []
    found = tuple(
        Clock(device=os.path.join(paths.devices, entry), name=_first_line(f"{paths.ptp_class}/{entry}/clock_name"))
        for entry in entries
    )
    if tuple(wanted) in ((), ("auto",)):
        return tuple(clock for clock in found if _HYPERVISORS.fullmatch(clock.name))
    by_device = {clock.device: clock for clock in found}
    devices = [paths.at(os.path.join("/dev", device)) for device in wanted]
    return tuple(by_device.get(device, Clock(device=device, name="")) for device in devices)


def measure(paths: Paths, clock: Clock) -> Offset:
    """How far CLOCK_REALTIME is from a clock. AbsentError says why the clock cannot be used."""
    scale = seconds_to_utc(paths, clock)
    try:
        fd = os.open(clock.device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise AbsentError(f"{clock.device}: {error.strerror}") from error
    answer = bytearray(_SIZE)
    _HEAD.pack_into(answer, 0, SAMPLES)
    try:
        fcntl.ioctl(fd, PTP_SYS_OFFSET, answer)
    except OSError as error:
        if error.errno == errno.ENOTTY:
            raise AbsentError(f"{clock.device}: is not a PTP clock") from error
        raise AbsentError(f"{clock.device} ({clock.name}): cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)
    best = tightest(bytes(answer))
    return Offset(ns=best.ns + scale * 1_000_000_000, bracket_ns=best.bracket_ns)


def tightest(answer: bytes) -> Offset:
    """The best sample of a struct ptp_sys_offset: system, device, system, device, ... , system."""
    count = min(_HEAD.unpack_from(answer)[0], SAMPLES)
    times = [
        seconds * 1_000_000_000 + ns
        for seconds, ns in _TIME.iter_unpack(answer[_HEAD.size : _HEAD.size + (2 * count + 1) * _TIME.size])
    ]
    offsets = [
        Offset(ns=device - (before + after) // 2, bracket_ns=after - before)
        for before, device, after in zip(times[0:-2:2], times[1:-1:2], times[2::2], strict=True)
        if after >= before and device > 0
    ]
    if not offsets:
        raise AbsentError("the PTP clock gave no usable sample")
    return min(offsets, key=lambda offset: offset.bracket_ns)


def seconds_to_utc(paths: Paths, clock: Clock) -> int:
    """What to add to a clock's seconds to get UTC; AbsentError where nobody can say."""
    if not _VMCLOCK.fullmatch(clock.name):
        return 0
    page = os.path.join(paths.devices, clock.name)
    try:
        fd = os.open(page, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(fd, 4096, 0)
        finally:
            os.close(fd)
    except OSError as error:
        raise AbsentError(f"{page}: {error.strerror}, so nobody can say if {clock.name} runs in UTC or TAI") from error
    return vmclock_to_utc(data, clock.name, kernel_version())


def vmclock_to_utc(page: bytes, name: str, version: tuple[int, int]) -> int:
    """What to add to the PTP time of a vmclock with this page, as the driver of this kernel version presents it.

    Linux 7.0 made the PTP time TAI (series 20260130173704.12575-1-itazur@amazon.com); from 6.13 to 6.19 it was UTC, but
    for a device that counts in TAI the sign of the offset is in doubt. Older kernels have a backport of either.
    """
    if len(page) < _VMCLOCK_PAGE.size:
        raise AbsentError(f"{name}: the page is too short")
    magic, _, _, _, scale, _, _, flags, _, _, tai_offset = _VMCLOCK_PAGE.unpack_from(page)
    valid = bool(flags & _TAI_OFFSET_VALID)
    if magic != _VMCLOCK_MAGIC or scale not in (_UTC, _TAI):
        raise AbsentError(f"{name}: does not count in UTC or TAI")
    if version >= (7, 0) and scale == _UTC and valid:
        return int(tai_offset)
    if version >= (7, 0) and scale == _TAI and valid:
        # TAI has been ahead of UTC since 1961, so the sign that the hypervisor meant does not matter.
        return -abs(int(tai_offset))
    if version < (7, 0) and scale == _UTC and (version >= (6, 13) or not valid):
        return 0
    raise AbsentError(f"{name}: nobody can say if its PTP time is UTC or TAI on this kernel")


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(256).strip()
    except OSError:
        return ""
