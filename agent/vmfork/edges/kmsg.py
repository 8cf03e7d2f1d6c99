# SPDX-License-Identifier: Apache-2.0
"""The kernel's log as an edge: every kernel since 5.18 with the vmgenid driver logs one line per changed ID.

Format of a record (Documentation/ABI/testing/dev-kmsg): `prefix,sequence,microseconds,flags[,more...];text`, then
lines that begin with a blank and hold key=value pairs. The prefix is facility * 8 + level. Userspace can write to
/dev/kmsg but never with facility 0, so a line of facility 0 is the kernel's own word.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import stat
from dataclasses import dataclass

from vmfork.edges import NOTHING, Heard, interrupts
from vmfork.errors import InputError
from vmfork.model import Role, SourceStatus
from vmfork.paths import Paths
from vmfork.truths.sysfile import may_pass

FORK_LINE = b"random: crng reseeded due to virtual machine fork"
# kernel/power/suspend.c, at the end of every suspension: what woke us before may be dead now. (The generator's own line
# about it is not there in every configuration.)
RESUME_LINE = b"PM: suspend exit"

# One read returns one record; the kernel refuses a buffer that is too small with EINVAL. Since Linux 6.6 an extended
# record has at most 2048 bytes, before that 8192.
_RECORD_BYTES = 16384
# A flood of foreign lines must not keep the detector from reading the truths.
_RECORDS_PER_WAKE_UP = 4096
_PARTIAL_BYTES = 65536

# Prefix, sequence number and time, then flags and whatever a newer kernel adds, then the text.
_RECORD = re.compile(rb"([0-9]{1,20}),([0-9]{1,20}),([0-9]{1,20})(?:,[^;]*)?;([^\n]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record of the log; `microseconds` is the kernel's log clock."""

    facility: int
    sequence: int
    microseconds: int
    text: bytes

    @property
    def announces_fork(self) -> bool:
        return self.facility == 0 and self.text == FORK_LINE

    @property
    def announces_resumption(self) -> bool:
        return self.facility == 0 and self.text == RESUME_LINE


def parse(raw: bytes) -> Record:
    """One record as read from /dev/kmsg; InputError for anything that is not one."""
    found = _RECORD.match(raw)
    if found is None:
        raise InputError("kmsg", "a record does not begin with three numbers")
    prefix, sequence, microseconds, text = found.groups()
    return Record(
        facility=int(prefix) >> 3, sequence=int(sequence), microseconds=int(microseconds), text=text.rstrip(b"\r")
    )


