# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from support.hooks import Enabling, Guest, always
from support.limits import descriptors
from vmfork.errors import InputError
from vmfork.model import HookOutcome
from vmfork.reactor.discovery import Origin, discover, runnable
from vmfork.reactor.phases import Phase, in_order


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


def test_hooks_stand_in_the_order_of_number_and_name(guest: Guest) -> None:
    for name in ("90-z", "10-b", "10-a.sh", "05-c"):
        guest.hook(name, "")
    assert list(guest.discover()) == ["05-c", "10-a.sh", "10-b", "90-z"]


def test_etc_overrides_lib_by_file_name(guest: Guest) -> None:
    guest.hook("10-x", "", directory=guest.lib)
    guest.hook("10-x", "", directory=guest.etc)
    guest.hook("10-x.sh", "", directory=guest.lib)
    hooks = guest.discover()
    assert hooks["10-x"].origin is Origin.ETC
    assert hooks["10-x"].enabled
    assert hooks["10-x"].reason == f"overrides {guest.lib}/10-x"
    assert hooks["10-x.sh"].origin is Origin.LIB


@pytest.mark.parametrize("target", ["/dev/null", "../../../dev/null", ""])
def test_a_masked_hook_is_not_run(guest: Guest, target: str) -> None:
    guest.hook("10-x", "", directory=guest.lib)
    if target:
        (guest.etc / "10-x").symlink_to(target)
    else:
        (guest.etc / "10-x").touch()
    hook = guest.discover()["10-x"]
    assert (hook.enabled, hook.state, hook.origin) == (False, HookOutcome.MASKED, Origin.ETC)
    assert hook.reason is not None
    assert "masked" in hook.reason


@pytest.mark.parametrize(
    "name",
    [
        "10-x~",
        "10-x.bak",
        "10-x.orig",
        "10-x.sample",
        "10-x.dpkg-old",
        "10-x.dpkg-new",
        "10-x.rpmsave",
        "10-x.ucf-dist",
        ".10-x.swp",
        "#10-x#",
        ".#10-x",
        "README",
        "README.md",
    ],
)
def test_leftovers_are_listed_but_have_no_place_in_a_reaction(guest: Guest, name: str) -> None:
    guest.hook(name, "")
    hook = guest.discover()[name]
    assert (hook.enabled, hook.order) == (False, None)
    assert hook.reason == "is a leftover of an editor or a package manager"
    assert runnable((hook,)) == ()


@pytest.mark.parametrize(
    "name", ["x", "1-x", "100-x", "10x", "10-", "10-a b", "10-a.b.c", "10-é", "10-x;reboot", "10--x", "٣٣-x", "10-x\n"]
)
def test_names_of_another_form_are_listed_and_never_run(guest: Guest, name: str) -> None:
    guest.hook(name, "")
    (hook,) = guest.discover().values()
    assert (hook.enabled, hook.order) == (False, None)
    assert "NN-word" in str(hook.reason)


def test_a_name_cannot_reach_the_terminal_raw(guest: Guest) -> None:
    (guest.etc / "10-\x1b[2J").touch()
    with open(os.fsencode(guest.etc) + b"/10-\xff\xfe", "w"):
        pass
    names = list(guest.discover())
    assert names == ["10-\\x1b[2J", "10-\\xff\\xfe"]
    assert all(name.isprintable() for name in names)
    json.dumps([hook.to_json() for hook in guest.discover().values()]).encode()


def test_a_file_that_is_not_executable_is_skipped_with_the_cure(guest: Guest) -> None:
    path = guest.hook("10-x", "", mode=0o644)
    hook = guest.discover()["10-x"]
    assert hook.state is HookOutcome.SKIPPED
    assert hook.hint == f"chmod +x {path}"


