# SPDX-License-Identifier: Apache-2.0
"""The interrupt counters that tell of a new generation ID when the kernel's log records were lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmfork.edges.interrupts import is_undelivered, moved, parse_gpe, parse_interrupts, read_counters
from vmfork.paths import Paths

X86 = """\
           CPU0       CPU1
 24:          1          0  IO-APIC   5-edge      ACPI:Ged
 25:          0          1  IO-APIC   6-edge      ACPI:Ged
 26:          0         14  IO-APIC   4-edge      ttyS0
 28:          0          0 PCI-MSIX-0000:00:01.0   0-edge      virtio0-config
NMI:          0          0   Non-maskable interrupts
ERR:          0
"""
ARM64 = """\
           CPU0
 11:       2154     GICv2  27 Level     arch_timer
 14:          3     GICv2  67 Edge      vmgenid
 15:          4     GICv2  68 Edge      uart-pl011, vmgenid
 16:         10     GICv2  69 Edge      vmgenid, uart-pl011
IPI0:         0       Rescheduling interrupts
"""


def put(root: Path, path: str, data: bytes) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def test_rows_of_one_name_and_all_cpus_are_added() -> None:
    assert parse_interrupts(X86) == {"ACPI:Ged": 2}


def test_a_shared_interrupt_counts_for_each_who_handles_it() -> None:
    assert parse_interrupts(ARM64) == {"vmgenid": 17}


@pytest.mark.parametrize("action", ["vmgenid2", "xvmgenid", "ACPI:Gedx", "vmgenid:1"])
def test_a_name_that_only_looks_like_ours_is_not_counted(action: str) -> None:
    assert parse_interrupts(f"CPU0\n 1: 5 GICv2 67 Edge {action}\n") == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "vmgenid",
        "CPU0\nvmgenid\n",
        "CPU0\n 1: vmgenid\n",
        "CPU0 CPU1\n 1: 5 vmgenid\n",
        "CPU0 CPU1\n 1: 5 x GICv2 vmgenid\n",
        "CPU0\n 1: -5 GICv2 vmgenid\n",
        "CPU0\n 1: ٣ GICv2 vmgenid\n",
        "CPU0\n 1: " + "9" * 5000 + " GICv2 vmgenid\n",
        "no header\n 1: 5 GICv2 vmgenid\n",
    ],
)
def test_a_row_that_is_not_understood_is_left_out(text: str) -> None:
    assert parse_interrupts(text) == {}


def test_a_broken_row_does_not_hide_a_good_one() -> None:
    assert parse_interrupts("CPU0\n 1: x vmgenid\n 2: 5 GICv2 67 Edge vmgenid\n") == {"vmgenid": 5}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("     123  EN     enabled      unmasked\n", 123),
        ("       0     invalid      unmasked\n", 0),
        ("7", 7),
        ("", None),
        ("EN 123", None),
        ("-1 EN", None),
        ("1" * 30, None),
    ],
)
def test_the_count_of_a_gpe_comes_first(text: str, count: int | None) -> None:
    assert parse_gpe(text) == count


def test_all_counters_of_a_guest_are_read(tmp_path: Path) -> None:
    put(tmp_path, "proc/interrupts", X86.encode())
    put(tmp_path, "sys/firmware/acpi/interrupts/gpe05", b"       4  EN     enabled      unmasked\n")
    assert read_counters(Paths(str(tmp_path))) == {"gpe05": 4, "ACPI:Ged": 2}


def test_a_guest_without_any_has_no_counters(tmp_path: Path) -> None:
    assert read_counters(Paths(str(tmp_path))) == {}


def test_bytes_that_are_no_text_do_no_harm(tmp_path: Path) -> None:
    put(tmp_path, "proc/interrupts", b"CPU0\n\xff\xfe 1: \x00 vmgenid\n 2: 6 GICv2 67 Edge vmgenid\n")
    put(tmp_path, "sys/firmware/acpi/interrupts/gpe05", b"\xff\xff")
    assert read_counters(Paths(str(tmp_path))) == {"vmgenid": 6}


def test_a_running_kernels_own_table_is_read() -> None:
    assert all(count >= 0 for count in read_counters(Paths()).values())


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"gpe05": 1}, {"gpe05": 2}, True),
        ({"gpe05": 2}, {"gpe05": 1}, True),
        ({"gpe05": 1, "vmgenid": 3}, {"gpe05": 1, "vmgenid": 4}, True),
        ({"gpe05": 1}, {"gpe05": 1}, False),
        ({"gpe05": 1}, {}, False),
        ({}, {"vmgenid": 1}, False),
        ({}, {}, False),
    ],
)
def test_only_a_counter_seen_twice_can_move(before: dict[str, int], after: dict[str, int], expected: bool) -> None:
    assert moved(before, after) is expected


@pytest.mark.parametrize(
    ("text", "undelivered"),
    [
        (b"       1  EN STS enabled      unmasked\n", True),
        (b"       1  EN     enabled      unmasked\n", False),
        (b"       1     STS disabled     unmasked\n", False),
        (b"       0         invalid      unmasked\n", False),
        (b"", False),
        (b"\xff\xffEN STS", False),
    ],
)
def test_an_enabled_event_that_waits_is_undelivered(tmp_path: Path, text: bytes, undelivered: bool) -> None:
    put(tmp_path, "sys/firmware/acpi/interrupts/gpe05", text)
    assert is_undelivered(Paths(str(tmp_path))) is undelivered


def test_without_such_an_event_nothing_is_undelivered(tmp_path: Path) -> None:
    assert not is_undelivered(Paths(str(tmp_path)))
