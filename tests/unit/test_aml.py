# SPDX-License-Identifier: Apache-2.0
"""The address of a generation ID, found in tables that iasl compiled and in tables that it would never write."""

from __future__ import annotations

import time

import pytest

from support import asl
from vmfork.errors import AbsentError, InputError
from vmfork.truths.aml import generation_id_address
from vmfork.truths.aml_code import Code
from vmfork.truths.aml_namespace import Namespace

VGEN = "\\_SB_.VGEN"


def no_memory(address: int, size: int) -> bytes:
    raise AbsentError(f"nobody reads {size} bytes at {address:#x} here")


def codes(*tables: bytes) -> list[Code]:
    return [Code(place=f"table {number}", data=table) for number, table in enumerate(tables)]


def address_of(*tables: bytes, device: str = VGEN) -> int:
    return generation_id_address(codes(*tables), device, no_memory)


def address_in(terms: str, device: str = VGEN) -> int:
    return address_of(asl.dsdt(terms), device=device)


def method(terms: str, outside: str = "") -> int:
    """The address that a device's ADDR method with these terms gives."""
    return address_in(f"{outside} Device (\\_SB.VGEN) {{ Method (ADDR) {{ {terms} }} }}")


def device(body: bytes) -> bytes:
    """The raw device \\_SB_.VGEN around these terms."""
    return asl.enclosed(b"\x5b\x82", b"\\\x2e_SB_VGEN" + body)


NAMED_ADDRESS = b"\x08ADDR" + b"\x12\x0c\x02\x0c\xf0\xff\x0d\x00\x0c\x01\x00\x00\x00"


# The hypervisors.


def test_firecracker_names_a_package() -> None:
    assert address_of(asl.compile_asl(asl.FIRECRACKER)) == 0x1_000D_FFF0


def test_bhyve_names_a_package() -> None:
    assert address_of(asl.compile_asl(asl.BHYVE), device="\\_SB_.GENC") == 0xFFFF_C000


def test_qemu_adds_the_offset_of_the_id_in_its_page() -> None:
    tables = asl.compile_asl(asl.QEMU_DSDT), asl.compile_asl(asl.QEMU)
    assert address_of(*tables) == 0x7FFF_F028


@pytest.mark.parametrize("source", [asl.HYPERV_OLD, asl.HYPERV_NEW])
def test_hyper_v_keeps_the_address_in_two_fields_in_memory(source: str) -> None:
    memory = {(0xF7FD_9010, 4): b"\x40\xe0\xfd\xf7", (0xF7FD_9014, 4): b"\x02\x00\x00\x00"}
    found = generation_id_address(
        codes(asl.compile_asl(source)), "\\_SB_.GENC", lambda address, size: memory[address, size]
    )
    assert found == 0x2_F7FD_E040


def test_xen_gives_only_the_low_half_from_a_field_in_memory() -> None:
    memory = {(0xFC00_0014, 4): b"\x00\x40\x00\xfc"}
    found = generation_id_address(
        codes(asl.compile_asl(asl.XEN)), "\\_SB_.PCI0.ISA_.VGID", lambda address, size: memory[address, size]
    )
    assert found == 0xFC00_4000


def test_a_field_that_may_not_be_read_keeps_the_reason_and_its_hint() -> None:
    def refused(address: int, size: int) -> bytes:
        raise AbsentError("the kernel says no", hint="ask the kernel")

    with pytest.raises(AbsentError, match=r"_SB_\.GENC\.ADDR .* GCAL cannot be read: the kernel says no") as caught:
        generation_id_address(codes(asl.compile_asl(asl.HYPERV_NEW)), "\\_SB_.GENC", refused)
    assert caught.value.hint == "ask the kernel"


# Names and scopes.


def test_each_of_two_devices_has_its_own_address() -> None:
    tables = asl.dsdt(
        "Device (\\_SB.VGEN) { Name (ADDR, Package () { 0x1000, 0 }) }"
        "Device (\\_SB.VGE2) { Name (ADDR, Package () { 0x2000, 0 }) }"
    )
    assert address_of(tables) == 0x1000
    assert address_of(tables, device="\\_SB_.VGE2") == 0x2000


