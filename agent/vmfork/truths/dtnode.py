# SPDX-License-Identifier: Apache-2.0
"""The nodes and properties of a devicetree that the kernel shows as directories and files.

Walks the tree without following a symbolic link, in one pass and without recursion, and reads properties and cells
(big-endian 32-bit words). Depth, number of nodes and size of a property are bounded. What a device's `reg` means is
devicetree.py's matter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from vmfork.errors import AbsentError, InputError
from vmfork.truths.sysfile import absent, read_whole, shown

_DEPTH_LIMIT = 64
_NODE_LIMIT = 200_000
_PROPERTY_LIMIT = 65_536

# Of the Devicetree Specification, section 2.3.5; the counts are not inherited from further up.
_ADDRESS_CELLS_DEFAULT = 2
_SIZE_CELLS_DEFAULT = 1
# OF_MAX_ADDR_CELLS of Linux drivers/of/address.c.
_CELLS_LIMIT = 4


class Node:
    """One node: its directory, its parent (None for the root), and the names of its properties."""

    __slots__ = ("_names", "depth", "directory", "parent")

    def __init__(self, directory: str, parent: Node | None, names: frozenset[str]) -> None:
        self.directory = directory
        self.parent = parent
        self.depth: int = 0 if parent is None else parent.depth + 1
        self._names = names

    @property
    def path(self) -> str:
        """The node's path in the tree, such as `/soc/rng@80000000`, fit for a message."""
        root = self
        while root.parent is not None:
            root = root.parent
        return shown(self.directory[len(root.directory) :]) or "/"

    def place(self, name: str) -> str:
        """The file of a property, for an error message."""
        return shown(f"{self.directory}/{name}")

    def has(self, name: str) -> bool:
        return name in self._names

    def value(self, name: str) -> bytes | None:
        """The raw bytes of a property, None without it; InputError where it is larger than any real one."""
        if name not in self._names:
            return None
        return read_whole(f"{self.directory}/{name}", limit=_PROPERTY_LIMIT)

    def strings(self, name: str) -> tuple[bytes, ...]:
        """The strings of a property, none where it is missing or empty."""
        value = self.value(name)
        return tuple(value.rstrip(b"\0").split(b"\0")) if value else ()

    def address_cells(self) -> int:
        """How many cells an address takes in this node's children; InputError if Linux would not use it."""
        return self._count("#address-cells", _ADDRESS_CELLS_DEFAULT, minimum=1)

    def size_cells(self) -> int:
        """How many cells a size takes in this node's children; 0 on a bus whose addresses are bare numbers."""
        return self._count("#size-cells", _SIZE_CELLS_DEFAULT, minimum=0)

    def _count(self, name: str, default: int, *, minimum: int) -> int:
        value = self.value(name)
        if value is None:
            return default
        if len(value) != 4:
            raise InputError(self.place(name), f"has {len(value)} bytes, one cell has 4")
        count = int.from_bytes(value, "big")
        if not minimum <= count <= _CELLS_LIMIT:
            raise InputError(self.place(name), f"is {count}, not {minimum} to {_CELLS_LIMIT}")
        return count

    def is_available(self) -> bool:
        """True unless this node or one above it has a `status` other than okay."""
        node: Node | None = self
        while node is not None:
            if node.has("status") and node.strings("status")[:1] not in ((b"okay",), (b"ok",)):
                return False
            node = node.parent
        return True


def walk(directory: str) -> Iterator[Node]:
    """Every node of the tree below a directory, parents before their children.

    AbsentError where the directory cannot be listed, InputError where the tree is deeper or larger than a tree can
    be. A node that goes away meanwhile (an overlay is being removed) is left out.
    """
    root, below = _scan(directory, None)
    yield root
    pending = below
    count = 1
    while pending:
        directory, parent = pending.pop()
        count += 1
        if count > _NODE_LIMIT:
            raise InputError(root.place(""), f"holds more than {_NODE_LIMIT} nodes")
        if parent.depth + 1 > _DEPTH_LIMIT:
            raise InputError(shown(directory), f"lies deeper than {_DEPTH_LIMIT} levels")
        try:
            node, below = _scan(directory, parent)
        except AbsentError:
            continue
        yield node
        pending += below


def _scan(directory: str, parent: Node | None) -> tuple[Node, list[tuple[str, Node]]]:
    properties = []
    children = []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    children.append(entry.path)
                elif not entry.is_symlink():
                    properties.append(entry.name)
    except OSError as error:
        raise absent(directory, error) from error
    node = Node(directory, parent, frozenset(properties))
    return node, [(child, node) for child in children]
