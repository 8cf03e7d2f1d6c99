# SPDX-License-Identifier: Apache-2.0
"""The generation ID as QEMU's firmware configuration device shows it: fw_cfg file etc/vmgenid_guid.

The blob is a page for the firmware to place in memory; the 16 bytes of the ID stand at offset 40, in memory order.
The kernel (drivers/firmware/qemu_fw_cfg.c) asks the device anew on every read and QEMU answers with the ID of the
process that runs the guest now, so this truth follows a fork even in a kernel without a vmgenid driver.
"""

from __future__ import annotations

import os

from vmfork.errors import AbsentError, InputError
from vmfork.paths import Paths
from vmfork.truths.sysfile import read_start, read_whole, shown

_ID_OFFSET = 40
_ID_SIZE = 16
_ADDRESS_SIZE = 8


def parse_generation_id(blob: bytes, path: str) -> bytes:
    """The 16 bytes of the generation ID in memory order; InputError where the blob ends before them."""
    if len(blob) < _ID_OFFSET + _ID_SIZE:
        raise InputError(shown(path), f"ends after {len(blob)} bytes, a generation ID ends at {_ID_OFFSET + _ID_SIZE}")
    return blob[_ID_OFFSET : _ID_OFFSET + _ID_SIZE]


def parse_address(blob: bytes, place: str) -> int:
    """The guest-physical address of the generation ID itself (not of the page around it).

    AbsentError where it is 0: the firmware did not take part. InputError where the blob is not 8 bytes long.
    """
    if len(blob) != _ADDRESS_SIZE:
        raise InputError(place, f"has {len(blob)} bytes, an address has {_ADDRESS_SIZE}")
    address = int.from_bytes(blob, "little")
    if address == 0:
        raise AbsentError(f"{place}: the firmware placed no generation ID in memory")
    return address


def read_address(paths: Paths) -> int:
    """The address that the firmware reported to QEMU; AbsentError or InputError as `parse_address`."""
    path = paths.fw_cfg_address
    try:
        blob = read_whole(path, limit=_ADDRESS_SIZE)
    except AbsentError as error:
        raise _explained(paths, path, error) from error
    return parse_address(blob, shown(path))


class FwCfgGenerationId:
    """The truth `fwcfg`. Opened by path for every read: below a root the file is replaced by rename."""

    name = "fwcfg"

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._path = paths.fw_cfg_guid

    def read(self) -> bytes:
        try:
            # No more than is needed: without DMA every byte of a read is an exit to the hypervisor.
            blob = read_start(self._path, _ID_OFFSET + _ID_SIZE)
        except AbsentError as error:
            raise _explained(self._paths, self._path, error) from error
        return parse_generation_id(blob, self._path)


def _explained(paths: Paths, path: str, error: AbsentError) -> AbsentError:
    """Tell a kernel without the fw_cfg module from a QEMU without the vmgenid device."""
    if not isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
        return error
    if os.path.isdir(paths.fw_cfg):
        return AbsentError(
            f"{shown(path)}: this QEMU has no vmgenid device",
            hint="on the host, add -device vmgenid,guid=auto (libvirt: <genid/>)",
        )
    if _is_offered(paths):
        return AbsentError(
            f"{shown(paths.fw_cfg)}: the fw_cfg device is there, but its kernel module is not loaded",
            hint="modprobe qemu_fw_cfg",
        )
    return AbsentError(f"{shown(paths.fw_cfg)}: this guest has no QEMU fw_cfg device")


def _is_offered(paths: Paths) -> bool:
    # QEMU0002 is the ACPI ID of fw_cfg; unlike the SMBIOS vendor strings, no cloud renames it.
    try:
        names = os.listdir(paths.acpi_devices)
    except OSError:
        return False
    return any(name.startswith("QEMU0002:") for name in names)
