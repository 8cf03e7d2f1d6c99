# SPDX-License-Identifier: Apache-2.0
"""ACPI tables for tests: the generation ID device as each hypervisor describes it, compiled by iasl, and raw AML.

The device descriptions are our own words for what each hypervisor's table does; the addresses are made up.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

from support.tools import need

FIRECRACKER = r"""
DefinitionBlock ("", "DSDT", 2, "VMFORK", "FIRECRKR", 1) {
    Device (\_SB.VGEN) {
        Name (_HID, "VMGENCTR")
        Name (_CID, "VM_Gen_Counter")
        Name (_DDN, "VM_Gen_Counter")
        Name (ADDR, Package (2) { 0x000DFFF0, 0x00000001 })
    }
    Device (\_SB.GED) {
        Name (_HID, "ACPI0013")
        Method (_EVT, 1, Serialized) {
            If (Arg0 == 5) { Notify (\_SB.VGEN, 0x80) }
        }
    }
}
"""

BHYVE = r"""
DefinitionBlock ("", "DSDT", 2, "VMFORK", "BHYVE", 1) {
    Scope (_SB) {
        Device (GENC) {
            Name (_CID, "VM_Gen_Counter")
            Method (_HID, 0, NotSerialized) { Return ("Bhyve_V_Gen_Counter_V1") }
            Name (_UID, 0)
            Name (ADDR, Package (2) { 0xFFFFC000, 0x00000000 })
        }
    }
    Scope (_GPE) {
        Method (_E00, 0, NotSerialized) { Notify (\_SB.GENC, 0x80) }
    }
}
"""

QEMU_DSDT = r"""
DefinitionBlock ("", "DSDT", 1, "VMFORK", "QEMUDSDT", 1) {
    Scope (\_SB) {
        Device (PCI0) {
            Name (_HID, EisaId ("PNP0A03"))
            Method (_CRS, 0, Serialized) {
                Name (CRS, ResourceTemplate () { IO (Decode16, 0x0CF8, 0x0CF8, 1, 8) })
                CreateWordField (CRS, 2, MIN0)
                MIN0 = 0x0CF8
                Return (CRS)
            }
        }
    }
}
"""

# The dword of VGIA is what the firmware fills in.
QEMU = r"""
DefinitionBlock ("", "SSDT", 1, "VMFORK", "VMGENID", 1) {
    Name (VGIA, 0x7FFFF000)
    Scope (\_SB) {
        Device (VGEN) {
            Name (_HID, "QEMUVGID")
            Name (_CID, "VM_Gen_Counter")
            Name (_DDN, "VM_Gen_Counter")
            Method (_STA, 0, NotSerialized) {
                Local0 = 0x0F
                If (VGIA == Zero) { Local0 = Zero }
                Return (Local0)
            }
            Method (ADDR, 0, NotSerialized) {
                Local0 = Package (2) {}
                Index (Local0, 0) = VGIA + 0x28
                Index (Local0, 1) = 0
                Return (Local0)
            }
        }
    }
    Method (\_GPE._E05, 0, NotSerialized) { Notify (\_SB.VGEN, 0x80) }
}
"""

_HYPERV = r"""
DefinitionBlock ("", "DSDT", 2, "VMFORK", "HYPERV", 1) {
    OperationRegion (BIOS, SystemMemory, 0xF7FD9000, 0xFF)
    Field (BIOS, ByteAcc, NoLock, Preserve) {
        LOWB, 32,
        LOWL, 32,
        Offset (0x10),
        GCAL, 32,
        GCAH, 32,
        HCFG, 8
    }
    If (HCFG > 0) {
        Name (\_S4, Package (2) { 1, 0 })
    }
    Device (\_SB.VMOD) {
        Name (_HID, "ACPI0004")
        Name (_CRS, ResourceTemplate () {
            DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, Cacheable, ReadWrite, 0, 0, 0, 0, 0,,, MEM6)
        })
        CreateDWordField (_CRS, MEM6._MIN, MIN6)
        Method (_INI, 0) { MIN6 = LOWB }
    }
    Device (\_SB.GENC) {
        @IDS@
        Name (_UID, 0)
        Method (ADDR, 0) {
            Name (LPKG, Package () { 0, 0 })
            LPKG [0] = GCAL
            LPKG [1] = GCAH
            Return (LPKG)
        }
    }
    Scope (\_GPE) {
        Method (_E00) { Notify (\_SB.GENC, 0x80) }
    }
}
"""
HYPERV_OLD = _HYPERV.replace("@IDS@", 'Name (_CID, "VM_Gen_Counter") Name (_HID, "Hyper_V_Gen_Counter_V1")')
HYPERV_NEW = _HYPERV.replace(
    "@IDS@",
    'Name (_HID, "MSFT1002") Name (_CID, Package (3) { "VM_Gen_Counter", "VMGENCTR", "Hyper_V_Gen_Counter_V1" })',
)

XEN = r"""
DefinitionBlock ("", "DSDT", 2, "VMFORK", "XEN", 1) {
    Scope (\_SB) {
        OperationRegion (BIOS, SystemMemory, 0xFC000000, 24)
        Field (BIOS, ByteAcc, NoLock, Preserve) {
            UAR1, 1, UAR2, 1, LTP1, 1, HPET, 1,
            Offset (4),
            PMIN, 32, PLEN, 32, MSUA, 32, MAPA, 32,
            VGIA, 32
        }
        Device (PCI0) {
            Name (_HID, EisaId ("PNP0A03"))
            Device (ISA) {
                Name (_ADR, 0x00010000)
                OperationRegion (PIRQ, PCI_Config, 0x60, 0x4)
                Scope (\) {
                    Field (\_SB.PCI0.ISA.PIRQ, ByteAcc, NoLock, Preserve) { PIRA, 8, PIRB, 8 }
                }
                Device (VGID) {
                    Name (_HID, EisaId ("XEN0000"))
                    Name (_CID, "VM_Gen_Counter")
                    Method (_STA, 0, NotSerialized) {
                        If (\_SB.VGIA == 0) { Return (0) } Else { Return (0x0F) }
                    }
                    Name (PKG, Package () { 0, 0 })
                    Method (ADDR, 0, NotSerialized) {
                        Store (\_SB.VGIA, Index (PKG, 0))
                        Return (PKG)
                    }
                }
            }
        }
    }
}
"""

# What iasl refuses and firmware has nevertheless: hardware IDs of any form, or none (an error since 2025), a field
# beyond its region, and what only a broken method does.
_TOLERATED = [word for number in ("6002", "6031", "6035", "6058", "6066", "6141") for word in ("-vw", number)]

ALL = (FIRECRACKER, BHYVE, QEMU_DSDT, QEMU, HYPERV_OLD, HYPERV_NEW, XEN)


def dsdt(terms: str, *, revision: int = 2) -> bytes:
    """A compiled DSDT with these terms at its root."""
    return compile_asl(f'DefinitionBlock ("", "DSDT", {revision}, "VMFORK", "TEST", 1) {{ {terms} }}')


@functools.cache
def compile_asl(source: str) -> bytes:
    """The table that iasl makes of this source."""
    iasl = need("iasl", package="acpica-tools")
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "table.dsl").write_text(source, encoding="ascii")
        command = [iasl, *_TOLERATED, "-p", "table", "table.dsl"]
        run = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
        return Path(directory, "table.aml").read_bytes()


def raw_table(body: bytes, *, signature: bytes = b"DSDT", revision: int = 2) -> bytes:
    """A table around AML that no compiler would write, with a right header and checksum."""
    length = (36 + len(body)).to_bytes(4, "little")
    header = signature + length + bytes((revision, 0)) + b"VMFORKRAWTABLE" + bytes(4) + b"VMFK" + bytes(4)
    table = bytearray(header + body)
    table[9] = -sum(table) & 0xFF
    return bytes(table)


def enclosed(opcode: bytes, body: bytes) -> bytes:
    """An opcode with a four-byte package length around its contents."""
    length = len(body) + 4
    return opcode + bytes((0xC0 | length & 0x0F,)) + (length >> 4).to_bytes(3, "little") + body
