# SPDX-License-Identifier: Apache-2.0
"""A guest: booted once, saved while it runs, restored any number of times, and asked what it saw.

A saved state is one file of memory and one of disk changes. Every restore is a QEMU process of its own with a disk
overlay of its own, so clones never see each other. The generation ID that QEMU was told is kept as the host's view.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import subprocess
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.board import MEMORY_MIB, Board, BoardSpec
from lab.channel import Completed
from lab.deadline import until
from lab.host import LabError, tool
from lab.image import Image
from lab.qemu import Emulator, Qemu
from lab.vmclock import VmClock

log = logging.getLogger(__name__)

_BOOT_SECONDS = 300.0
_REPORT = {
    "journal": ("journalctl", "--boot", "--no-pager", "--output=short-monotonic"),
    "dmesg": ("dmesg",),
    "vmforkd.log": ("cat", "/run/vmforkd.log"),
    "programs.log": ("cat", "/run/vmfork-lab.programs.log"),
    "doctor": ("vmforkctl", "doctor"),
    "status": ("vmforkctl", "status", "--json=pretty"),
    "list": ("vmforkctl", "list", "--json=pretty"),
    "processes": ("ps",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A kind of guest. `acpi_vmgenid` and `acpi_vmclock` are QEMU's own x86 devices; `board` makes it an arm64 one."""

    name: str
    image: Image
    emulator: Emulator
    machine: tuple[str, ...] = ()
    processors: int = 1
    acpi_vmgenid: bool = False
    acpi_vmclock: bool = False
    board: BoardSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A guest's memory and disk at one moment."""

    spec: Spec
    memory: Path
    disk: Path | None
    directory: Path
    guid: uuid.UUID | None
    smbios_uuid: uuid.UUID | None
    board_state: tuple[bytes, VmClock] | None = None

    def restore(self, name: str, *, guid: uuid.UUID | None = None, paused: bool = False) -> Guest:
        """Start a clone that the hypervisor gives this generation ID. It runs when this returns, unless `paused`."""
        guest = Guest(
            self.spec,
            name,
            self.directory,
            guid=guid,
            backing=self.disk,
            smbios_uuid=self.smbios_uuid,
            incoming=self.memory,
        )
        try:
            guest.qemu.qmp.wait_status("paused", "postmigrate", "prelaunch", seconds=120)
            if guest.board and self.board_state and guid:
                guest.board.take_over(*self.board_state, guid.bytes_le)
            if not paused:
                guest.resume()
        except BaseException:
            guest.kill()
            raise
        return guest


