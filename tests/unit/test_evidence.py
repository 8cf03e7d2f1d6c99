# SPDX-License-Identifier: Apache-2.0
"""What counts as evidence of another machine, and what does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fakeguest import FakeGuest
from support.privilege import unprivileged
from vmfork.truths.evidence import read_instance_id, read_smbios, same_machine

ONE = "11223344-5566-7788-99aa-bbccddeeff00"
ONE_SWAPPED = "44332211-6655-8877-99aa-bbccddeeff00"
OTHER = "a0b1c2d3-e4f5-4607-8899-aabbccddeeff"
BLANKS = [
    "",
    "00000000-0000-0000-0000-000000000000",
    "ffffffff-ffff-ffff-ffff-ffffffffffff",
    "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF",
    "Not Settable",
    None,
]


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    with FakeGuest(tmp_path) as fake:
        yield fake


def test_equal_uuids_are_the_same_machine() -> None:
    assert same_machine(ONE, ONE)


def test_different_uuids_are_different_machines() -> None:
    assert not same_machine(ONE, OTHER)
    assert not same_machine(ONE_SWAPPED, OTHER)


def test_case_does_not_matter() -> None:
    assert same_machine(OTHER, OTHER.upper())


def test_byte_swapped_uuid_is_the_same_machine_both_ways() -> None:
    assert same_machine(ONE, ONE_SWAPPED)
    assert same_machine(ONE_SWAPPED.upper(), ONE)


@pytest.mark.parametrize(
    "partly",
    [
        "44332211-5566-7788-99aa-bbccddeeff00",
        "11223344-6655-8877-99aa-bbccddeeff00",
        "44332211-6655-8877-aa99-bbccddeeff00",
        "00ffeedd-ccbb-aa99-8877-665544332211",
    ],
)
def test_other_orders_of_the_same_bytes_are_another_machine(partly: str) -> None:
    assert not same_machine(ONE, partly)


@pytest.mark.parametrize("blank", BLANKS)
def test_blank_uuid_is_no_evidence_of_another_machine(blank: str | None) -> None:
    assert same_machine(blank, ONE)
    assert same_machine(ONE, blank)


def test_smbios_uuid_is_read_in_lower_case(guest: FakeGuest) -> None:
    guest.set_smbios_uuid(OTHER.upper())
    evidence = read_smbios(guest.paths)
    assert (evidence.name, evidence.value) == ("smbios", OTHER)
    assert OTHER not in evidence.detail


@pytest.mark.parametrize("blank", [blank for blank in BLANKS if blank is not None])
def test_blank_smbios_uuid_is_no_evidence_and_says_so(guest: FakeGuest, blank: str) -> None:
    guest.set_smbios_uuid(blank)
    evidence = read_smbios(guest.paths)
    assert evidence.value is None
    assert guest.paths.smbios_uuid in evidence.detail


def test_missing_smbios_uuid_names_the_file(guest: FakeGuest) -> None:
    evidence = read_smbios(guest.paths)
    assert evidence.value is None
    assert evidence.detail == f"{guest.paths.smbios_uuid}: No such file or directory"


def test_smbios_uuid_without_privilege_asks_for_root(guest: FakeGuest) -> None:
    guest.set_smbios_uuid(ONE)
    Path(guest.paths.smbios_uuid).chmod(0)
    with unprivileged():
        evidence = read_smbios(guest.paths)
    assert evidence.value is None
    assert evidence.hint is not None
    assert "root" in evidence.hint


def test_instance_id_is_read_without_its_newline(guest: FakeGuest) -> None:
    guest.set_instance_id("i-0123456789abcdef0")
    evidence = read_instance_id(guest.paths)
    assert (evidence.name, evidence.value) == ("instance-id", "i-0123456789abcdef0")


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"iid-datasource-none\n", b"one\ntwo\n", b"i-\x00", b"i-\xff\n", b"x" * 1025]
)
def test_unusable_instance_id_is_no_evidence_and_names_the_file(guest: FakeGuest, content: bytes) -> None:
    guest.put(guest.paths.cloud_instance_id, content)
    evidence = read_instance_id(guest.paths)
    assert evidence.value is None
    assert evidence.detail.startswith(guest.paths.cloud_instance_id)


def test_missing_instance_id_names_the_file(guest: FakeGuest) -> None:
    assert read_instance_id(guest.paths).detail == f"{guest.paths.cloud_instance_id}: No such file or directory"
