# SPDX-License-Identifier: Apache-2.0
"""The counters that move when a hypervisor announces a new generation ID, whether or not a log record survived.

`gpe05` is QEMU's general-purpose event, `ACPI:Ged` the generic event device of Firecracker, `vmgenid` the driver's
own interrupt with a devicetree. They are evidence for the moment when kmsg records were lost, and nothing else: other
devices share the first two. What is not there or not understood is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vmfork.errors import AbsentError
from vmfork.paths import Paths
from vmfork.truths.sysfile import read_start

# What their word is called where decisions are taken.
NAME = "interrupts"
GPE = "gpe05"
ACTIONS = ("ACPI:Ged", "vmgenid")

_GPE_LIMIT = 256
# A row for each interrupt, a column for each CPU: this is room for 512 CPUs and 2500 interrupts.
_TABLE_LIMIT = 16 << 20
_COUNTER_DIGITS = 20


def read_counters(paths: Paths) -> dict[str, int]:
    """The counters that this guest has, by name; never raises."""
    counters = parse_interrupts(_text(paths.interrupts, _TABLE_LIMIT))
    gpe = parse_gpe(_text(paths.gpe05, _GPE_LIMIT))
    return counters if gpe is None else {GPE: gpe, **counters}


def moved(before: Mapping[str, int], after: Mapping[str, int]) -> bool:
    """True where a counter that is in both has another value; a counter that came or went says nothing."""
    return any(after[name] != count for name, count in before.items() if name in after)


class Counters:
    """The counters as they were when one last looked: `seen`, or what they are now where nothing is known."""

    def __init__(self, paths: Paths, seen: Mapping[str, int]) -> None:
        self._paths = paths
        self.seen = seen or read_counters(paths)

    def have_moved(self) -> bool:
        """Look again; True where one moved since the last look."""
        before, self.seen = self.seen, read_counters(self._paths)
        return moved(before, self.seen)


def parse_gpe(text: str) -> int | None:
    """The count in a file of /sys/firmware/acpi/interrupts (drivers/acpi/sysfs.c); None where there is none."""
    words = text.split(maxsplit=1)
    return _count(words[0]) if words else None


def is_undelivered(paths: Paths) -> bool:
    """True where QEMU's event waits for the kernel although it is enabled: nothing that ACPI says will arrive.

    Seen on q35 after a suspension to RAM (QEMU 7.2, SeaBIOS 1.16): the firmware does not put the address of the ACPI
    registers back (PMBASE, ACPI_EN), so that every bit of them reads as one and no event raises an interrupt.
    """
    # ACPICA takes the enable bit away before it handles an event, so both are set for microseconds only.
    return all({"EN", "STS"} <= set(_text(paths.gpe05, _GPE_LIMIT).split()) for _ in range(2))


def parse_interrupts(text: str) -> dict[str, int]:
    """The sums over all CPUs and rows of /proc/interrupts for each name of `ACTIONS` that has a row."""
    lines = iter(text.splitlines())
    cpus = sum(word.startswith("CPU") for word in next(lines, "").split())
    counters: dict[str, int] = {}
    for line in lines:
        if not any(action in line for action in ACTIONS):
            continue
        _, _, row = line.partition(":")
        words = row.split()
        # The names of who handles an interrupt come last, a comma and a blank between those that share it.
        names = {word.rstrip(",") for word in words[cpus:]}
        counted = _sum(words[:cpus])
        for action in names.intersection(ACTIONS):
            if counted is not None:
                counters[action] = counters.get(action, 0) + counted
    return counters


def _sum(words: Iterable[str]) -> int | None:
    counts = [_count(word) for word in words]
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None


def _count(word: str) -> int | None:
    return int(word) if word.isascii() and word.isdigit() and len(word) <= _COUNTER_DIGITS else None


def _text(path: str, limit: int) -> str:
    try:
        return read_start(path, limit).decode("ascii", "replace")
    except AbsentError:
        return ""
