# SPDX-License-Identifier: Apache-2.0
"""The one question that vmfork has for ACPI's byte code: where in memory is this device's generation ID?

The device's ADDR object, a Name or a Method, gives a package of two integers, the address's low and high 32 bits
(Microsoft's Virtual Machine Generation ID specification; Linux evaluates it in drivers/virt/vmgenid.c). What is not
fully understood is an AbsentError that names table and object, never a guess.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmfork.errors import AbsentError, InputError
from vmfork.truths.aml_code import Code, Path
from vmfork.truths.aml_eval import Evaluator, ReadMemory
from vmfork.truths.aml_namespace import Namespace
from vmfork.truths.aml_values import Package, Value

_REVISION_OFFSET = 8
_ADDRESS_END = 1 << 52
_HINT = "the kernel's own announcements are not affected by this; PhysicalMemory=no leaves this source out"


def generation_id_address(tables: Sequence[Code], device: str, read_memory: ReadMemory) -> int:
    """The guest-physical address of the 16 bytes that `device` (an absolute path as `\\_SB_.VGEN`) announces.

    `tables` are the DSDT and the SSDTs with their headers, in the order of their loading. `read_memory` is called only
    where the address itself stands in a field in memory, as with Hyper-V and Xen. Raises AbsentError where ADDR is
    missing or not understood, or that field cannot be read, and InputError for an impossible address.
    """
    path = parse_path(device)
    namespace = Namespace(path)
    for table in tables:
        namespace.load(table)
    try:
        found = Evaluator(namespace, read_memory, mask=_integer_mask(tables)).value((*path, "ADDR"))
    except AbsentError as error:
        unread = "; ".join(str(problem) for problem in namespace.problems[:1])
        raise AbsentError(
            f"{device}.ADDR is not understood: {error}" + (f" (unread: {unread})" if unread else ""),
            hint=error.hint or _HINT,
        ) from error
    return _address(found, device)


def parse_path(device: str) -> Path:
    """The segments of an absolute path as Linux writes it, each filled up to four characters with `_`."""
    if not device.startswith("\\"):
        raise InputError(device, "is no absolute path in the ACPI namespace")
    return tuple(segment.ljust(4, "_") for segment in device[1:].split(".") if segment)


def _integer_mask(tables: Sequence[Code]) -> int:
    """Integers have 32 bits where the DSDT's revision is below 2, whatever the SSDTs say (ACPI 6.5, 19.3.5)."""
    revisions = [table.data[_REVISION_OFFSET] for table in tables if table.data[:4] == b"DSDT"]
    return 2**32 - 1 if revisions and revisions[0] < 2 else 2**64 - 1


def _address(found: Value, device: str) -> int:
    elements = found.elements if isinstance(found, Package) else []
    if len(elements) != 2:
        raise AbsentError(f"{device}.ADDR is no package of two integers", hint=_HINT)
    low, high = elements
    if not isinstance(low, int) or not isinstance(high, int):
        raise AbsentError(f"{device}.ADDR is no package of two integers", hint=_HINT)
    address = low | high << 32
    if not 0 < address < _ADDRESS_END:
        raise InputError(f"{device}.ADDR", f"gives the address {address:#x}, where no generation ID can be")
    return address
