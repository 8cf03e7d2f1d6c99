# SPDX-License-Identifier: Apache-2.0
"""How an action is found, run and mapped to the exit codes of the hook contract."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from support.actions import TOKEN, prepared
from vmfork import settings
from vmfork.actions import Action, ActionContext, Phase, TryAgain, all_actions, find, main, perform
from vmfork.errors import ActionError, ActionSkipped
from vmfork.model import ForkEvent, Identity, IdentityPolicy, Kind

HOOKS = Path(__file__).parents[2] / "hooks.d"


def raising(error: Exception | None) -> Action:
    def after_fork(context: ActionContext) -> None:
        if error is not None:
            raise error

    return Action(name="x", hook="99-x", summary="x", after_fork=after_fork)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (ActionSkipped("not here"), 77),
        (TryAgain("soon"), 75),
        (ActionError("broken", hint="do this"), 1),
        (OSError(errno.ENOSPC, "No space left on device", "/etc/thing"), 1),
    ],
)
def test_the_end_of_an_action_is_an_exit_code(tmp_path: Path, error: Exception | None, code: int) -> None:
    assert perform(raising(error), prepared(tmp_path).context) == code


def test_a_skipped_action_says_why(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    perform(raising(ActionSkipped("not here")), run.context)
    assert run.lines == ["skipped: not here"]


def test_an_error_is_printed_with_its_hint_and_an_os_error_with_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    perform(raising(ActionError("broken", hint="do this")), prepared(tmp_path).context)
    perform(raising(OSError(errno.ENOSPC, "No space left on device", "/etc/thing")), prepared(tmp_path).context)
    told = capsys.readouterr().err
    assert "error: broken\nhint: do this\n" in told
    assert "/etc/thing" in told


def test_an_identity_action_is_skipped_for_a_guest_that_keeps_its_identity(tmp_path: Path) -> None:
    ran: list[bool] = []
    action = Action(name="x", hook="99-x", summary="x", identity=True, after_fork=lambda context: ran.append(True))
    code = perform(action, prepared(tmp_path, identity=IdentityPolicy.KEEP).context)
    assert (code, ran) == (77, [])


def test_a_phase_without_a_function_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("clock", ["before-snapshot"], settings={}, environment={}) == 77
    assert "nothing to do before snapshot" in capsys.readouterr().out


def test_an_unknown_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("rng", ["--wat"], environment={}) == 2
    assert "--wat" in capsys.readouterr().err


def test_an_unknown_action_lists_the_known_ones() -> None:
    with pytest.raises(ActionError) as caught:
        find("nonsense")
    assert "ssh-host-keys" in str(caught.value.hint)


def pipe_with(data: bytes) -> int:
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    return read


def event(token: bytes) -> bytes:
    made = ForkEvent(
        generation=7,
        token=token,
        kind=Kind.LIVE,
        edges=("kmsg",),
        detected_at_ns=1,
        boottime_ns=1,
        identity=Identity(policy=IdentityPolicy.ROTATE, reason="test"),
    )
    return json.dumps(made.to_json()).encode()


def hostname_of(root: Path, environment: dict[str, str], stdin: int, argv: tuple[str, ...] = ()) -> tuple[int, str]:
    """Runs the hostname action, which shows the token that it was given."""
    (root / "etc").mkdir(exist_ok=True)
    code = main(
        "hostname",
        [*argv, f"--root={root}"],
        settings={"Template": "clone-%8t"},
        environment=environment,
        stdin=stdin,
    )
    path = root / "etc/hostname"
    return code, path.read_text().strip() if path.exists() else ""


def test_a_hook_gets_its_event_from_stdin(tmp_path: Path) -> None:
    stdin = pipe_with(event(bytes.fromhex("abcd" * 8)))
    assert hostname_of(tmp_path, {"VMFORK_GENERATION": "7"}, stdin) == (0, "clone-abcdabcd")


def test_the_token_of_the_environment_serves_where_there_is_no_event(tmp_path: Path) -> None:
    environment = {"VMFORK_GENERATION": "7", "VMFORK_FORK_TOKEN": TOKEN.hex()}
    assert hostname_of(tmp_path, environment, pipe_with(b"")) == (0, "clone-00010203")


def test_run_by_hand_an_open_pipe_on_stdin_is_not_waited_for(tmp_path: Path) -> None:
    read, write = os.pipe()
    try:
        assert hostname_of(tmp_path, {"VMFORK_FORK_TOKEN": TOKEN.hex()}, read) == (0, "clone-00010203")
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("hostile", [b"{", b"[]", b'{"generation": "x"}', b"\xff", b"[" * 60_000])
def test_a_broken_event_is_one_line_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hostile: bytes
) -> None:
    assert hostname_of(tmp_path, {"VMFORK_GENERATION": "7"}, pipe_with(hostile))[0] == 1
    told = capsys.readouterr().err
    assert told.startswith("error: event on stdin")
    assert "Traceback" not in told


@pytest.mark.parametrize(("environment", "argv"), [({"VMFORK_DRY_RUN": "1"}, ()), ({}, ("--dry-run",))])
def test_a_dry_run_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], environment: dict[str, str], argv: tuple[str, ...]
) -> None:
    with open(os.devnull, "rb") as nothing:
        assert hostname_of(tmp_path, environment, nothing.fileno(), argv) == (0, "")
    assert "would set the host name to clone-" in capsys.readouterr().out


def test_the_environment_of_a_hook_may_keep_the_identity(tmp_path: Path) -> None:
    with open(os.devnull, "rb") as nothing:
        assert hostname_of(tmp_path, {"VMFORK_IDENTITY": "keep"}, nothing.fileno()) == (77, "")


def test_settings_come_from_the_configuration_of_the_hook(tmp_path: Path) -> None:
    directory = tmp_path / "etc/vmfork"
    directory.mkdir(parents=True)
    (directory / "vmfork.conf").write_text("[Hook 30-hostname]\nTemplate=from-file\n")
    with open(os.devnull, "rb") as nothing:
        assert main("hostname", [f"--root={tmp_path}"], environment={}, stdin=nothing.fileno()) == 0
    assert (tmp_path / "etc/hostname").read_text() == "from-file\n"


def test_every_key_of_an_action_is_in_the_table_under_its_hook() -> None:
    for action in all_actions():
        for key in action.keys:
            assert key in settings.HOOK_OWN
            assert key.section == f"Hook {action.hook}"


def test_every_key_of_the_table_belongs_to_an_action() -> None:
    used = {key for action in all_actions() for key in action.keys}
    assert {row for row in settings.HOOK_OWN if row not in used} == set()


def test_the_default_of_every_key_can_be_parsed() -> None:
    for row in settings.HOOK_OWN:
        row.parse(row.default)


def test_a_broken_value_gives_the_default(tmp_path: Path) -> None:
    assert prepared(tmp_path, settings={"ThresholdMs": "soon"}).context.get(settings.CLOCK_THRESHOLD_MS) == 100


def test_every_action_has_its_hook_in_the_one_form_that_needs_no_exec() -> None:
    for action in all_actions():
        script = HOOKS / action.hook
        assert script.read_text() == f'#!/bin/sh\nexec vmforkctl action {action.name} "$@"\n'
        assert script.stat().st_mode & 0o7777 == 0o755


def test_no_hook_is_without_an_action() -> None:
    assert {path.name for path in HOOKS.glob("[0-9]*")} == {action.hook for action in all_actions()}


def test_phases_are_those_of_the_hook_contract() -> None:
    assert [phase.value for phase in Phase] == ["after-fork", "before-snapshot", "after-snapshot"]
