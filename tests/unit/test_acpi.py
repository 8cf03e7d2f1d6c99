# SPDX-License-Identifier: Apache-2.0
"""The ACPI device in sysfs, its tables, and the generation ID in the memory that they point to."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import pytest

from support import asl
from support.privilege import unprivileged
from vmfork.errors import AbsentError, InputError
from vmfork.paths import Paths
from vmfork.truths.acpi import AcpiGenerationId, find_device, find_devices, parse_table, read_tables
from vmfork.truths.physmem import PhysicalMemory

GENERATION_ID = bytes(range(1, 17))
ADDRESS = 0xDFFF0
NAMED = f"Device (\\_SB.VGEN) {{ Name (ADDR, Package () {{ {ADDRESS}, 0 }}) }}"


def add_device(root: Path, name: str, modalias: str, *, path: str = "\\_SB_.VGEN", status: str | None = None) -> None:
    directory = root / "sys/bus/acpi/devices" / name
    directory.mkdir(parents=True)
    (directory / "modalias").write_text(modalias + "\n")
    (directory / "path").write_text(path + "\n")
    (directory / "hid").write_text(name.partition(":")[0] + "\n")
    if status is not None:
        (directory / "status").write_text(status + "\n")


def add_table(root: Path, name: str, data: bytes) -> Path:
    path = root / "sys/firmware/acpi/tables" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def add_memory(root: Path, address: int, data: bytes) -> None:
    path = root / "dev/mem"
    path.parent.mkdir(exist_ok=True)
    with open(path, "r+b" if path.exists() else "wb") as memory:
        memory.seek(address)
        memory.write(data)


def truth(root: Path) -> AcpiGenerationId:
    paths = Paths(str(root))
    return AcpiGenerationId(paths, PhysicalMemory(paths))


def guest(root: Path) -> AcpiGenerationId:
    """A guest as Firecracker makes it."""
    add_device(root, "VMGENCTR:00", "acpi:VMGENCTR:VM_GEN_COUNTER:")
    add_table(root, "DSDT", asl.dsdt(NAMED))
    add_memory(root, ADDRESS, GENERATION_ID)
    return truth(root)


# The device.


@pytest.mark.parametrize(
    "modalias",
    [
        "acpi:VMGENCTR:VM_GEN_COUNTER:",
        "acpi:QEMUVGID:VM_GEN_COUNTER:",
        "acpi:MSFT1002:VM_GEN_COUNTER:VMGENCTR:HYPER_V_GEN_COUNTER_V1:",
        "acpi:Hyper_V_Gen_Counter_V1:VM_Gen_Counter:",
        "acpi:XEN0000:vm_gen_counter:",
        "acpi:vmgenctr:",
    ],
)
def test_a_device_is_found_by_its_compatible_id_in_any_case(tmp_path: Path, modalias: str) -> None:
    add_device(tmp_path, "OTHER:00", "acpi:AMZNC10C:VMCLOCK:")
    add_device(tmp_path, "HID:00", modalias, path="\\_SB_.PCI0.VGEN", status="15")
    (tmp_path / "sys/bus/acpi/devices/device:00").mkdir()
    found = find_device(Paths(str(tmp_path)))
    assert (found.name, found.path, found.hid, found.status) == ("HID:00", "\\_SB_.PCI0.VGEN", "HID", 15)


@pytest.mark.parametrize("modalias", ["acpi:AMZNC10C:VMCLOCK:", "acpi:XVMGENCTR:", "platform:VMGENCTR", ""])
def test_another_device_is_not_taken_for_it(tmp_path: Path, modalias: str) -> None:
    add_device(tmp_path, "OTHER:00", modalias)
    with pytest.raises(AbsentError, match="no ACPI device is compatible with VM_Gen_Counter"):
        find_device(Paths(str(tmp_path)))


def test_a_device_that_is_not_present_is_passed_over(tmp_path: Path) -> None:
    add_device(tmp_path, "A:00", "acpi:VMGENCTR:", status="0")
    with pytest.raises(AbsentError, match="not present"):
        find_device(Paths(str(tmp_path)))
    add_device(tmp_path, "B:00", "acpi:VMGENCTR:", status="15")
    assert find_device(Paths(str(tmp_path))).name == "B:00"
    assert [device.name for device in find_devices(Paths(str(tmp_path)))] == ["A:00", "B:00"]


def test_a_guest_without_acpi_says_so(tmp_path: Path) -> None:
    with pytest.raises(AbsentError, match="this guest has no ACPI"):
        find_device(Paths(str(tmp_path)))


def test_a_status_that_is_no_number_names_its_file(tmp_path: Path) -> None:
    add_device(tmp_path, "A:00", "acpi:VMGENCTR:", status="yes")
    with pytest.raises(InputError, match=r"A:00/status: is no number"):
        find_device(Paths(str(tmp_path)))


# The tables.


def test_tables_are_read_in_the_order_of_their_loading_and_once_each(tmp_path: Path) -> None:
    names = ["DSDT", "SSDT1", "SSDT2", "SSDT10", "dynamic/SSDT11"]
    for number, name in enumerate(names):
        signature = name.rpartition("/")[2][:4].encode()
        add_table(tmp_path, name, asl.raw_table(bytes((0xA3,)) * number, signature=signature))
    add_table(tmp_path, "SSDT12", asl.raw_table(b"\xa3", signature=b"SSDT"))
    add_table(tmp_path, "FACP", b"not a table with code")
    found = [
        os.path.relpath(table.place, tmp_path / "sys/firmware/acpi/tables")
        for table in read_tables(Paths(str(tmp_path)))
    ]
    assert found == names


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "ends after 0 bytes"),
        (asl.raw_table(b"")[:35], "ends after 35 bytes"),
        (asl.raw_table(b"\xa3\xa3")[:-1], "says that it has 38 bytes, but has 37"),
        (asl.raw_table(b"", signature=b"FACP"), "signature"),
        (b"DSDT" + bytes(40), "says that it has 0 bytes"),
    ],
)
def test_a_broken_table_names_its_file(tmp_path: Path, data: bytes, problem: str) -> None:
    add_table(tmp_path, "DSDT", data)
    with pytest.raises(InputError, match=rf"tables/DSDT: .*{problem}"):
        read_tables(Paths(str(tmp_path)))


def test_a_table_beyond_a_megabyte_is_refused(tmp_path: Path) -> None:
    add_table(tmp_path, "SSDT3", bytes((1 << 20) + 1))
    with pytest.raises(InputError, match="SSDT3: is larger than 1048576 bytes"):
        read_tables(Paths(str(tmp_path)))


def test_all_tables_together_are_bounded(tmp_path: Path) -> None:
    for number in range(5):
        add_table(tmp_path, f"SSDT{number}", asl.raw_table(bytes((number,)) * 1_000_000, signature=b"SSDT"))
    with pytest.raises(InputError, match="more than 4194304 bytes"):
        read_tables(Paths(str(tmp_path)))


def test_a_wrong_checksum_is_a_warning_only(caplog: pytest.LogCaptureFixture) -> None:
    table = bytearray(asl.raw_table(b"\xa3"))
    with caplog.at_level(logging.WARNING):
        assert parse_table(bytes(table), "place") == table
        assert not caplog.records
        table[9] ^= 1
        assert parse_table(bytes(table), "place") == table
    assert "checksum" in caplog.text


def test_bytes_behind_a_table_are_not_part_of_it() -> None:
    table = asl.raw_table(b"\xa3")
    assert parse_table(table + b"more", "place") == table


def test_a_guest_without_tables_says_so(tmp_path: Path) -> None:
    with pytest.raises(AbsentError, match="firmware/acpi/tables"):
        read_tables(Paths(str(tmp_path)))
    (tmp_path / "sys/firmware/acpi/tables").mkdir(parents=True)
    with pytest.raises(AbsentError, match="neither a DSDT nor an SSDT"):
        read_tables(Paths(str(tmp_path)))


def test_tables_that_only_root_may_read_say_so() -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        add_table(Path(directory), "DSDT", asl.raw_table(b"")).chmod(0)
        with unprivileged(), pytest.raises(AbsentError, match="DSDT: Permission denied") as caught:
            read_tables(Paths(directory))
    assert caught.value.hint is not None
    assert "root" in caught.value.hint


# The truth.


def test_the_generation_id_is_read_from_the_memory_that_the_device_names(tmp_path: Path) -> None:
    acpi = guest(tmp_path)
    assert acpi.name == "acpi"
    assert acpi.address() == ADDRESS
    assert acpi.read() == GENERATION_ID


def test_the_memory_is_read_every_time(tmp_path: Path) -> None:
    acpi = guest(tmp_path)
    acpi.read()
    add_memory(tmp_path, ADDRESS, bytes(16))
    assert acpi.read() == bytes(16)


def test_an_address_in_memory_is_found_through_memory(tmp_path: Path) -> None:
    add_device(tmp_path, "MSFT1002:00", "acpi:MSFT1002:VM_GEN_COUNTER:VMGENCTR:", path="\\_SB_.GENC")
    add_table(tmp_path, "DSDT", asl.compile_asl(asl.HYPERV_NEW))
    add_memory(tmp_path, 0xF7FD_9010, (0xF7FD_A000).to_bytes(8, "little"))
    add_memory(tmp_path, 0xF7FD_A000, GENERATION_ID)
    assert truth(tmp_path).read() == GENERATION_ID


def test_the_address_is_looked_up_once(tmp_path: Path) -> None:
    acpi = guest(tmp_path)
    acpi.read()
    (tmp_path / "sys/firmware/acpi/tables/DSDT").unlink()
    assert acpi.read() == GENERATION_ID
    acpi.forget()
    with pytest.raises(AbsentError):
        acpi.read()


def test_a_failed_lookup_is_remembered_until_it_is_forgotten(tmp_path: Path) -> None:
    acpi = truth(tmp_path)
    with pytest.raises(AbsentError, match="no ACPI"):
        acpi.read()
    guest(tmp_path)
    with pytest.raises(AbsentError, match="no ACPI"):
        acpi.read()
    acpi.forget()
    assert acpi.read() == GENERATION_ID


def test_a_broken_table_stays_an_input_error_with_its_place(tmp_path: Path) -> None:
    acpi = guest(tmp_path)
    place = add_table(tmp_path, "DSDT", b"DSDT")
    for _ in range(2):
        with pytest.raises(InputError) as caught:
            acpi.read()
        assert caught.value.place == str(place)


def test_memory_that_ends_too_early_is_absent_this_time(tmp_path: Path) -> None:
    acpi = guest(tmp_path)
    os.truncate(tmp_path / "dev/mem", ADDRESS + 15)
    with pytest.raises(AbsentError, match="ends before"):
        acpi.read()
    add_memory(tmp_path, ADDRESS, GENERATION_ID)
    assert acpi.read() == GENERATION_ID
