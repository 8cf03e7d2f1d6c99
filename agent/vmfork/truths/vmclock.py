# SPDX-License-Identifier: Apache-2.0
"""The character device /dev/vmclockN (Linux 6.13 or newer): one descriptor, read for its value and polled for changes.

Since Linux 7.0 poll() reports POLLIN until that very descriptor is read, so whoever polls and whoever reads must share
one `VmclockDevice`. It is never mapped: Python has no read barriers, and in read() the kernel takes care of them.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time

from vmfork.errors import AbsentError, InputError
from vmfork.paths import Paths
from vmfork.truths.sysfile import absent, shown
from vmfork.truths.vmclockabi import PAGE_BYTES, VmclockPage, counter_bytes, parse

log = logging.getLogger(__name__)

_NAME = re.compile(r"vmclock(0|[1-9][0-9]{0,5})", re.ASCII)

# A hypervisor updates the page in far less; the kernel's own read() gives up after 100 ms with ETIMEDOUT.
_UPDATE_SEC = 0.005
_UPDATE_PAUSE_SEC = 0.0002
_TICK_NS = 20_000_000  # of the clock for file times: 10 ms at most


class VmclockDevice:
    """The vmclock with the smallest number that can be understood; opened when first needed, then kept open.

    `update_sec` bounds how long a read waits for the hypervisor to finish an update. `disruptions` counts the changes
    of the disruption marker between reads: a live migration makes one, and that is no fork.
    """

    def __init__(self, paths: Paths, *, update_sec: float = _UPDATE_SEC) -> None:
        self._paths = paths
        self._update_sec = update_sec
        self._fd = -1
        self._directory = paths.devices
        self._path = self._directory + "/vmclock0"
        self.disruptions = 0
        self._marker: int | None = None
        # When the directory changed last, as long as it held no device: it need not be listed again for every read.
        self._empty_since: int | None = None

    @property
    def path(self) -> str:
        """The device's path, fit for a message; that of the first possible device while none is open."""
        return shown(self._path)

    def fileno(self) -> int:
        """The descriptor to poll; AbsentError or InputError where there is no device to open."""
        if self._fd < 0:
            self._open()
        return self._fd

    def read(self) -> VmclockPage:
        """One consistent page; it also clears POLLIN. AbsentError or InputError where there is none this time."""
        if self._fd >= 0 and self._paths.is_fake and self._is_replaced():
            self.close()
        page = _consistent(self.fileno(), self._path, self._update_sec)
        if self._marker is not None and page.disruption_marker != self._marker:
            self.disruptions += 1
            log.info("vmclock: the host reports that the clock was disrupted; by itself that is no fork")
        self._marker = page.disruption_marker
        return page

    def is_still_absent(self) -> bool:
        """True while there is no device because nothing came or went since there was none."""
        return self._fd < 0 and self._empty_since is not None and self._changed_at() == self._empty_since

    def close(self) -> None:
        """Give the descriptor back; a later call looks for the device anew."""
        self._empty_since = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _is_replaced(self) -> bool:
        # Below a root the page is a file that changes by rename; a device node of the running system stays.
        try:
            now = os.stat(self._path)
        except OSError:
            return True
        then = os.fstat(self._fd)
        return (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino)

    def _open(self) -> None:
        changed = self._changed_at()
        problems: list[AbsentError | InputError] = []
        candidates = self._candidates()
        # A later change within the same tick of the file system's clock would not show in its time.
        settled = changed is not None and abs(time.time_ns() - changed) > _TICK_NS
        self._empty_since = changed if settled and not candidates else None
        for path in candidates:
            try:
                fd = _opened(path)
            except AbsentError as error:
                problems.append(error)
                continue
            try:
                _consistent(fd, path, self._update_sec)
            except (AbsentError, InputError) as error:
                os.close(fd)
                problems.append(error)
                continue
            self._fd, self._path = fd, path
            return
        if problems:
            raise problems[0]
        raise AbsentError(
            f"{shown(self._directory)}: no vmclock device",
            hint="needs a hypervisor that offers one and Linux 6.13 or newer (devicetree: 7.0) with its driver",
        )

    def _changed_at(self) -> int | None:
        try:
            return os.stat(self._directory).st_mtime_ns
        except OSError:
            return None

    def _candidates(self) -> list[str]:
        try:
            names = os.listdir(self._directory)
        except OSError as error:
            raise absent(self._directory, error) from error
        numbers = sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)
        return [f"{self._directory}/vmclock{number}" for number in numbers]


def _opened(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM):
            raise absent(path, error) from error
        # The kernel makes the node 0600; vmfork's udev rule opens it for reading.
        raise AbsentError(
            f"{shown(path)}: {os.strerror(error.errno)}{_mode(path)}",
            hint='run as root, or add a udev rule: KERNEL=="vmclock*", MODE="0644"',
        ) from error


def _mode(path: str) -> str:
    try:
        return f" (mode {os.stat(path).st_mode & 0o7777:04o})"
    except OSError:
        return ""


def _consistent(fd: int, path: str, update_sec: float) -> VmclockPage:
    """Read until no update is under way, within a bound; the kernel's read() does that as well, a file does not."""
    deadline = time.monotonic() + update_sec
    while True:
        try:
            data = os.pread(fd, PAGE_BYTES, 0)
        except OSError as error:
            raise absent(path, error) from error
        page = parse(data, shown(path))
        if page.is_consistent:
            return page
        if time.monotonic() >= deadline:
            raise AbsentError(f"{shown(path)}: the hypervisor did not finish an update of the page", passing=True)
        time.sleep(_UPDATE_PAUSE_SEC)


class VmclockCounter:
    """The truth `vmclock`: the hypervisor's generation counter, 8 bytes, little-endian."""

    name = "vmclock"

    def __init__(self, device: VmclockDevice) -> None:
        self._device = device

    def read(self) -> bytes:
        return counter_bytes(self._device.read(), self._device.path)
