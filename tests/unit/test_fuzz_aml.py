# SPDX-License-Identifier: Apache-2.0
"""Whatever a table holds, the search for the address gives an address or one of our errors, in bounded time.

The tables are the real ones of the hypervisors with a few bytes changed, so that the changes fall where code is read.
The budget is fixed and the examples are the same in every run.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from support import asl
from vmfork.errors import AbsentError, InputError
from vmfork.truths.acpi import parse_table
from vmfork.truths.aml import generation_id_address
from vmfork.truths.aml_code import Code

fixed = settings(max_examples=600, derandomize=True, deadline=2000, database=None)

DEVICES = ("\\_SB_.VGEN", "\\_SB_.GENC", "\\_SB_.PCI0.ISA_.VGID")
# Bytes that mean much in AML: opcodes, name prefixes, lengths, and what is neither.
TELLING = b"\x00\x01\x06\x08\x10\x11\x12\x14\x2e\x2f\x5b\x5c\x5e\x60\x70\x72\x80\x82\x88\xa0\xa1\xa4\xc0\xff"


@dataclass(frozen=True)
class Change:
    """Replace `drop` bytes at a place (a fraction of the table behind its header) by `insert`."""

    place: float
    drop: int
    insert: bytes

    def apply(self, table: bytes) -> bytes:
        at = 36 + int(self.place * (len(table) - 36))
        return table[:at] + self.insert + table[at + self.drop :]


changes = st.builds(
    Change,
    place=st.floats(0, 1, exclude_max=True),
    drop=st.integers(0, 4),
    insert=st.one_of(st.binary(max_size=4), st.lists(st.sampled_from(TELLING), max_size=4).map(bytes)),
)


def ask(tables: list[bytes]) -> int | None:
    """What comes out for every device there may be; any other exception fails the test."""
    codes = [Code(place="table", data=table) for table in tables]
    found = None
    problems = []
    for device in DEVICES:
        try:
            found = generation_id_address(codes, device, lambda _, size: b"\x10" + bytes(size - 1))
        except (AbsentError, InputError) as error:
            problems.append(str(error))
        else:
            assert 0 < found < 2**52
    assert all("ADDR" in problem for problem in problems)
    return found


@fixed
@given(source=st.sampled_from(asl.ALL), mutations=st.lists(changes, min_size=1, max_size=5))
def test_a_changed_table_gives_an_address_or_an_error(source: str, mutations: list[Change]) -> None:
    table = asl.compile_asl(source)
    for mutation in mutations:
        table = mutation.apply(table)
    ask([table])


@fixed
@given(body=st.binary(max_size=200))
def test_random_code_gives_an_address_or_an_error(body: bytes) -> None:
    method = asl.enclosed(b"\x14", b"ADDR\x00" + body)
    ask([asl.raw_table(asl.enclosed(b"\x5b\x82", b"\\\x2e_SB_VGEN" + method))])


@fixed
@given(data=st.binary(max_size=64))
def test_random_bytes_are_a_table_or_an_input_error(data: bytes) -> None:
    places = []
    for table in (data, b"DSDT" + data):
        try:
            assert table.startswith(parse_table(table, "the/table"))
        except InputError as error:
            places.append(error.place)
    assert set(places) <= {"the/table"}


def test_every_prefix_of_a_table_gives_an_address_or_an_error() -> None:
    for source in asl.ALL:
        table = asl.compile_asl(source)
        for end in range(36, len(table)):
            ask([table[:end]])


def test_the_unchanged_tables_all_give_an_address() -> None:
    sources = [source for source in asl.ALL if source != asl.QEMU_DSDT]
    assert all(ask([asl.compile_asl(source)]) for source in sources)
