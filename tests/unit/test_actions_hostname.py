# SPDX-License-Identifier: Apache-2.0
"""A new host name, on a guest in a directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.actions import TOKEN, prepared, recorder, tree, write
from vmfork.actions import hostname, perform
from vmfork.errors import ActionError

HOSTS = "127.0.0.1 localhost\n127.0.1.1\told.example.org old # own\n10.0.0.5 old\n::1 localhost ip6-localhost\n"


def test_without_configuration_the_action_is_skipped(tmp_path: Path) -> None:
    assert perform(hostname.ACTION, prepared(tmp_path).context) == 77


@pytest.mark.parametrize(
    ("template", "wanted"),
    [("web-%8t", "web-00010203"), ("%t", TOKEN.hex()), ("x%2ty.example.org", "x00y.example.org")],
)
def test_a_template_takes_digits_of_the_token(template: str, wanted: str) -> None:
    assert hostname.expand(template, TOKEN) == wanted


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", "a b", "a..b", "a_b", "ä", "x" * 64, "/etc", "a" * 33 + "." + "b" * 33]
)
def test_what_is_no_host_name_is_refused(name: str) -> None:
    with pytest.raises(ActionError):
        hostname.check_name(name)


def test_name_and_own_lines_of_hosts_are_new(tmp_path: Path) -> None:
    write(tmp_path / "etc/hostname", "old\n")
    write(tmp_path / "etc/hosts", HOSTS)
    assert perform(hostname.ACTION, prepared(tmp_path, settings={"Template": "new-%4t"}).context) == 0
    assert (tmp_path / "etc/hostname").read_text() == "new-0001\n"
    assert (tmp_path / "etc/hosts").read_text() == HOSTS.replace(
        "127.0.1.1\told.example.org old", "127.0.1.1\tnew-0001.example.org new-0001"
    )


def test_a_name_that_looks_like_an_address_does_not_rename_addresses() -> None:
    assert hostname.renamed_hosts("127.0.1.1 127 x\n", "127", "new") == "127.0.1.1 new x\n"


def test_the_name_localhost_is_never_renamed() -> None:
    assert hostname.renamed_hosts("127.0.0.1 localhost\n", "localhost", "new") == "127.0.0.1 localhost\n"


def test_a_second_run_for_the_same_fork_changes_nothing_more(tmp_path: Path) -> None:
    write(tmp_path / "etc/hosts", HOSTS)
    write(tmp_path / "etc/hostname", "old\n")
    for _ in range(2):
        perform(hostname.ACTION, prepared(tmp_path, settings={"Template": "new-%4t"}).context)
    assert "new-0001.example.org new-0001" in (tmp_path / "etc/hosts").read_text()


def test_a_command_gives_the_name_and_is_told_the_token(tmp_path: Path) -> None:
    script = write(tmp_path / "namer", "#!/bin/sh\necho host-$VMFORK_FORK_TOKEN | cut -c1-9\n", mode=0o755)
    (tmp_path / "etc").mkdir()
    assert perform(hostname.ACTION, prepared(tmp_path, settings={"Command": str(script)}).context) == 0
    assert (tmp_path / "etc/hostname").read_text() == "host-0001\n"


@pytest.mark.parametrize("script", ["exit 1", "true", "echo two words", "echo bad_name"])
def test_a_command_without_a_good_name_is_a_failure(tmp_path: Path, script: str) -> None:
    write(tmp_path / "etc/hostname", "old\n")
    recorder(tmp_path / "bin", "namer", script=script)
    assert perform(hostname.ACTION, prepared(tmp_path, settings={"Command": f"{tmp_path}/bin/namer"}).context) == 1
    assert (tmp_path / "etc/hostname").read_text() == "old\n"


def test_a_dry_run_neither_writes_nor_runs_the_command(tmp_path: Path) -> None:
    calls = recorder(tmp_path / "bin", "namer", script="echo new")
    before = tree(tmp_path)
    run = prepared(tmp_path, settings={"Command": f"{tmp_path}/bin/namer"}, dry_run=True)
    assert perform(hostname.ACTION, run.context) == 0
    assert not calls.exists()
    assert tree(tmp_path) == before
