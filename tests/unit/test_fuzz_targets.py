# SPDX-License-Identifier: Apache-2.0
"""Every target of the fuzzer with its kept inputs and with a fixed budget of changed ones, the same in every run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.tools import need_root
from torture import cpage
from torture.fuzz import changed
from torture.kept import seeds
from torture.kobjects import is_through_the_kernel
from torture.targets import TARGETS, addresses, scratch

fixed = settings(
    max_examples=120, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module", autouse=True)
def _tidy() -> Iterator[None]:
    yield
    scratch.remove()
    cpage.end()


@pytest.mark.parametrize("name", TARGETS)
def test_kept_inputs_are_taken_or_refused(name: str) -> None:
    kept = seeds(name)
    assert kept
    for data in kept.values():
        TARGETS[name](data)


# What firmware has; the fuzzer's own go by other names.
TABLES = [name for name in seeds("acpi") if not name.startswith(("reached-", "found-"))]


@pytest.mark.parametrize("name", TABLES)
def test_every_table_but_the_one_without_a_device_leads_to_an_address(name: str) -> None:
    assert bool(addresses(seeds("acpi")[name])) == (name != "qemudsdt2.hex")


def test_uevents_go_through_the_kernel() -> None:
    need_root()
    words = {name: TARGETS["uevent"](data) for name, data in seeds("uevent").items()}
    assert is_through_the_kernel()
    assert (words["fork.hex"], words["synthetic.hex"], words["add.hex"]) == (1, 0, 0)


@pytest.mark.parametrize("name", TARGETS)
def test_changed_inputs_are_taken_or_refused(name: str) -> None:
    @fixed
    @given(st.one_of(changed(list(seeds(name).values())), st.binary(max_size=300)))
    def try_it(data: bytes) -> None:
        TARGETS[name](data)

    try_it()
