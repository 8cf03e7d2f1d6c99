# SPDX-License-Identifier: Apache-2.0
"""MAC addresses that are made from a fork token."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.actions import TOKEN, prepared
from vmfork.actions import mac_address, perform
from vmfork.errors import ActionError


def test_a_derived_address_is_local_and_unicast() -> None:
    for _ in range(200):
        first = int(mac_address.derived("%t", os.urandom(16), "eth0")[:2], 16)
        assert first & 3 == 2


def test_the_same_fork_gives_the_same_address_again() -> None:
    assert mac_address.derived("%t", TOKEN, "eth0") == mac_address.derived("%t", TOKEN, "eth0")


def test_every_interface_and_every_fork_has_its_own() -> None:
    made = {mac_address.derived("%t", token, name) for token in (TOKEN, bytes(16)) for name in ("eth0", "eth1")}
    assert len(made) == 4


def test_given_bytes_stay() -> None:
    made = mac_address.derived("52:54:00:%t", TOKEN, "eth0")
    assert made.startswith("52:54:00:")
    assert len(made) == 17


@pytest.mark.parametrize(
    "template", ["", "52:54:00", "01:00:5e:%t", "zz:%t", "52:54:00:01:02:03:%t", "%t:00", "5254:%t"]
)
def test_a_template_for_no_unicast_address_is_refused(template: str) -> None:
    with pytest.raises(ActionError):
        mac_address.derived(template, TOKEN, "eth0")


@pytest.mark.parametrize("text", ["", "00:00:00:00:00:00", "01:02:03:04:05:06", "52:54:00:12:34", "hello"])
def test_what_is_no_unicast_address_is_refused(text: str) -> None:
    with pytest.raises(ActionError):
        mac_address.check_address(text)


def test_without_interfaces_the_action_is_skipped(tmp_path: Path) -> None:
    assert perform(mac_address.ACTION, prepared(tmp_path).context) == 77


def test_below_a_root_the_network_is_left_alone(tmp_path: Path) -> None:
    assert perform(mac_address.ACTION, prepared(tmp_path, settings={"Interfaces": "*"}).context) == 77
