# SPDX-License-Identifier: Apache-2.0
"""The generation ID as an ACPI device announces it: find the device in sysfs, its ADDR in the tables, read memory.

The device is known by its compatible ID, because every hypervisor has a hardware ID of its own. Where the ID is in
memory is looked up once and remembered, failures included, until `forget`; the memory itself is read every time.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from dataclasses import dataclass

from vmfork.annotations import Protocol
from vmfork.errors import AbsentError, InputError
from vmfork.paths import Paths
from vmfork.truths.aml import generation_id_address
from vmfork.truths.aml_code import Code
from vmfork.truths.sysfile import absent, read_whole, shown

log = logging.getLogger(__name__)

# Linux's own list (drivers/virt/vmgenid.c); the ACPI core writes IDs in upper case since 5.18, before as in the table.
_IDS = frozenset({"VM_GEN_COUNTER", "VMGENCTR"})
_ID_SIZE = 16
_ATTRIBUTE_LIMIT = 4096

_TABLE_NAME = re.compile(r"(DSDT|SSDT)([0-9]{0,4})")
_HEADER_SIZE = 36
_TABLE_LIMIT = 1 << 20
_TABLES_LIMIT = 4 << 20
_TABLES_COUNT = 128


class Memory(Protocol):
    """Guest-physical memory."""

    def read(self, address: int, size: int) -> bytes:
        """So many bytes from there; AbsentError with the reason where they cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AcpiDevice:
    """A device of the vmgenid kind: `name` in sysfs, `path` in the ACPI namespace as `\\_SB_.VGEN`, hardware ID.

    `status` is what its _STA method gave, None where it has none, and then the device is there and works.
    """

    name: str
    path: str
    hid: str
    status: int | None

    @property
    def is_present(self) -> bool:
        return self.status is None or bool(self.status & 1)


def find_devices(paths: Paths) -> tuple[AcpiDevice, ...]:
    """All devices of the vmgenid kind, by name; AbsentError where this guest has no ACPI."""
    directory = paths.acpi_devices
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError as error:
        raise AbsentError(f"{shown(directory)}: this guest has no ACPI") from error
    except OSError as error:
        raise absent(directory, error) from error
    return tuple(_device(directory, name) for name in names if _is_vmgenid(directory, name))


def find_device(paths: Paths) -> AcpiDevice:
    """The first device of the vmgenid kind that is present; AbsentError with the reason where there is none."""
    devices = find_devices(paths)
    for device in devices:
        if device.is_present:
            return device
    if devices:
        raise AbsentError(f"the ACPI device {devices[0].path} says by its _STA that it is not present")
    raise AbsentError(
        f"{shown(paths.acpi_devices)}: no ACPI device is compatible with VM_Gen_Counter",
        hint="ask the hypervisor for a VM generation ID device (QEMU on x86: -device vmgenid,guid=auto)",
    )


def _is_vmgenid(directory: str, name: str) -> bool:
    try:
        modalias = _attribute(directory, name, "modalias")
    except (AbsentError, InputError):
        return False
    kind, *ids = modalias.upper().split(":")
    return kind == "ACPI" and not _IDS.isdisjoint(ids)


def _device(directory: str, name: str) -> AcpiDevice:
    try:
        text = _attribute(directory, name, "status")
    except AbsentError:
        text = ""
    try:
        status = int(text) if text else None
    except ValueError as error:
        raise InputError(shown(os.path.join(directory, name, "status")), "is no number") from error
    return AcpiDevice(
        name=name, path=_attribute(directory, name, "path"), hid=_attribute(directory, name, "hid"), status=status
    )


def _attribute(directory: str, name: str, attribute: str) -> str:
    value = read_whole(os.path.join(directory, name, attribute), limit=_ATTRIBUTE_LIMIT)
    return value.decode("ascii", "backslashreplace").strip()


def read_tables(paths: Paths) -> tuple[Code, ...]:
    """The DSDT and every SSDT, also those loaded later, in the order of their loading.

    AbsentError without ACPI or without root; InputError where a table is broken or too large.
    """
    tables: dict[bytes, Code] = {}
    total = 0
    for path in _table_paths(paths):
        data = parse_table(read_whole(path, limit=_TABLE_LIMIT), shown(path))
        total += len(data)
        if total > _TABLES_LIMIT:
            raise InputError(shown(paths.acpi_tables), f"holds more than {_TABLES_LIMIT} bytes of AML")
        tables.setdefault(data, Code(place=shown(path), data=data))
    if not tables:
        raise AbsentError(f"{shown(paths.acpi_tables)}: there is neither a DSDT nor an SSDT")
    return tuple(tables.values())


def parse_table(data: bytes, place: str) -> bytes:
    """A table with its header, cut to the length that the header says; InputError where that cannot be."""
    if len(data) < _HEADER_SIZE:
        raise InputError(place, f"ends after {len(data)} bytes, the header of an ACPI table has {_HEADER_SIZE}")
    if data[:4] not in (b"DSDT", b"SSDT"):
        raise InputError(place, "has not the signature of a DSDT or SSDT")
    length = int.from_bytes(data[4:8], "little")
    if not _HEADER_SIZE <= length <= len(data):
        raise InputError(place, f"says that it has {length} bytes, but has {len(data)}")
    if sum(data[:length]) & 0xFF:
        # Linux loads such a table too, with a warning (acpi_tb_verify_checksum).
        log.warning("%s: the checksum of this ACPI table is wrong", place)
    return data[:length]


def _table_paths(paths: Paths) -> list[str]:
    found = []
    for directory in (paths.acpi_tables, paths.acpi_tables + "/dynamic"):
        try:
            names = os.listdir(directory)
        except OSError as error:
            if error.errno == errno.ENOENT and directory != paths.acpi_tables:
                continue
            raise absent(directory, error) from error
        matches = [match for match in map(_TABLE_NAME.fullmatch, names) if match]
        # SSDT2 is before SSDT10.
        matches.sort(key=lambda match: (match[1], int(match[2] or 0)))
        found += [os.path.join(directory, match[0]) for match in matches]
    if len(found) > _TABLES_COUNT:
        raise InputError(shown(paths.acpi_tables), f"holds more than {_TABLES_COUNT} tables")
    return found


class AcpiGenerationId:
    """The truth `acpi`."""

    name = "acpi"

    def __init__(self, paths: Paths, memory: Memory) -> None:
        self._paths = paths
        self._memory = memory
        self._address: int | None = None
        self._problem: AbsentError | InputError | None = None

    def address(self) -> int:
        """The guest-physical address of the 16 bytes; AbsentError or InputError where it cannot be found out."""
        if self._address is None:
            if self._problem is not None:
                raise _again(self._problem)
            try:
                device = find_device(self._paths)
                self._address = generation_id_address(read_tables(self._paths), device.path, self._memory.read)
            except (AbsentError, InputError) as error:
                # Tables of a megabyte take a second; they are not read again on every tick of a timer.
                self._problem = _again(error)
                raise
        return self._address

    def read(self) -> bytes:
        return self._memory.read(self.address(), _ID_SIZE)

    def forget(self) -> None:
        """Look the address up anew at the next read, because a device came or a table was loaded."""
        self._address = self._problem = None


def _again(error: AbsentError | InputError) -> AbsentError | InputError:
    """The same error without the traceback of the first time, which would keep the tables in memory."""
    if isinstance(error, InputError):
        return InputError(error.place, error.problem, hint=error.hint)
    return AbsentError(str(error), hint=error.hint)
