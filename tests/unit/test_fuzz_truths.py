# SPDX-License-Identifier: Apache-2.0
"""Whatever a file holds, a parser returns a value or raises a typed error that names the file.

The budget is fixed and the examples are the same in every run, so that a red run can be repeated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from support.fakeguest import vmclock_page
from vmfork.errors import AbsentError, InputError
from vmfork.paths import Paths
from vmfork.truths.devicetree import VMGENID, DeviceRegion, locate
from vmfork.truths.evidence import read_instance_id, read_smbios, same_machine
from vmfork.truths.fwcfg import parse_address, parse_generation_id
from vmfork.truths.vmclockabi import VmclockPage, counter_bytes, parse

fixed = settings(max_examples=500, derandomize=True, deadline=None, database=None)
fixed_with_files = settings(fixed, max_examples=250, suppress_health_check=[HealthCheck.too_slow])

PLACE = "the/file"
T = TypeVar("T")


def outcome(parse_it: Callable[[], T]) -> T | AbsentError | InputError:
    """What a parser made of its input; anything but a value and the two typed errors fails the test."""
    try:
        return parse_it()
    except (AbsentError, InputError) as error:
        return error


@fixed
@given(st.binary(max_size=4096))
def test_fw_cfg_generation_id(blob: bytes) -> None:
    result = outcome(lambda: parse_generation_id(blob, PLACE))
    assert result.place == PLACE if isinstance(result, InputError) else result == blob[40:56]


@fixed
@given(st.binary(max_size=16))
@example(bytes(8))
def test_fw_cfg_address(blob: bytes) -> None:
    result = outcome(lambda: parse_address(blob, PLACE))
    assert 0 < result < 2**64 if isinstance(result, int) else str(result).startswith(PLACE)


def damaged_pages() -> st.SearchStrategy[bytes]:
    """Good vmclock pages with some bytes overwritten and the end cut off."""

    def damage(changes: list[tuple[int, int]], size: int) -> bytes:
        page = bytearray(vmclock_page())
        for offset, value in changes:
            page[offset] = value
        return bytes(page[:size])

    changes = st.lists(st.tuples(st.integers(0, 0x70), st.integers(0, 255)), max_size=6)
    return st.builds(damage, changes, st.one_of(st.integers(0, 0x80), st.just(4096)))


@fixed
@given(st.one_of(st.binary(max_size=200), damaged_pages()))
def test_vmclock_page(data: bytes) -> None:
    page = outcome(lambda: parse(data, PLACE))
    if not isinstance(page, VmclockPage):
        assert str(page).startswith(PLACE)
    elif page.generation_counter is not None:
        assert counter_bytes(page, PLACE) == data[0x68:0x70]


CELLS = st.integers(0, 5).map(lambda count: count.to_bytes(4, "big"))
WORDS = st.lists(
    st.sampled_from([0, 1, 15, 16, 0x1000, 0x80000000, 0xFFFFFFFF]).map(lambda word: word.to_bytes(4, "big")),
    max_size=14,
).map(b"".join)
ANYTHING = st.one_of(st.binary(max_size=40), WORDS)


def properties(*, compatible: bytes | None) -> st.SearchStrategy[dict[str, bytes]]:
    return st.fixed_dictionaries(
        {} if compatible is None else {"compatible": st.just(compatible)},
        optional={
            "#address-cells": st.one_of(CELLS, ANYTHING),
            "#size-cells": st.one_of(CELLS, ANYTHING),
            "ranges": st.one_of(st.just(b""), ANYTHING),
            "reg": ANYTHING,
            "status": st.sampled_from([b"okay\0", b"ok\0", b"", b"disabled\0", b"\xff"]),
            "interrupts": ANYTHING,
        },
    )


@fixed_with_files
@given(
    st.lists(properties(compatible=None), min_size=1, max_size=4),
    properties(compatible=b"a,b\0microsoft,vmgenid\0"),
)
@example(
    [{"#address-cells": b"\0\0\0\2", "#size-cells": b"\0\0\0\2"}],
    {"compatible": b"microsoft,vmgenid\0", "reg": bytes(4) + b"\x80\0\0\0" + bytes(7) + b"\x10"},
)
def test_devicetree(buses: list[dict[str, bytes]], device: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        paths = Paths(directory)
        node = Path(paths.device_tree_sysfs)
        for depth, held in enumerate([*buses, device]):
            node = node / f"n{depth}" if depth else node
            node.mkdir(parents=True)
            for name, value in held.items():
                (node / name).write_bytes(value)
        result = outcome(lambda: locate(paths, VMGENID))
        if isinstance(result, DeviceRegion):
            assert 16 <= result.size <= 2**64 - result.address
        elif isinstance(result, InputError):
            assert result.place.startswith(paths.device_tree_sysfs)
        else:
            assert "disabled" in str(result)


@fixed
@given(st.one_of(st.none(), st.text()), st.one_of(st.none(), st.text()))
def test_machine_comparison(one: str | None, other: str | None) -> None:
    assert same_machine(one, other) == same_machine(other, one)


@fixed_with_files
@given(st.binary(max_size=1100))
def test_evidence_files(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        paths = Paths(directory)
        for path in (paths.smbios_uuid, paths.cloud_instance_id):
            Path(path).parent.mkdir(parents=True)
            Path(path).write_bytes(content)
        for evidence in (read_smbios(paths), read_instance_id(paths)):
            assert evidence.value is None or (evidence.value.isprintable() and evidence.value)
            assert directory in evidence.detail