def test_enable_no_switches_a_hook_off(guest: Guest) -> None:
    guest.hook("10-x", "")
    guest.hook("20-y", "")
    asked: list[str] = []

    def settings_of(name: str) -> Enabling:
        asked.append(name)
        return Enabling(enable="no" if name == "10-x" else "yes")

    hooks = {hook.name: hook for hook in discover(guest.paths, settings_of)}
    assert asked == ["10-x", "20-y"]
    assert not hooks["10-x"].enabled
    assert "Enable=no" in str(hooks["10-x"].reason)
    assert hooks["20-y"].enabled


def test_an_untrusted_hook_says_which_component_and_what_to_do(guest: Guest) -> None:
    path = guest.hook("10-x", "", mode=0o777)
    hook = guest.discover()["10-x"]
    assert hook.state is HookOutcome.UNTRUSTED
    assert f"chmod go-w {path}" in str(hook.reason)


def test_a_directory_that_others_may_write_can_neither_add_override_nor_mask(guest: Guest) -> None:
    guest.hook("10-x", "", directory=guest.lib)
    guest.hook("20-y", "", directory=guest.lib)
    (guest.etc / "10-x").touch()
    guest.hook("20-y", "", directory=guest.etc)
    guest.hook("30-z", "", directory=guest.etc)
    guest.etc.chmod(0o777)
    found = discover(guest.paths, always)
    assert {hook.state for hook in found if hook.origin is Origin.ETC} == {HookOutcome.UNTRUSTED}
    assert f"chmod go-w {guest.etc}" in str(found[0].reason)
    chosen = {hook.name: (hook.origin, hook.enabled) for hook in runnable(found)}
    assert chosen == {"10-x": (Origin.LIB, True), "20-y": (Origin.LIB, True), "30-z": (Origin.ETC, False)}


def test_a_dangling_link_is_reported_and_not_run(guest: Guest) -> None:
    (guest.etc / "10-x").symlink_to("/nowhere")
    hook = guest.discover()["10-x"]
    assert (hook.enabled, hook.state) == (False, HookOutcome.FAILED)


def test_without_directories_there_are_no_hooks(tmp_path: Path) -> None:
    guest = Guest(tmp_path)
    guest.lib.rmdir()
    guest.etc.rmdir()
    assert guest.discover() == {}


def test_with_however_few_descriptors_all_hooks_are_found_or_it_is_an_error(guest: Guest) -> None:
    guest.hook("10-x", "", directory=guest.lib)
    guest.hook("20-x", "", directory=guest.lib)
    (guest.etc / "20-x").touch()
    guest.hook("30-x", "")
    whole = discover(guest.paths, always)
    said: list[str] = []
    for free in range(30):
        with descriptors(free=free):
            try:
                assert discover(guest.paths, always) == whole
            except InputError as error:
                said.append(str(error))
    assert 3 < len(said) < 30
    assert all("hooks.d" in one and "Too many open files" in one for one in said)


def test_a_file_in_the_place_of_a_directory_has_no_hooks(guest: Guest) -> None:
    guest.hook("10-x", "", directory=guest.lib)
    guest.etc.rmdir()
    guest.etc.touch()
    assert list(guest.discover()) == ["10-x"]


def test_the_json_form_is_the_contract(guest: Guest) -> None:
    path = guest.hook("10-x.py", "")
    fields = guest.discover()["10-x.py"].to_json()
    want = {"name": "10-x.py", "path": str(path), "order": 10, "origin": "etc", "enabled": True, "reason": None}
    assert fields == want


def test_groups_are_reversed_before_a_snapshot(guest: Guest) -> None:
    for name in ("10-a", "10-b", "20-c"):
        guest.hook(name, "")
    hooks = tuple(guest.discover().values())
    forward = [[hook.name for hook in group] for group in in_order(hooks, Phase.AFTER_SNAPSHOT)]
    backward = [[hook.name for hook in group] for group in in_order(hooks, Phase.BEFORE_SNAPSHOT)]
    assert forward == [["10-a", "10-b"], ["20-c"]]
    assert backward == [["20-c"], ["10-b", "10-a"]]