class Kmsg:
    """The log, read from behind a remembered record, or from its end where nothing is remembered.

    `missed`: records may have gone by that nobody read; the first `drain` says so.
    """

    name = "kmsg"

    def __init__(self, paths: Paths, *, after: int | None, missed: bool = False) -> None:
        self._paths = paths
        self._descriptor = -1
        self._more = select.poll()
        self._partial = b""
        self._is_stream = False
        self._missed = missed
        self._trouble: OSError | None = None
        self._skip_to = -1 if after is None else after
        self.last_sequence = after
        self._open(from_start=after is not None)

    def _open(self, *, from_start: bool) -> None:
        try:
            mode = os.stat(self._paths.kmsg).st_mode
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                raise OSError(errno.ENODEV, "is neither the kernel's device nor a FIFO")
            # A FIFO stands in for the device below a root prefix; without a writer of our own it would report end of
            # file, and be "readable" forever, whenever the last foreign writer closes it.
            access = os.O_RDWR if stat.S_ISFIFO(mode) else os.O_RDONLY
            self._descriptor = os.open(self._paths.kmsg, access | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            self._trouble = error
            return
        self._is_stream = not stat.S_ISCHR(mode)
        self._more.register(self._descriptor, select.POLLIN)
        if not from_start:
            # A FIFO cannot seek: it is at its end by nature.
            with contextlib.suppress(OSError):
                os.lseek(self._descriptor, 0, os.SEEK_END)

    def fileno(self) -> int:
        return self._descriptor

    @property
    def has_failed(self) -> bool:
        """Whether it is closed for a reason that may pass: another Kmsg may be able to open the log."""
        return self._descriptor < 0 and self._trouble is not None and may_pass(self._trouble.errno or 0)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def drain(self) -> Heard:
        if self._descriptor < 0:
            return NOTHING
        words, newest, left, look_again = 0, None, _RECORDS_PER_WAKE_UP, False
        lost, self._missed = self._missed, False
        while left > 0:
            try:
                chunk = os.read(self._descriptor, _RECORD_BYTES)
            except OSError as error:
                if error.errno == errno.EPIPE:
                    lost, left = True, left - 1  # the ring overtook us; the next read goes on at its oldest record
                    continue
                if error.errno not in (errno.EAGAIN, errno.EINTR):
                    # Nothing more will come from here: somebody else has to watch from now on.
                    self._trouble = error
                    self.close()
                    lost = look_again = True
                break
            records = self._records(chunk)
            left -= max(1, len(records))
            for record in records:
                lost = lost or self._is_gap(record)
                if record.announces_fork:
                    words, newest = words + 1, record.microseconds
                elif record.announces_resumption:
                    look_again = True
            # Asking first is cheaper than the exception that a read at the end raises.
            if not chunk or not self._more.poll(0):
                break
        # The line of a resumption may be among what was lost.
        look_again = look_again or (lost and interrupts.is_undelivered(self._paths))
        return Heard(words=words, lost=lost, record_us=newest, hotplug=look_again)

    def _records(self, chunk: bytes) -> list[Record]:
        if self._is_stream:
            *lines, self._partial = (self._partial + chunk).split(b"\n")
            self._partial = self._partial[-_PARTIAL_BYTES:]
        else:
            lines = [chunk]
        found = []
        for line in lines:
            # Comparing bytes first keeps a flood of foreign lines cheap, but the sequence number must be kept.
            try:
                record = parse(line)
            except InputError:
                continue
            if not self._is_stream and record.sequence <= self._skip_to:
                continue
            found.append(record)
        return found

    def _is_gap(self, record: Record) -> bool:
        """After a restart the ring may have moved on beyond what was last read, without any EPIPE."""
        if self._is_stream:
            return False
        expected, self.last_sequence = self.last_sequence, record.sequence
        return expected is not None and record.sequence > expected + 1

    def status(self) -> SourceStatus:
        detail, hint = self._why_not()
        return SourceStatus(
            name=self.name, role=Role.EDGE, live=detail is None, detail=detail or self._bound(), hint=hint
        )

    def _bound(self) -> str:
        return f"waits for the kernel's word; driver bound to {bound_device(self._paths)}"

    def _why_not(self) -> tuple[str | None, str | None]:
        if self._trouble is not None:
            return f"{self._paths.kmsg}: {self._trouble.strerror}", _hint_for(self._trouble.errno)
        if bound_device(self._paths) is None:
            return "no device is bound to the kernel's vmgenid driver, so the kernel will not log a fork", None
        if interrupts.is_undelivered(self._paths):
            return "ACPI events do not reach the kernel, so it will not log a fork", _UNDELIVERED_HINT
        return None, None


_UNDELIVERED_HINT = "after a suspension the firmware did not set ACPI up again; rebooting the guest helps"


def _hint_for(number: int | None) -> str:
    if number in (errno.EPERM, errno.EACCES):
        return "run as root; with kernel.dmesg_restrict=1 CAP_SYSLOG is needed to read the kernel's log"
    if number == errno.ENOENT:
        return "this kernel has no /dev/kmsg (CONFIG_PRINTK), or /dev does not show it"
    return "see whether `dmesg` works in this guest"


def bound_device(paths: Paths) -> str | None:
    """The device that the vmgenid driver is bound to, None if there is none.

    The driver is a platform driver since Linux 6.10 and was an ACPI driver before.
    """
    for directory in (paths.platform_driver, paths.acpi_driver):
        try:
            names = os.listdir(directory)
        except OSError:
            continue
        devices = sorted(set(names) - {"bind", "unbind", "uevent", "module"})
        if devices:
            return devices[0]
    return None
