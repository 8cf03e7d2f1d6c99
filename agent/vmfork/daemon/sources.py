# SPDX-License-Identifier: Apache-2.0
"""All sources of one guest: opened, read together, and asked what they are worth.

There is one generation ID, from the first readable of fw_cfg, devicetree memory and ACPI memory; they are the same 16
bytes seen in three ways. Finding the memory takes a walk through devicetree or AML, so that is done when probing, not
when a fork is waiting.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from vmfork import ids, settings
from vmfork.config import Config
from vmfork.detector import GENERATION_ID
from vmfork.edges import Edge
from vmfork.edges.kmsg import Kmsg
from vmfork.edges.uevent import Uevent
from vmfork.edges.vmclock import VmclockPoll
from vmfork.errors import AbsentError, InputError
from vmfork.model import Detection, Role, SourceStatus
from vmfork.paths import Paths
from vmfork.truths import Truth
from vmfork.truths.evidence import read_instance_id, read_smbios
from vmfork.truths.fwcfg import FwCfgGenerationId
from vmfork.truths.vmclock import VmclockCounter, VmclockDevice

log = logging.getLogger(__name__)

VMCLOCK = "vmclock"

# The truths that are found through devicetree or AML and read from physical memory.
_IN_MEMORY = ("devicetree", "acpi")

# A host that writes while we read is done within microseconds.
_READS = 8


def _nothing() -> None:
    """There is no memory to close."""


class Sources:
    """The edges and truths of this guest, as the last probe found them."""

    def __init__(self, paths: Paths, config: Config, *, kmsg_after: int | None) -> None:
        self._paths = paths
        self.kmsg = Kmsg(paths, after=kmsg_after)
        listens = not paths.is_fake and config.get(settings.UEVENT) == "auto"
        self.uevent = Uevent() if listens else None
        self._device = VmclockDevice(paths)
        self._close_memory: Callable[[], None] = _nothing
        self._live: dict[Role, frozenset[str]] = {}
        self.probe(config)

    def probe(self, config: Config) -> None:
        """Look again for everything that can come and go: devices, memory, what vmclock offers."""
        if self.kmsg.has_failed:
            self.kmsg = Kmsg(self._paths, after=self.kmsg.last_sequence, missed=True)
        if self.uevent is not None and self.uevent.has_failed:
            self.uevent = Uevent()
        self._memory_policy = config.get(settings.PHYSICAL_MEMORY)
        self._device.close()
        self._close_memory()
        self.vmclock = VmclockPoll(self._device)
        self._counter = VmclockCounter(self._device)
        self._fw_cfg = FwCfgGenerationId(self._paths)
        self._absences: dict[str, AbsentError | InputError] = {}
        self._usable = self._readable_in_memory() if self._may_use_memory() else ()
        self.settled = True
        self.listening = self._authoritative()
        statuses = [edge.status() for edge in self.edges()]
        why_not = {one.name: one.detail for one in statuses if not one.live}
        self._report_lost(Role.EDGE, frozenset(one.name for one in statuses if one.live), why_not)

    def _report_lost(self, role: Role, live: frozenset[str], why_not: Mapping[str, object]) -> None:
        """Say which sources were live when one last looked and are no longer, once for each time that it happens."""
        before = self._live.get(role, live)
        self._live[role] = live
        if before == live:
            return
        for name in sorted((before - live) & why_not.keys()):
            what = "no longer announces forks" if role is Role.EDGE else "can no longer be read"
            fields = {"MESSAGE_ID": ids.SOURCE_LOST, "VMFORK_SOURCE": name}
            log.warning("%s %s: %s", name, what, why_not[name], extra=fields)

    def _may_use_memory(self) -> bool:
        if self._memory_policy == "auto":
            return self._try(self._fw_cfg) is None
        return self._memory_policy == "yes"

    def _readable_in_memory(self) -> tuple[Truth, ...]:
        # Imported where it is needed: on QEMU, where fw_cfg has the ID, the idle daemon does without the AML evaluator.
        from vmfork.truths.acpi import AcpiGenerationId
        from vmfork.truths.devicetree import DeviceTreeGenerationId
        from vmfork.truths.physmem import PhysicalMemory

        memory = PhysicalMemory(self._paths)
        self._close_memory = memory.close
        truths = (DeviceTreeGenerationId(self._paths, memory), AcpiGenerationId(self._paths, memory))
        return tuple(truth for truth in truths if self._try(truth) is not None)

    def _try(self, truth: Truth) -> bytes | None:
        try:
            value = truth.read()
        except (AbsentError, InputError) as error:
            self._absences[truth.name] = error
            return None
        self._absences.pop(truth.name, None)
        return value

    def edges(self) -> tuple[Edge, ...]:
        """Every edge there is, live or not."""
        return (self.kmsg, self.vmclock) if self.uevent is None else (self.kmsg, self.uevent, self.vmclock)

    def _authoritative(self) -> frozenset[str]:
        """The edges that could still speak about a fork, as of this probe: binding a device sends a uevent."""
        live = {self.kmsg.name} if self.kmsg.status().live else set()
        if self.uevent is not None and self.uevent.fileno() >= 0:
            live.add(self.uevent.name)
        return frozenset(live)

    def read_truths(self) -> dict[str, bytes]:
        """Every truth that can be read now; none, and `settled` False, where two reads in a row never agree."""
        # That it is not there was said once; as long as it is true it need not be found out, and said, anew.
        has_counter = not (VMCLOCK in self._absences and self._device.is_still_absent())
        before = self._read_once(has_counter=has_counter)
        for _ in range(_READS):
            now = self._read_once(has_counter=has_counter)
            if now == before:
                self.settled = True
                self._report_lost(Role.TRUTH, self._read_from, self._absences)
                return now
            before = now
        self.settled = False
        return {}

    def _read_once(self, *, has_counter: bool) -> dict[str, bytes]:
        found, read_from = {}, set()
        for truth in (self._fw_cfg, *self._usable):
            value = self._try(truth)
            if value is not None:
                found[GENERATION_ID] = value
                read_from.add(truth.name)
                break
        counter = self._try(self._counter) if has_counter else None
        if counter is not None:
            found[VMCLOCK] = counter
            read_from.add(VMCLOCK)
        self._read_from = frozenset(read_from)
        return found

    def needs_timer(self, truths: Mapping[str, bytes]) -> bool:
        """True where no live edge would report a change of one of these truths."""
        id_has_edge = self.kmsg.status().live or (self.uevent is not None and self.uevent.status().live)
        return (GENERATION_ID in truths and not id_has_edge) or (VMCLOCK in truths and not self.vmclock.status().live)

    def detection(self, truths: Mapping[str, bytes]) -> Detection:
        """Who watches, where these truths can be read."""
        if any(edge.status().live for edge in self.edges()):
            return Detection.EVENT
        return Detection.TIMER if truths else Detection.NONE

    def has_failed(self) -> bool:
        """True where a source is missing for a reason that may pass by itself, and nothing will say when it does."""
        edges = self.kmsg.has_failed or (self.uevent is not None and self.uevent.has_failed)
        return edges or any(isinstance(one, AbsentError) and one.passing for one in self._absences.values())

    def hears_hotplug(self) -> bool:
        """True where a device that appears later will be noticed by itself."""
        return self.uevent is not None and self.uevent.fileno() >= 0

    def statuses(self, *, timer_runs: bool, interval: float) -> tuple[SourceStatus, ...]:
        """Every source in the order of the contract, with why it was not live when last read and what would help."""
        timer = SourceStatus(
            name="timer",
            role=Role.EDGE,
            live=timer_runs,
            detail=f"reads the truths every {interval:g} s" if timer_runs else "not needed: no truth lacks a live edge",
        )
        manual = SourceStatus(name="manual", role=Role.EDGE, live=True, detail="vmforkctl trigger, as root")
        evidence = (read_smbios(self._paths), read_instance_id(self._paths))
        return (
            *(edge.status() for edge in self.edges()),
            timer,
            manual,
            *(self._truth_status(name) for name in (self._fw_cfg.name, *_IN_MEMORY, VMCLOCK)),
            *(
                SourceStatus(
                    name=one.name, role=Role.TRUTH, live=one.value is not None, detail=one.detail, hint=one.hint
                )
                for one in evidence
            ),
        )

    def _truth_status(self, name: str) -> SourceStatus:
        absence = self._absences.get(name)
        hint = None
        if absence is not None:
            detail, hint = str(absence), absence.hint
        elif name not in _IN_MEMORY or any(truth.name == name for truth in self._usable):
            what = "the generation counter" if name == VMCLOCK else "the generation ID"
            return SourceStatus(name=name, role=Role.TRUTH, live=True, detail=f"reads {what}")
        else:
            detail = "not read: " + (
                "PhysicalMemory=no" if self._memory_policy == "no" else "fw_cfg has the generation ID"
            )
        return SourceStatus(name=name, role=Role.TRUTH, live=False, detail=detail, hint=hint)

    def close(self) -> None:
        """Give all descriptors back."""
        for edge in self.edges():
            edge.close()
        self._device.close()
        self._close_memory()
