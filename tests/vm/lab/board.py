# SPDX-License-Identifier: Apache-2.0
"""An arm64 `virt` machine whose devicetree has a VM Generation ID, a vmclock, or both, and the hypervisor behind them.

QEMU has neither device on arm64, but a guest's drivers need only a page of memory and an interrupt. The guest's RAM is
a shared file, the interrupt goes through qtest. A fork here changes the running guest in place: stop, write, interrupt,
continue, as a hypervisor does before it lets a restored guest run.
"""

from __future__ import annotations

import mmap
import os
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from lab.host import LabError, tool
from lab.qemu import Emulator, Qemu
from lab.vmclock import VmClock

_RAM_BASE = 0x4000_0000
# High in 512 MiB of RAM, where neither the kernel nor the initial RAM file system is put.
_VMGENID_PAGE = 0x5FE0_0000
_VMCLOCK_PAGE = 0x5FE0_1000
_VMGENID_SPI = 35
_VMCLOCK_SPI = 36
MEMORY_MIB = 512

_RESERVED = """
    reserved-memory {{
        #address-cells = <2>;
        #size-cells = <2>;
        ranges;
        hypervisor-pages@{page:x} {{ reg = <0x0 {page:#x} 0x0 0x2000>; no-map; }};
    }};
"""
_NODE = """
    {name}@{page:x} {{
        compatible = "{compatible}";
        reg = <0x0 {page:#x} 0x0 0x1000>;
        interrupts = <0 {spi} 1>;
    }};
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardSpec:
    """Which of the two devices the devicetree shows."""

    vmgenid: bool
    vmclock: bool


class Board:
    """One such machine: made before QEMU starts, attached to it afterwards."""

    def __init__(self, spec: BoardSpec, directory: Path, *, generation_id: bytes) -> None:
        self.spec = spec
        self.generation_id = generation_id
        self.clock = VmClock()
        self._ram = directory / "ram"
        self._tree = directory / "board.dtb"
        with self._ram.open("wb") as file:
            file.truncate(MEMORY_MIB << 20)
        self._write_pages()

    def arguments(self, emulator: Emulator) -> list[str]:
        """What QEMU is told about memory and devicetree."""
        memory = f"memory-backend-file,id=ram,size={MEMORY_MIB}M,mem-path={self._ram},share=on"
        machine = "virt,gic-version=2,memory-backend=ram"
        base = [*("-object", memory), *("-cpu", "cortex-a57"), *("-m", f"{MEMORY_MIB}")]
        dumped = self._tree.with_suffix(".dumped")
        dump = [*emulator.command, *base, "-machine", f"{machine},dumpdtb={dumped}", "-nodefaults", "-display", "none"]
        _run(dump)
        source = self._with_nodes(_run([tool("dtc"), "-q", "-I", "dtb", "-O", "dts", os.fspath(dumped)]))
        edited = self._tree.with_suffix(".dts")
        edited.write_text(source)
        _run([tool("dtc"), "-q", "-I", "dts", "-O", "dtb", "-o", os.fspath(self._tree), os.fspath(edited)])
        return [*base, "-machine", machine, "-dtb", os.fspath(self._tree)]

    def attach(self, qemu: Qemu) -> None:
        """Find the interrupt controller of the running machine."""
        for name, kind in qemu.qmp.children("/machine/unattached").items():
            if kind == "child<arm_gic>":
                self._qemu, self._controller = qemu, f"/machine/unattached/{name}"
                return
        raise LabError("the machine has no GICv2")

    def fork(self, generation_id: bytes) -> None:
        """The running guest continues as another copy of itself: each device it has says so, once.

        With the ID it has already, the devices notify without a change, which a hypervisor may do.
        """
        self._qemu.qmp.command("stop")
        self._change(generation_id)
        self._qemu.qmp.command("cont")

    def disrupt(self) -> None:
        """The clock was disrupted, as by a live migration; it is the same copy of the guest."""
        self._qemu.qmp.command("stop")
        self._change(self.generation_id, notify_vmgenid=False)
        self._qemu.qmp.command("cont")

    def take_over(self, generation_id: bytes, clock: VmClock, new_generation_id: bytes) -> None:
        """A saved guest was loaded and does not run yet: what it had, and what it gets."""
        self.generation_id, self.clock = generation_id, clock
        self._change(new_generation_id)

    def _change(self, generation_id: bytes, *, notify_vmgenid: bool = True) -> None:
        self.clock = replace(
            self.clock,
            seq_count=self.clock.seq_count + 2,
            disruption_marker=self.clock.disruption_marker + 1,
            generation_counter=self.clock.generation_counter + (generation_id != self.generation_id),
        )
        self.generation_id = generation_id
        self._write_pages()
        if self.spec.vmgenid and notify_vmgenid:
            self._qemu.qtest.pulse(self._controller, _VMGENID_SPI)
        if self.spec.vmclock:
            self._qemu.qtest.pulse(self._controller, _VMCLOCK_SPI)

    def _write_pages(self) -> None:
        with self._ram.open("r+b") as file, mmap.mmap(file.fileno(), 0) as ram:
            if self.spec.vmgenid:
                ram[_offset(_VMGENID_PAGE) : _offset(_VMGENID_PAGE) + 16] = self.generation_id
            if self.spec.vmclock:
                page = self.clock.page()
                ram[_offset(_VMCLOCK_PAGE) : _offset(_VMCLOCK_PAGE) + len(page)] = page

    def _with_nodes(self, source: str) -> str:
        nodes = _RESERVED.format(page=_VMGENID_PAGE)
        if self.spec.vmgenid:
            nodes += _NODE.format(name="vmgenid", page=_VMGENID_PAGE, compatible="microsoft,vmgenid", spi=_VMGENID_SPI)
        if self.spec.vmclock:
            nodes += _NODE.format(name="ptp", page=_VMCLOCK_PAGE, compatible="amazon,vmclock", spi=_VMCLOCK_SPI)
        # The root node's closing brace is the last one.
        head, brace, tail = source.rpartition("};")
        if not re.search(r"interrupt-parent = <", head):
            raise LabError("the dumped devicetree has no interrupt parent")
        return head + nodes + brace + tail


def _offset(address: int) -> int:
    return address - _RAM_BASE


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"{command[0]} failed: {done.stderr[-1000:]}")
    return done.stdout
