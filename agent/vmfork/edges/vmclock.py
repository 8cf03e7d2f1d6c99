# SPDX-License-Identifier: Apache-2.0
"""/dev/vmclockN as an edge: since Linux 7.0 poll() reports every change of the page, where the host notifies.

A descriptor polls readable until it is read, and wakes on any change, live migration too: the truth decides. Before
Linux 7.0 the file has no poll operation: epoll refuses it with EPERM, poll() would report it ready forever. Without
notifications from the host (flag bit 9) poll() answers POLLHUP at once.
"""

from __future__ import annotations

import select

from vmfork.edges import NOTHING, Heard
from vmfork.errors import AbsentError, InputError
from vmfork.model import Role, SourceStatus
from vmfork.truths.vmclock import VmclockDevice


class VmclockPoll:
    """The same descriptor that the truth reads, because only a read on it makes it wait again."""

    name = "vmclock"

    def __init__(self, device: VmclockDevice) -> None:
        self._device = device
        self._pollable, self._detail, self._hint = self._probe()

    def _probe(self) -> tuple[bool, str, str | None]:
        try:
            self._device.read()
        except (AbsentError, InputError) as error:
            return False, str(error), error.hint
        try:
            with select.epoll() as probe:
                probe.register(self._device.fileno(), select.EPOLLIN)
                ready = probe.poll(0)
        except PermissionError:
            return False, "this kernel's vmclock cannot be polled", "poll() came with Linux 7.0"
        except OSError as error:
            return False, f"whether it can be polled is not known: {error.strerror}", "vmforkctl reload looks again"
        if any(mask & (select.EPOLLHUP | select.EPOLLERR) for _, mask in ready):
            return False, "the host sends no notifications (flag bit 9 is not set)", "ask for a newer hypervisor"
        return True, "waits for the host's notification", None

    def fileno(self) -> int:
        return self._device.fileno() if self._pollable else -1

    def drain(self) -> Heard:
        if self._pollable:
            try:
                self._device.read()
            except (AbsentError, InputError) as error:
                # The device went away, or its page is wedged: waiting on it would spin.
                self._pollable, self._detail = False, str(error)
                return Heard(hotplug=True)
        return NOTHING

    def status(self) -> SourceStatus:
        seen = self._device.disruptions
        detail = self._detail + (f"; {seen} clock disruptions since the start" if seen else "")
        return SourceStatus(name=self.name, role=Role.EDGE, live=self._pollable, detail=detail, hint=self._hint)

    def close(self) -> None:
        """The device belongs to the truth."""