def test_the_address_of_another_device_is_not_taken() -> None:
    with pytest.raises(AbsentError, match=r"_SB_\.VGEN\.ADDR is not understood: .*not declared"):
        address_in(
            "Name (ADDR, Package () { 0x1000, 0 })"
            "Device (\\_SB.VGEN) { Name (_HID, 0) Device (ISA) { Name (ADDR, Package () { 0x2000, 0 }) } }"
        )


def test_a_device_may_stand_in_nested_scopes_opened_again_and_again() -> None:
    terms = (
        "Scope (_SB) { Device (PCI0) { Name (_HID, 0) Device (ISA) { Name (_ADR, 0) } } }"
        "Scope (_SB.PCI0) { Scope (ISA) { Device (VGEN) { Name (_HID, 1) Name (LOW, 0x3000) } } }"
        "Scope (\\_SB.PCI0.ISA.VGEN) { Method (ADDR) { Return (Package () { LOW, 0 }) } }"
    )
    assert address_in(terms, "\\_SB_.PCI0.ISA_.VGEN") == 0x3000


def test_the_nearest_object_of_a_name_is_meant() -> None:
    assert method("Return (Package () { LOW, 0 })", "Name (LOW, 0x1000) Name (\\_SB.LOW, 0x2000)") == 0x2000


def test_a_scope_is_found_upwards_when_it_is_opened_again() -> None:
    terms = (
        "Scope (\\_SB) { Device (VGEN) { Name (_HID, 0) } Device (PCI0) { Name (_HID, 1)"
        "  Scope (VGEN) { Method (ADDR) { Return (Package () { \\_GPE.LOW, 0 }) } }"
        "  Scope (_GPE) { Name (LOW, 0x4000) } } }"
    )
    assert address_in(terms) == 0x4000


def test_parents_and_the_root_can_be_named() -> None:
    terms = "Local0 = Package (2) {} Local0 [0] = \\LOW | ^^HIGH Local0 [1] = 0 Return (Local0)"
    assert method(terms, "Name (LOW, 0x10) Name (\\_SB.HIGH, 0x2000) Name (HIGH, 1)") == 0x2010


def test_an_alias_means_what_it_names() -> None:
    assert method("Return (Package () { NEW, 0 })", "Name (LOW, 0x1000) Alias (LOW, NEW)") == 0x1000


def test_a_name_from_another_table_is_found() -> None:
    first = asl.dsdt("Name (LOW, 0x5000)")
    second = asl.compile_asl(
        'DefinitionBlock ("", "SSDT", 2, "VMFORK", "SECOND", 1) {'
        "External (LOW, IntObj) Device (\\_SB.VGEN) { Method (ADDR) { Return (Package () { LOW, 0 }) } } }"
    )
    assert address_of(first, second) == 0x5000


def test_a_device_under_a_condition_is_there_because_the_kernel_lists_it() -> None:
    assert address_in("If (\\_OSI (0)) { Device (\\_SB.VGEN) { Name (ADDR, Package () { 0x1000, 0 }) } }") == 0x1000


def test_a_value_under_a_condition_is_not_understood() -> None:
    with pytest.raises(AbsentError, match="LOW_ is declared under a condition"):
        method("Return (Package () { LOW, 0 })", "If (\\_OSI (0)) { Name (LOW, 0x1000) }")


def test_an_object_that_is_declared_twice_is_not_understood() -> None:
    table = asl.raw_table(device(NAMED_ADDRESS + NAMED_ADDRESS))
    with pytest.raises(AbsentError, match="is declared twice"):
        address_of(table)


# Methods.


def test_a_method_may_decide_and_calculate() -> None:
    terms = (
        "Local0 = Package (2) {} Local1 = 0x123456789 "
        "If (LOW == 0) { Return (0) } Else { Local0 [0] = Local1 & 0xFFFFFFFF }"
        "If ((LOW >= 2) && (LOW > 1)) { Local0 [1] = Local1 >> 32 }"
        "Return (Local0)"
    )
    assert method(terms, "Name (LOW, 2)") == 0x1_2345_6789


