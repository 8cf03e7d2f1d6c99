# SPDX-License-Identifier: Apache-2.0
"""Kernel uevents as an edge: `NEW_VMGENID=1`, and devices that appear or vanish. The only importer of pyudev.

Mainline sent NEW_VMGENID=1 in Linux 6.8.0 to 6.8.7 only (added by ad6bcdad2b67, reverted by 3aadf100f93d); vendors may
carry it on another kobject, so neither path nor subsystem is looked at. A synthetic event, written by root to a sysfs
`uevent` file, always carries SYNTH_UUID and cannot carry the property under its own name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import sys
from collections.abc import Mapping
from types import ModuleType

from vmfork.annotations import Any
from vmfork.edges import NOTHING, Heard
from vmfork.model import Role, SourceStatus

# The kernel's default of 208 KiB overflows when thousands of devices appear at once.
_RECEIVE_BYTES = 1 << 20
_EVENTS_PER_WAKE_UP = 1024
# Its name is its ABI, everywhere.
_LIBRARIES = {"udev": "libudev.so.1"}
_SOURCES = re.compile(r"vmgenid|vmclock|vmgenctr|vm_gen_counter|qemu_fw_cfg|qemuvgid|amznc10c", re.IGNORECASE)


def announces_fork(properties: Mapping[str, str]) -> bool:
    """True for the kernel's own word that the generation ID changed."""
    return (
        properties.get("ACTION") == "change" and properties.get("NEW_VMGENID") == "1" and "SYNTH_UUID" not in properties
    )


def announces_source(properties: Mapping[str, str]) -> bool:
    """True when a device or module that could be a source came or went."""
    if properties.get("ACTION") not in ("add", "remove", "bind", "unbind"):
        return False
    words = (properties.get(key, "") for key in ("DEVPATH", "MODALIAS", "DRIVER", "DEVNAME"))
    return any(_SOURCES.search(word) for word in words)


class Uevent:
    """A netlink monitor on the kernel's own group: no udevd is needed, and no rule can filter or forge it.

    The kernel itself also sends what a process with CAP_SYS_ADMIN over this network namespace asks it to (commit
    692ec06d7c92), and nothing tells that from its own.
    """

    name = "uevent"

    def __init__(self) -> None:
        self._heard_once = False
        self.has_failed = False  # for a reason that may pass: another Uevent may be able to listen
        self._monitor: Any = None
        self._trouble = ""
        try:
            pyudev = _import_pyudev()
        except ImportError as error:
            self._trouble = f"pyudev cannot be imported: {error}"
            return
        try:
            # pyudev advises against source="kernel" because udev has not seen the device yet; this event has no udev
            # properties to wait for, and guests without udevd exist.
            self._monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
            self._monitor.start()
            self._enlarge()
        except (OSError, ImportError) as error:
            self._monitor, self._trouble = None, f"cannot listen: {error}"
            # Without a number it is the dynamic linker's: there is no libudev.
            self.has_failed = isinstance(error, OSError) and error.errno is not None

    def _enlarge(self) -> None:
        # Needs CAP_NET_ADMIN, which the sandboxed detector does without: an overflow is recovered from.
        with contextlib.suppress(OSError):
            self._monitor.set_receive_buffer_size(_RECEIVE_BYTES)

    def fileno(self) -> int:
        return -1 if self._monitor is None else int(self._monitor.fileno())

    def drain(self) -> Heard:
        if self._monitor is None:
            return NOTHING
        words, hotplug, lost = 0, False, False
        for _ in range(_EVENTS_PER_WAKE_UP):
            try:
                device = self._monitor.poll(timeout=0)
                if device is None:
                    return Heard(words=words, hotplug=hotplug, lost=lost)
                words += announces_fork(device.properties)
                hotplug = hotplug or announces_source(device.properties)
            except ValueError:
                # What pyudev makes of libudev's EINVAL, a message that is no event, and of what is no UTF-8.
                continue
            except OSError:
                self._clear_overflow()
                lost = hotplug = True
        return Heard(words=words, hotplug=hotplug, lost=lost)

    def _clear_overflow(self) -> None:
        """After an overflow libudev's poll fails forever (pyudev#194) until somebody reads the socket's error."""
        # On pyudev's own descriptor: there may be no other to be had when everything is short and events get lost.
        borrowed = socket.socket(fileno=self._monitor.fileno())
        try:
            number = borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        finally:
            borrowed.detach()
        if number not in (0, errno.ENOBUFS):
            self._trouble = os.strerror(number)

    def status(self) -> SourceStatus:
        live = self._monitor is not None and (self._heard_once or kernel_sends_it(os.uname().release))
        if self._monitor is None:
            detail, hint = self._trouble, "install python3-pyudev; run as root"
        elif live:
            detail, hint = "listens for NEW_VMGENID=1", None
        else:
            detail, hint = f"listens, but Linux {os.uname().release} is not known to send NEW_VMGENID=1", None
        return SourceStatus(name=self.name, role=Role.EDGE, live=live, detail=detail, hint=hint)

    def note_heard(self) -> None:
        """A vendor's kernel sent the event: from now on this edge counts as live."""
        self._heard_once = True

    def close(self) -> None:
        self._monitor = None


def _import_pyudev() -> Any:
    """pyudev without its search for libudev.

    It asks ctypes.util for a name that is known. That module takes a megabyte with what it imports, and runs ldconfig,
    or even a compiler, for the answer: not what a root daemon should do at its start.
    """
    asked = ModuleType("ctypes.util")
    vars(asked)["find_library"] = _LIBRARIES.get
    if sys.modules.setdefault("ctypes.util", asked) is asked:
        try:
            import pyudev
        except ImportError:
            # It wants more of that module than this.
            pass
        else:
            return pyudev
        finally:
            del sys.modules["ctypes.util"]
    import pyudev

    return pyudev


def kernel_sends_it(release: str) -> bool:
    """True for mainline 6.8.0 to 6.8.7. A distribution's 6.8 (its third number is its own) may have the revert."""
    return re.fullmatch(r"6\.8\.[0-7]", release) is not None
