# SPDX-License-Identifier: Apache-2.0
"""Where the devicetree says a device's memory is: Linux's bindings microsoft,vmgenid and amazon,vmclock.

A device is found by `compatible`, its address by `reg`, decoded with the cell counts of the bus it sits on and
translated through the `ranges` of every bus up to the root. The unit address in a node's name is never used:
Firecracker's vmgenid has none, and that of its vmclock is decimal.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from vmfork.annotations import Protocol
from vmfork.errors import AbsentError, InputError
from vmfork.paths import Paths
from vmfork.truths.dtnode import Node, walk
from vmfork.truths.sysfile import absent, shown

VMGENID = "microsoft,vmgenid"
VMCLOCK = "amazon,vmclock"

# Both devices keep what is read of them at the start; smaller than a generation ID, neither can be what it says.
_MINIMUM_SIZE = 16
_ADDRESS_END = 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRegion:
    """The memory of one device: its node in the tree, guest-physical address and size in bytes.

    `has_interrupt` is False where the node names none: the memory is readable, but no driver hears of a change.
    """

    node: str
    address: int
    size: int
    has_interrupt: bool


class PhysicalMemory(Protocol):
    """Reads guest-physical memory."""

    def read(self, address: int, size: int) -> bytes:
        """So many bytes from there; AbsentError with the reason where the kernel refuses."""


def locate(paths: Paths, compatible: str) -> DeviceRegion:
    """The region of the first usable device with this `compatible` string, by path in the tree.

    AbsentError without a tree, without such a node, or where it is disabled; InputError where all there are cannot be
    understood.
    """
    root = _tree(paths)
    nodes = sorted((node for node in walk(root) if _is_compatible(node, compatible)), key=lambda node: node.path)
    problems: list[AbsentError | InputError] = [
        AbsentError(f"{shown(root)}: no node is compatible with {compatible}"),
    ]
    for node in nodes:
        try:
            return _region(node)
        except (AbsentError, InputError) as error:
            problems.append(error)
    raise problems[1] if nodes else problems[0]


def _is_compatible(node: Node, compatible: str) -> bool:
    # Linux compares `compatible` without regard to case (of_compat_cmp in include/linux/of.h).
    return any(string.lower() == compatible.encode() for string in node.strings("compatible"))


def _tree(paths: Paths) -> str:
    """The directory of the tree's root, which must not lead out of the root prefix."""
    for candidate in (paths.device_tree_sysfs, paths.device_tree):
        # /proc/device-tree is a symbolic link to the directory in sysfs.
        directory = os.path.realpath(candidate)
        if os.path.isdir(directory) and (not paths.is_fake or _is_below(directory, paths.root)):
            return directory
    raise AbsentError(f"{shown(paths.device_tree)}: this guest has no devicetree")


def _is_below(directory: str, root: str) -> bool:
    top = os.path.realpath(root)
    return os.path.commonpath((directory, top)) == top


def _region(node: Node) -> DeviceRegion:
    if not node.is_available():
        raise AbsentError(f"{node.path}: the devicetree says that this device is disabled")
    address, size = _translated(node, *_reg(node))
    return DeviceRegion(
        node=node.path,
        address=address,
        size=size,
        has_interrupt=any(node.value(name) for name in ("interrupts", "interrupts-extended")),
    )


def _reg(node: Node) -> tuple[int, int]:
    """Bus address and size of the first entry of `reg`."""
    place = node.place("reg")
    value = node.value("reg")
    if node.parent is None or value is None:
        raise InputError(place, "is missing: the device has no address")
    address_cells, size_cells = node.parent.address_cells(), node.parent.size_cells()
    entry = 4 * (address_cells + size_cells)
    if not value or len(value) % entry:
        raise InputError(place, f"has {len(value)} bytes, an address and a size here have {entry}")
    address, size = _cells(value, (address_cells, size_cells))
    if size < _MINIMUM_SIZE:
        raise InputError(place, f"covers {size} bytes, the device has at least {_MINIMUM_SIZE}")
    return address, size


def _translated(node: Node, address: int, size: int) -> tuple[int, int]:
    """The region as the CPU sees it: through the `ranges` of every bus between the node and the root."""
    bus = node.parent
    while bus is not None and bus.parent is not None:
        address = _through(bus, bus.parent, address, size)
        bus = bus.parent
    if address + size > _ADDRESS_END:
        raise InputError(node.place("reg"), "ends beyond 64-bit addresses")
    return address, size


def _through(bus: Node, parent: Node, address: int, size: int) -> int:
    place = bus.place("ranges")
    value = bus.value("ranges")
    if value is None:
        raise InputError(place, "is missing: the CPU cannot address what is on this bus")
    if not value:
        return address
    counts = (bus.address_cells(), parent.address_cells(), bus.size_cells())
    entry = 4 * sum(counts)
    if len(value) % entry:
        raise InputError(place, f"has {len(value)} bytes, no multiple of the {entry} that an entry has here")
    for offset in range(0, len(value), entry):
        child_base, parent_base, length = _cells(value[offset : offset + entry], counts)
        if child_base <= address and address + size <= child_base + length:
            return parent_base + (address - child_base)
    raise InputError(place, "has no entry that covers the whole device")


def _cells(value: bytes, counts: tuple[int, ...]) -> tuple[int, ...]:
    """Consecutive big-endian numbers of so many 32-bit cells each; what follows them is ignored."""
    numbers = []
    offset = 0
    for count in counts:
        numbers.append(int.from_bytes(value[offset : offset + 4 * count], "big"))
        offset += 4 * count
    return tuple(numbers)


class DeviceTreeGenerationId:
    """The truth `devicetree`: the generation ID in the memory that the tree names.

    The tree is walked once and again only when another tree stands in its place, the memory is read every time.
    """

    name = "devicetree"

    def __init__(self, paths: Paths, memory: PhysicalMemory) -> None:
        self._paths = paths
        self._memory = memory
        self._seen: tuple[int, int, int] | None = None
        self._found: DeviceRegion | AbsentError | InputError | None = None

    def region(self) -> DeviceRegion:
        """Where the generation ID is; AbsentError or InputError as `locate`."""
        root = _tree(self._paths)
        try:
            status = os.stat(root)
        except OSError as error:
            raise absent(root, error) from error
        seen = (status.st_dev, status.st_ino, status.st_mtime_ns)
        if self._found is None or seen != self._seen:
            self._seen = seen
            self._found = self._looked_up()
        if isinstance(self._found, DeviceRegion):
            return self._found
        raise self._found.with_traceback(None)

    def _looked_up(self) -> DeviceRegion | AbsentError | InputError:
        try:
            return locate(self._paths, VMGENID)
        except (AbsentError, InputError) as error:
            return error

    def read(self) -> bytes:
        region = self.region()
        value = self._memory.read(region.address, _MINIMUM_SIZE)
        if len(value) != _MINIMUM_SIZE:
            raise InputError(region.node, f"its memory gave {len(value)} bytes, a generation ID has {_MINIMUM_SIZE}")
        return value