def test_an_else_is_left_out_where_the_condition_holds() -> None:
    terms = (
        "Local0 = Package (2) { 0, 0 } If (LOW) { Local0 [0] = 0x1000 } Else { Local0 [0] = 0x2000 } Return (Local0)"
    )
    assert method(terms, "Name (LOW, 1)") == 0x1000
    assert method(terms, "Name (LOW, 0)") == 0x2000


def test_a_stored_package_is_a_copy() -> None:
    terms = "Local0 = PKG Local0 [0] = 0x9000 Return (PKG)"
    assert method(terms, "Name (PKG, Package () { 0x1000, 0 })") == 0x1000


def test_an_element_can_be_followed_to_its_value() -> None:
    terms = "Local0 = Package (2) { 0, 0 } Local0 [0] = DerefOf (PKG [1]) + 0x10 Return (Local0)"
    assert method(terms, "Name (PKG, Package () { 0, 0x1000 })") == 0x1010


def test_integers_have_32_bits_where_the_dsdt_is_old() -> None:
    terms = "Local0 = Package (2) { 0, 0 } Local0 [0] = LOW + LOW Return (Local0)"
    table = f"Name (LOW, 0x80001000) Device (\\_SB.VGEN) {{ Method (ADDR) {{ {terms} }} }}"
    assert address_of(asl.dsdt(table, revision=1)) == 0x2000
    assert address_of(asl.dsdt(table, revision=2)) == 0x1_0000_2000


@pytest.mark.parametrize(
    ("terms", "outside"),
    [
        ("Return (OTHR ())", "Method (\\_SB.OTHR) { Return (Package () { 0x1000, 0 }) }"),
        ("While (1) { Noop } Return (Package () { 0x1000, 0 })", ""),
        ("Return (Buffer () { 0, 16, 0, 0, 0, 0, 0, 0 })", ""),
        ("Return (Package () { 0x1000, 0, 0 })", ""),
        ("Return (Package () { 0x1000 })", ""),
        ("Return (Package (2) { 0x1000 })", ""),
        ('Return (Package () { "4096", 0 })', ""),
        ("Return (0x1000)", ""),
        ("Return (Local3)", ""),
        ("Noop", ""),
        ("PKG [2] = 0 Return (PKG)", "Name (PKG, Package () { 0x1000, 0 })"),
        ("PKG = 0 Return (PKG)", "Name (PKG, Package () { 0x1000, 0 })"),
        ("LOW = 1 Return (Package () { LOW, 0 })", "OperationRegion (REGN, SystemMemory, 0x1000, 8)"
         "Field (REGN, DWordAcc, NoLock, Preserve) { LOW, 32 }"),
        ("LOW = 0x1000 Return (Package () { LOW, 0 })", 'Name (LOW, "a string stays a string")'),
        ("Return (Package () { LOW, 0 })", "Method (\\_SB.LOW) { Return (0x1000) }"),
        ("Return (Package () { LOW, 0 })", "Device (\\_SB.LOW) { Name (_HID, 0) }"),
    ],
)  # fmt: skip
def test_a_method_beyond_the_small_ones_is_not_understood(terms: str, outside: str) -> None:
    with pytest.raises(AbsentError, match=r"_SB_\.VGEN\.ADDR is"):
        method(terms, outside)


def test_a_method_with_arguments_is_no_address() -> None:
    with pytest.raises(AbsentError, match="ADDR"):
        address_in("Device (\\_SB.VGEN) { Method (ADDR, 1) { Return (Package () { 0x1000, 0 }) } }")


