# SPDX-License-Identifier: Apache-2.0
"""Uevents as they come: the kernel broadcasts any bytes that root sends it in a network namespace of its own.

The monitor of the detector's own edge hears them there, by libudev and pyudev, and nobody else does. The namespace is
of one thread, and goes with the sockets. Without root only the properties are looked at.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import socket
import struct
import threading

from vmfork.edges import NOTHING, Heard
from vmfork.edges.uevent import Uevent, announces_fork, announces_source

_CLONE_NEWNET = 0x40000000
_KOBJECT_UEVENT = 15
# The kernel puts SEQNUM behind them (UEVENT_BUFFER_SIZE is 2048).
_MOST = 1900
_SOUND = b"change@/devices/x\0ACTION=change\0DEVPATH=/devices/x\0SUBSYSTEM=platform\0NEW_VMGENID=1\0"


class _Kernel:
    """The edge, and a socket whose messages the kernel broadcasts to it."""

    def __init__(self) -> None:
        self.edge: Uevent | None = None
        self._sender: socket.socket | None = None
        thread = threading.Thread(target=self._open)
        thread.start()
        thread.join()

    def _open(self) -> None:
        # This thread alone moves into the namespace; a socket stays where it was opened.
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
            return
        with contextlib.suppress(OSError):
            self._sender = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _KOBJECT_UEVENT)
            self._sender.bind((0, 0))
            self.edge = Uevent()

    def broadcast(self, body: bytes) -> None:
        assert self._sender is not None
        header = struct.pack("=IHHII", 16 + len(body), 16, 1, 0, 0)  # NLM_F_REQUEST
        self._sender.sendto(header + body, (0, 0))

    def heard(self) -> Heard:
        """What the edge makes of all that waits; the kernel delivers before `sendto` returns."""
        assert self.edge is not None
        found = NOTHING
        while select.select([self.edge.fileno()], [], [], 0)[0]:
            said = self.edge.drain()
            found = Heard(words=found.words + said.words, hotplug=found.hotplug or said.hotplug, lost=said.lost)
        return found


_kernels: list[_Kernel] = []


def uevent(data: bytes) -> int:
    """A word is one only where the kernel itself says so, and whatever was sent, the next event is heard.

    Returns how many words were heard.
    """
    data = data[:_MOST]
    # libudev cuts a value off at a carriage return or a newline.
    strings = [re.split(rb"[\r\n]", string, maxsplit=1)[0] for string in data.split(b"\0")]
    if not _kernels:
        _kernels.append(_Kernel())
    kernel = _kernels[0]
    if kernel.edge is None or kernel.edge.fileno() < 0:
        properties = dict(
            text.partition("=")[::2] for text in (string.decode("utf-8", "surrogateescape") for string in strings)
        )
        announces_source(properties)
        words = int(announces_fork(properties))
    else:
        kernel.broadcast(data)
        words = kernel.heard().words
        kernel.broadcast(_SOUND)
        after = kernel.heard()
        assert (after.words, after.lost) == (1, False)
    assert words <= 1
    if words:
        assert b"NEW_VMGENID=1" in strings
        assert b"ACTION=change" in strings
        assert not any(string.startswith(b"SYNTH_UUID=") for string in strings)
    return words


def is_through_the_kernel() -> bool:
    """Whether events really go this way here: root, and network namespaces."""
    return os.geteuid() == 0 and bool(_kernels) and _kernels[0].edge is not None and _kernels[0].edge.fileno() >= 0