class Guest:
    """A running guest. `guid` is the generation ID that the hypervisor was told, None where nobody chose one."""

    def __init__(
        self,
        spec: Spec,
        name: str,
        directory: Path,
        *,
        guid: uuid.UUID | None = None,
        backing: Path | None = None,
        smbios_uuid: uuid.UUID | None = None,
        incoming: Path | None = None,
    ) -> None:
        self.spec = spec
        self.name = name
        self.guid = guid
        self.smbios_uuid = smbios_uuid
        self.directory = directory / name
        self.directory.mkdir(parents=True)
        self.disk: Path | None = None
        self.board: Board | None = None
        if spec.image.disk:
            self.disk = _overlay(backing or spec.image.disk, self.directory / "disk.qcow2")
        if spec.board:
            self.board = Board(spec.board, self.directory, generation_id=(guid or uuid.uuid4()).bytes_le)
        self.qemu = Qemu(spec.emulator, self._arguments(incoming), directory=self.directory, name=name)
        if self.board:
            self.board.attach(self.qemu)
        self.channel = self.qemu.channel
        self.run = self.channel.run
        self.check = self.channel.check

    def _arguments(self, incoming: Path | None) -> list[str]:
        spec = self.spec
        console = "ttyAMA0" if self.board else "ttyS0"
        append = f"console={console} loglevel=6 panic=-1 mitigations=off net.ifnames=0 {spec.image.command_line}"
        arguments = ["-kernel", os.fspath(spec.image.kernel), "-initrd", os.fspath(spec.image.initrd)]
        arguments += ["-append", append, "-no-reboot", "-rtc", "base=utc", "-smp", str(spec.processors)]
        arguments += ["-accel", "tcg,thread=multi"]
        if self.board:
            arguments += self.board.arguments(spec.emulator)
        else:
            arguments += ["-m", str(MEMORY_MIB), *spec.machine]
        if self.disk:
            arguments += ["-drive", f"file={self.disk},format=qcow2,if=virtio,cache=unsafe"]
        if spec.acpi_vmgenid:
            arguments += ["-device", f"vmgenid,guid={self.guid}"]
        if spec.acpi_vmclock:
            arguments += ["-device", "vmclock"]
        if self.smbios_uuid:
            arguments += ["-uuid", str(self.smbios_uuid)]
        if incoming:
            arguments += ["-incoming", f"exec:cat {shlex.quote(os.fspath(incoming))}"]
        return arguments

    @property
    def generation_id(self) -> bytes | None:
        """The generation ID as it lies in the guest's memory, by the host's knowledge; None where there is none."""
        if self.board:
            return self.board.generation_id if self.board.spec.vmgenid else None
        return self.guid.bytes_le if self.guid and self.spec.acpi_vmgenid else None

    def wait_ready(self, *, seconds: float = _BOOT_SECONDS) -> Guest:
        """Wait until the guest has booted: its channel answers, and under systemd every start job is done."""
        started = time.monotonic()
        self.channel.answer(self.channel.send("true"), seconds=seconds)
        if self.spec.image.has_systemd:
            self.run("systemctl", "is-system-running", "--wait", timeout=seconds)
        log.info("%s: ready after %.1f s", self.name, time.monotonic() - started)
        return self

    def resume(self) -> None:
        """Let a paused guest run."""
        self.qemu.qmp.command("cont")

    def pause(self) -> None:
        """Stop the guest's processors."""
        self.qemu.qmp.command("stop")

    def json(self, *argv: str, accept: tuple[int, ...] = (0,), timeout: float = 60) -> Any:
        """The JSON that a command in the guest prints. Raises LabError for any other exit code or output."""
        completed = self.run(*argv, timeout=timeout)
        if completed.exit_code not in accept:
            raise LabError(f"{self.name}: {completed}")
        try:
            return json.loads(completed.stdout)
        except ValueError as error:
            raise LabError(f"{self.name}: no JSON: {completed}") from error

    def until(self, *argv: str, seconds: float = 60, what: str = "") -> Completed:
        """Repeat a command in the guest until it ends with 0."""

        def succeeded() -> Completed | None:
            completed = self.run(*argv)
            return completed if completed.exit_code == 0 else None

        return until(succeeded, seconds=seconds, what=f"{self.name}: {what or ' '.join(argv)}")

    def save(self, *, go_on: bool = False) -> Saved:
        """Save memory and disk as they are now. The guest ends, or with `go_on` it runs on after the snapshot."""
        started = time.monotonic()
        memory = self.directory / f"memory.{uuid.uuid4().hex[:8]}"
        qmp = self.qemu.qmp
        qmp.command("stop")
        qmp.command("migrate-set-parameters", max_bandwidth=1 << 40)
        qmp.command("migrate", uri=f"exec:cat > {shlex.quote(os.fspath(memory))}")
        until(self._migrated, seconds=120, what=f"{self.name}: memory saved", every=0.02)
        disk = None
        if self.disk:
            disk = memory.with_name(f"disk.{memory.suffix[1:]}.qcow2")
            shutil.copyfile(self.disk, disk)
        if go_on:
            qmp.command("cont")
        else:
            self.quit()
        log.info("%s: saved %d MiB in %.1f s", self.name, memory.stat().st_size >> 20, time.monotonic() - started)
        return Saved(
            spec=self.spec,
            memory=memory,
            disk=disk,
            directory=self.directory,
            guid=self.guid,
            smbios_uuid=self.smbios_uuid,
            board_state=(self.board.generation_id, self.board.clock) if self.board else None,
        )

    def _migrated(self) -> bool:
        status = self.qemu.qmp.command("query-migrate")
        if status.get("status") in ("failed", "cancelled"):
            raise LabError(f"{self.name}: saving failed: {status}")
        return bool(status.get("status") == "completed")

    def power_off(self, *, seconds: float = 120) -> Path:
        """Shut the guest down as its administrator would; its disk is returned, to be booted again."""
        self.channel.send("systemctl", "poweroff")
        self.qemu.wait(seconds=seconds)
        if self.disk is None:
            raise LabError(f"{self.name} has no disk")
        return self.disk

    def quit(self) -> None:
        """End QEMU in order."""
        self.qemu.qmp.command("quit")
        self.qemu.wait(seconds=30)

    def kill(self) -> None:
        """End QEMU at once and remove the guest's memory file; harmless if it has ended."""
        self.qemu.kill()
        (self.directory / "ram").unlink(missing_ok=True)

    def report(self, directory: Path) -> None:
        """Leave what a person needs to understand a failure: console, journal, vmfork's own view."""
        target = directory / self.name
        target.mkdir(parents=True, exist_ok=True)
        for path in (self.qemu.serial_log, self.qemu.log):
            if path.exists():
                shutil.copy(path, target)
        for name, argv in _REPORT.items():
            if not self.qemu.running:
                break
            try:
                completed = self.channel.answer(self.channel.send(*argv, timeout=20), seconds=25)
            except LabError as error:
                (target / name).write_text(f"{error}\n")
                break
            (target / name).write_text(completed.stdout + completed.stderr)


def _overlay(backing: Path, overlay: Path) -> Path:
    kind = "qcow2" if backing.suffix == ".qcow2" else "raw"
    command = [
        tool("qemu-img"),
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        kind,
        "-b",
        os.fspath(backing),
        os.fspath(overlay),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"qemu-img: {done.stderr}")
    return overlay