@pytest.mark.parametrize(
    "field",
    [
        "OperationRegion (REGN, SystemIO, 0x1000, 8) Field (REGN, DWordAcc, NoLock, Preserve) { LOW, 32 }",
        "OperationRegion (REGN, SystemMemory, 0x1000, 8) Field (REGN, ByteAcc, NoLock, Preserve) { , 1, LOW, 32 }",
        "OperationRegion (REGN, SystemMemory, 0x1000, 8) Field (REGN, ByteAcc, NoLock, Preserve) { LOW, 24 }",
        "OperationRegion (REGN, SystemMemory, 0x1000, 8) Field (REGN, ByteAcc, NoLock, Preserve) { , 48, LOW, 32 }",
        "OperationRegion (REGN, SystemMemory, 0x1000, 8) Field (REGN, ByteAcc, NoLock, Preserve) { IDX, 8, DAT, 8 }"
        "IndexField (IDX, DAT, ByteAcc, NoLock, Preserve) { LOW, 32 }",
        "OperationRegion (REGN, SystemMemory, 0x1000, 8) Field (REGN, ByteAcc, NoLock, Preserve) { BNK, 8 }"
        "BankField (REGN, BNK, 1, ByteAcc, NoLock, Preserve) { LOW, 32 }",
    ],
)
def test_a_field_that_is_no_number_in_memory_is_not_read(field: str) -> None:
    table = asl.dsdt(f"{field} Device (\\_SB.VGEN) {{ Method (ADDR) {{ Return (Package () {{ LOW, 0 }}) }} }}")
    reads: list[int] = []

    def recorded(address: int, size: int) -> bytes:
        reads.append(address)
        return bytes(size)

    with pytest.raises(AbsentError, match="LOW_"):
        generation_id_address(codes(table), VGEN, recorded)
    assert not reads


# Code around ours.


def test_unknown_code_in_another_device_is_stepped_over() -> None:
    other = asl.enclosed(b"\x5b\x82", b"\\\x2e_SB_OTHR" + b"\x5b\xff\x01\x02\x03")
    assert address_of(asl.raw_table(other + device(NAMED_ADDRESS))) == 0x1_000D_FFF0


def test_a_broken_field_list_is_stepped_over() -> None:
    field = asl.enclosed(b"\x5b\x81", b"REGN\x00\x07\x07")
    assert address_of(asl.raw_table(field + device(NAMED_ADDRESS))) == 0x1_000D_FFF0


def test_unknown_code_in_our_device_names_the_table_and_the_offset() -> None:
    with pytest.raises(AbsentError, match=r"table 0: offset 0x\w+: unknown opcode 0x5bff"):
        address_of(asl.raw_table(device(b"\x5b\xff" + NAMED_ADDRESS)))


def test_a_name_that_unreadable_code_may_declare_is_not_looked_up_further_out() -> None:
    inner = device(b"\x14\x0fADDR\x00\xa4\x12\x07\x02LOW_\x00" + b"\x5b\xff")
    with pytest.raises(AbsentError, match="cannot be read"):
        address_of(asl.raw_table(b"\x08LOW_\x0b\x00\x10" + inner))


def test_a_call_of_another_tables_method_is_stepped_over() -> None:
    terms = (
        "External (\\_SB.CALL, MethodObj,,{IntObj, IntObj}) If (\\_SB.CALL (1, 2) == 3) { Name (XXXX, 1) }"
        "Device (\\_SB.VGEN) { Name (ADDR, Package () { 0x1000, 0 }) }"
    )
    assert address_in(terms) == 0x1000


EVERYTHING = r"""
    Mutex (MUTX, 0) Event (EVNT) DataTableRegion (DREG, "OEM1", "", "")
    Name (BUF, Buffer (64) { 1, 2, 3 }) Name (TEXT, "text") Name (QUAD, 0x1122334455667788)
    CreateByteField (BUF, 0, BYT0) CreateWordField (BUF, 2, WRD0) CreateDWordField (BUF, 4, DWD0)
    CreateQWordField (BUF, 8, QWD0) CreateBitField (BUF, 1, BIT0) CreateField (BUF, 8, 4, NIB0)
    ThermalZone (TZON) { Name (_TMP, 0) }
    PowerResource (POWR, 0, 0) { Name (_STA, 1) Method (_ON) {} Method (_OFF) {} }
    Processor (CPU0, 0, 0, 0) { Name (_UID, 0) }
    Method (TWO, 2) { Return (Arg0 + Arg1) }
    Name (VARP, Package () { BUF, TWO })
    OperationRegion (REGN, SystemMemory, QUAD + 1, 0x100)
    Field (REGN, ByteAcc, NoLock, Preserve) { BNK0, 8, AccessAs (WordAcc, 0), FLD1, 3, Offset (8), FLD2, 64 }
    BankField (REGN, BNK0, 0, ByteAcc, NoLock, Preserve) { FLD3, 8 }
    IndexField (BNK0, FLD1, ByteAcc, NoLock, Preserve) { FLD4, 8 }
    If (TWO (1, Add (2, QUAD)) == 3) { TEXT = Concatenate (TEXT, ToHexString (5)) }
    ElseIf (CondRefOf (BUF)) { QUAD++ } Else { BYT0 = 1 }
    Device (\_SB.VGEN) { Name (ADDR, Package () { 0x1000, 0 }) }
"""


