# SPDX-License-Identifier: Apache-2.0
"""The generation ID and its address as QEMU's fw_cfg shows them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.fakeguest import FakeGuest
from support.privilege import unprivileged
from vmfork.errors import AbsentError, InputError
from vmfork.paths import Paths
from vmfork.truths import Truth
from vmfork.truths.fwcfg import FwCfgGenerationId, parse_address, parse_generation_id, read_address

# The GUID 11223344-5566-7788-99aa-bbccddeeff00 as QEMU puts it into memory.
IN_MEMORY = bytes.fromhex("443322116655887799aabbccddeeff00")


def blob_with(value: bytes, size: int = 4096) -> bytes:
    return (bytes(40) + value).ljust(size, b"\0")


def test_generation_id_is_the_sixteen_bytes_at_offset_forty() -> None:
    assert parse_generation_id(blob_with(IN_MEMORY), "blob") == IN_MEMORY


def test_all_zero_generation_id_is_a_value() -> None:
    assert parse_generation_id(bytes(4096), "blob") == bytes(16)


def test_blob_of_exactly_fifty_six_bytes_is_enough() -> None:
    assert parse_generation_id(blob_with(IN_MEMORY, 56), "blob") == IN_MEMORY


@pytest.mark.parametrize("size", [0, 1, 40, 55])
def test_short_blob_is_an_error_that_names_the_file(size: int) -> None:
    with pytest.raises(InputError, match=r"^etc/vmgenid_guid: "):
        parse_generation_id(blob_with(IN_MEMORY)[:size], "etc/vmgenid_guid")


def test_every_read_sees_the_file_that_stands_there_now(tmp_path: Path) -> None:
    with FakeGuest(tmp_path) as guest:
        truth: Truth = FwCfgGenerationId(guest.paths)
        guest.set_generation_id(IN_MEMORY)
        first = truth.read()
        guest.set_generation_id(bytes(range(16)))
        assert (truth.name, first, truth.read()) == ("fwcfg", IN_MEMORY, bytes(range(16)))


def test_reads_leave_no_descriptor_open(tmp_path: Path) -> None:
    with FakeGuest(tmp_path) as guest:
        truth = FwCfgGenerationId(guest.paths)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            truth.read()
        guest.put(guest.paths.fw_cfg_guid, b"short")
        for _ in range(50):
            with pytest.raises(InputError):
                truth.read()
        assert len(os.listdir("/proc/self/fd")) == before


def test_truncated_file_names_the_file_and_not_its_content(tmp_path: Path) -> None:
    with FakeGuest(tmp_path) as guest:
        guest.put(guest.paths.fw_cfg_guid, b"SECRET" * 5)
        with pytest.raises(InputError) as caught:
            FwCfgGenerationId(guest.paths).read()
        assert guest.paths.fw_cfg_guid in str(caught.value)
        assert "SECRET" not in str(caught.value)


def test_a_fifo_in_place_of_the_file_does_not_block(tmp_path: Path) -> None:
    with FakeGuest(tmp_path, generation_id=None) as guest:
        Path(guest.paths.fw_cfg_guid).parent.mkdir(parents=True)
        os.mkfifo(guest.paths.fw_cfg_guid)
        with pytest.raises(AbsentError, match="vmgenid_guid"):
            FwCfgGenerationId(guest.paths).read()


def test_a_directory_in_place_of_the_file_is_absent(tmp_path: Path) -> None:
    paths = Paths(str(tmp_path))
    Path(paths.fw_cfg_guid).mkdir(parents=True)
    with pytest.raises(AbsentError, match="vmgenid_guid"):
        FwCfgGenerationId(paths).read()


def test_qemu_guest_without_the_module_is_told_to_load_it(tmp_path: Path) -> None:
    paths = Paths(str(tmp_path))
    (Path(paths.acpi_devices) / "QEMU0002:00").mkdir(parents=True)
    with pytest.raises(AbsentError) as caught:
        FwCfgGenerationId(paths).read()
    assert caught.value.hint == "modprobe qemu_fw_cfg"


def test_other_guest_without_fw_cfg_is_not_told_to_load_a_module(tmp_path: Path) -> None:
    paths = Paths(str(tmp_path))
    (Path(paths.acpi_devices) / "VMGENCTR:00").mkdir(parents=True)
    with pytest.raises(AbsentError, match="no QEMU fw_cfg") as caught:
        FwCfgGenerationId(paths).read()
    assert caught.value.hint is None


def test_fw_cfg_without_vmgenid_blames_the_hypervisor(tmp_path: Path) -> None:
    paths = Paths(str(tmp_path))
    Path(paths.fw_cfg, "by_name").mkdir(parents=True)
    with pytest.raises(AbsentError, match="no vmgenid device") as caught:
        FwCfgGenerationId(paths).read()
    assert caught.value.hint is not None
    assert "-device vmgenid" in caught.value.hint


def test_without_privilege_the_hint_is_root(tmp_path: Path) -> None:
    with FakeGuest(tmp_path) as guest:
        Path(guest.paths.fw_cfg_guid).chmod(0)
        with unprivileged(), pytest.raises(AbsentError, match="Permission denied") as caught:
            FwCfgGenerationId(guest.paths).read()
    assert caught.value.hint is not None
    assert "root" in caught.value.hint


def test_address_is_little_endian() -> None:
    assert parse_address((0x7FFFF028).to_bytes(8, "little"), "blob") == 0x7FFFF028


def test_address_zero_means_that_the_firmware_placed_nothing() -> None:
    with pytest.raises(AbsentError, match=r"^etc/vmgenid_addr: "):
        parse_address(bytes(8), "etc/vmgenid_addr")


@pytest.mark.parametrize("size", [0, 4, 7, 9])
def test_address_of_another_length_is_an_error(size: int) -> None:
    with pytest.raises(InputError, match=r"^etc/vmgenid_addr: "):
        parse_address(b"\x01" * size, "etc/vmgenid_addr")


def test_address_is_read_from_its_file(tmp_path: Path) -> None:
    with FakeGuest(tmp_path) as guest:
        guest.put(guest.paths.fw_cfg_address, (0x7FFFF028).to_bytes(8, "little"))
        assert read_address(guest.paths) == 0x7FFFF028
        guest.put(guest.paths.fw_cfg_address, b"\x01" * 4096)
        with pytest.raises(InputError, match="larger than 8 bytes"):
            read_address(guest.paths)
