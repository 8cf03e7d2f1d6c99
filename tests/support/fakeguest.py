# SPDX-License-Identifier: Apache-2.0
"""A whole guest in a plain directory, for everything that takes `--root`.

By itself it has a kernel log (a FIFO), a driver bound to a vmgenid device, a generation ID in fw_cfg, a boot ID and
vmfork's own directories; a vmclock and the evidence of cold clones come when a test sets them. What the hypervisor
changes is replaced by rename, as below any root.
"""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from types import TracebackType

from vmfork.paths import Paths

RESEED_LINE = "random: crng reseeded due to virtual machine fork"
RESUME_LINE = "PM: suspend exit"
FIRST_BOOT_ID = "0d3f1b3c-9a52-4c0e-8f57-5d1f6a1e0b01"
FIRST_GENERATION_ID = bytes.fromhex("443322116655887799aabbccddeeff00")

COUNTER_PRESENT = 1 << 8
NOTIFICATION_PRESENT = 1 << 9


def vmclock_page(
    *,
    counter: int = 1,
    disruption: int = 1,
    seq: int = 2,
    flags: int = COUNTER_PRESENT | NOTIFICATION_PRESENT,
    size: int = 4096,
    version: int = 1,
    magic: int = 0x4B4C4356,
    tai_offset: int = 37,
) -> bytes:
    """A vmclock page of 4096 bytes, each field at the offset that Linux's header gives it."""
    page = bytearray(4096)
    struct.pack_into("<I", page, 0x00, magic)
    struct.pack_into("<I", page, 0x04, size)
    struct.pack_into("<H", page, 0x08, version)
    struct.pack_into("<B", page, 0x0A, 0xFF)
    struct.pack_into("<B", page, 0x0B, 1)
    struct.pack_into("<I", page, 0x0C, seq)
    struct.pack_into("<Q", page, 0x10, disruption)
    struct.pack_into("<Q", page, 0x18, flags)
    struct.pack_into("<B", page, 0x22, 2)
    struct.pack_into("<h", page, 0x24, tai_offset)
    struct.pack_into("<Q", page, 0x68, counter)
    return bytes(page)


class FakeGuest:
    """One fake guest below `root`; `paths` are its paths. Close it, or use it in a `with`, to end its kernel log."""

    def __init__(self, root: Path, *, generation_id: bytes | None = FIRST_GENERATION_ID) -> None:
        self.root = root
        self.paths = Paths(str(root))
        self._record = 100
        for directory, mode in (
            (self.paths.run_public, 0o755),
            (self.paths.run_private, 0o700),
            (self.paths.state_dir, 0o700),
            (self.paths.devices, 0o755),
        ):
            Path(directory).mkdir(parents=True, exist_ok=True)
            Path(directory).chmod(mode)
        os.mkfifo(self.paths.kmsg, 0o644)
        # Also a reader's end, so that records wait in the FIFO while nobody else has it open.
        self._kmsg = os.open(self.paths.kmsg, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self.set_boot_id(FIRST_BOOT_ID)
        self.bind_driver()
        if generation_id is not None:
            self.set_generation_id(generation_id)

    def __enter__(self) -> FakeGuest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the kernel log's FIFO; what was written and not read is gone."""
        if self._kmsg >= 0:
            os.close(self._kmsg)
            self._kmsg = -1

    def put(self, path: str, content: bytes, *, mode: int = 0o644) -> None:
        """A file of the guest, at one of its `paths`, put in place by rename; directories are made."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(f"{path}.new")
        fresh.write_bytes(content)
        fresh.chmod(mode)
        fresh.replace(path)

    def kmsg_line(self, text: str, facility: int = 0, *, level: int = 5, usec: int | None = None) -> int:
        """One record of the kernel log, stamped now unless told otherwise; returns its sequence number."""
        self._record += 1
        stamp = time.monotonic_ns() // 1000 if usec is None else usec
        self.kmsg_bytes(f"{facility << 3 | level},{self._record},{stamp},-;{text}\n".encode())
        return self._record

    def kmsg_bytes(self, data: bytes) -> None:
        """Raw bytes into the kernel log: a part of a record, or none at all."""
        os.write(self._kmsg, data)

    def reseed_line(self) -> int:
        """The kernel's own word that it noticed a fork; returns the record's sequence number."""
        return self.kmsg_line(RESEED_LINE)

    def set_gpe(self, flags: str) -> None:
        """QEMU's ACPI event, with the words of /sys/firmware/acpi/interrupts that say how it is."""
        self.put(self.paths.gpe05, f"       1  {flags} enabled      unmasked\n".encode())

    def resume_with_dead_acpi(self) -> None:
        """Suspended to RAM and woken by firmware that left the ACPI registers where nobody finds them."""
        self.set_gpe("EN STS")
        self.kmsg_line(RESUME_LINE)

    def set_generation_id(self, value: bytes) -> None:
        """The hypervisor's 16 bytes, in memory order, in QEMU's fw_cfg blob."""
        assert len(value) == 16
        blob = bytearray(4096)
        blob[40:56] = value
        self.put(self.paths.fw_cfg_guid, bytes(blob), mode=0o400)

    def set_vmclock(
        self,
        *,
        counter: int = 1,
        disruption: int = 1,
        seq: int = 2,
        flags: int = COUNTER_PRESENT | NOTIFICATION_PRESENT,
    ) -> None:
        """The page of /dev/vmclock0; with an odd `seq` the hypervisor is in the middle of an update."""
        page = vmclock_page(counter=counter, disruption=disruption, seq=seq, flags=flags)
        self.put(f"{self.paths.devices}/vmclock0", page)

    def fork(self, value: bytes) -> None:
        """What a kernel with the driver shows of a fork: the new generation ID, then the line in its log."""
        self.set_generation_id(value)
        self.reseed_line()

    def set_boot_id(self, text: str) -> None:
        """Another boot ID makes the next start of a program one after a reboot."""
        self.put(self.paths.boot_id, f"{text}\n".encode(), mode=0o444)

    def set_smbios_uuid(self, text: str) -> None:
        self.put(self.paths.smbios_uuid, f"{text}\n".encode(), mode=0o400)

    def set_instance_id(self, text: str) -> None:
        self.put(self.paths.cloud_instance_id, f"{text}\n".encode())

    def bind_driver(self, device: str = "VMGENCTR:00") -> None:
        """The vmgenid driver with this device bound to it, as sysfs shows it since Linux 6.10."""
        Path(self.paths.platform_driver).mkdir(parents=True, exist_ok=True)
        for attribute in ("bind", "unbind", "uevent"):
            (Path(self.paths.platform_driver) / attribute).touch()
        target = self.root / "sys/devices/platform" / device
        target.mkdir(parents=True, exist_ok=True)
        link = Path(self.paths.platform_driver) / device
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(target, link.parent))

    def unbind_driver(self, device: str = "VMGENCTR:00") -> None:
        """The driver stays, but no device is bound to it: its line in the kernel log will not come."""
        (Path(self.paths.platform_driver) / device).unlink()