def test_every_kind_of_term_at_the_root_is_stepped_over() -> None:
    assert address_in(EVERYTHING) == 0x1000
    namespace = Namespace(("_SB_", "VGEN"))
    namespace.load(*codes(asl.dsdt(EVERYTHING)))
    assert namespace.problems == []


@pytest.mark.parametrize("low", ["0, 0", "1, 0x100000"])
def test_an_impossible_address_is_refused(low: str) -> None:
    with pytest.raises(InputError, match="where no generation ID can be"):
        address_in(f"Device (\\_SB.VGEN) {{ Name (ADDR, Package () {{ {low} }}) }}")


def test_a_path_that_is_not_absolute_is_refused() -> None:
    with pytest.raises(InputError, match="no absolute path"):
        address_of(asl.raw_table(b""), device="VGEN")


# Bounds.


def test_packages_nested_without_end_are_not_understood() -> None:
    with pytest.raises(AbsentError, match="nested too deeply"):
        address_of(asl.raw_table(device(b"\x08ADDR" + nested(b"\x12", b"\x01", 5000))))


def test_names_that_name_each_other_are_not_understood() -> None:
    circle = b"\x08AAAA\x12\x0a\x02BBBBBBBB" + b"\x08BBBB\x12\x0a\x02AAAAAAAA" + b"\x06AAAAADDR"
    with pytest.raises(AbsentError, match="ADDR"):
        address_of(asl.raw_table(device(circle)))


def test_aliases_in_a_circle_name_nothing() -> None:
    with pytest.raises(AbsentError, match="ADDR"):
        address_of(asl.raw_table(device(b"\x06AAAAADDR" + b"\x06ADDRAAAA")))


def nested(opcode: bytes, body: bytes, count: int) -> bytes:
    """A term inside of itself so many times, written from the outside: wrapping one by one would be quadratic."""
    out = b""
    for left in range(count, 0, -1):
        length = (len(opcode) + 4 + len(body)) * left - len(opcode)
        out += opcode + bytes((0xC0 | length & 0x0F,)) + (length >> 4).to_bytes(3, "little") + body
    return out


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"\xa3" * (1 << 20), id="statements"),
        pytest.param(b"".join(b"\x08N%03X\x00" % (number & 0xFFF) for number in range(160_000)), id="same names"),
        pytest.param(b"".join(b"\x08\x2eAA%02XN%03X\x00" % divmod(number, 0x1000) for number in range(100_000)),
                     id="names"),
        pytest.param(b"\\" + b"^" * (1 << 20), id="parents"),
        pytest.param(b"\x72" * (1 << 20), id="operands"),
        pytest.param(b"\x92" * (1 << 20), id="nested operators"),
        pytest.param(nested(b"\x10", b"AAAA", 100_000), id="nested scopes"),
        pytest.param(nested(b"\xa0", b"\x01", 170_000), id="nested conditions"),
        pytest.param(b"\x0d" * (1 << 20), id="strings"),
        pytest.param(b"\x11\x01" * (1 << 19), id="empty buffers"),
        pytest.param(b"\x5b\x81\xc0\xff\xff\x00" * (1 << 17), id="broken fields"),
        pytest.param(b"\xa0\x02\x92" * 340_000, id="conditions"),
    ],
)  # fmt: skip
def test_a_megabyte_of_anything_takes_a_bounded_time(body: bytes) -> None:
    start = time.process_time()
    with pytest.raises(AbsentError):
        address_of(asl.raw_table(body))
    assert time.process_time() - start < 5
