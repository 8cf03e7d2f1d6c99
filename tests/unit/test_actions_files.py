# SPDX-License-Identifier: Apache-2.0
"""A replaced file is whole at every instant and keeps what it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.actions import killed_at_step, write
from vmfork.actions import files
from vmfork.errors import ActionError
from vmfork.paths import Paths


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    path = write(tmp_path / "id", "old", mode=0o440)
    assert not files.replace_file(str(path), b"new", mode=0o644)
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o440)


def test_a_new_file_gets_the_mode_that_was_asked_for(tmp_path: Path) -> None:
    files.replace_file(str(tmp_path / "id"), b"new", mode=0o640)
    assert (tmp_path / "id").stat().st_mode & 0o777 == 0o640


def test_nothing_is_left_beside_the_file(tmp_path: Path) -> None:
    files.replace_file(str(tmp_path / "id"), b"new", mode=0o644)
    assert [path.name for path in tmp_path.iterdir()] == ["id"]


def test_a_planted_temporary_link_is_not_followed(tmp_path: Path) -> None:
    victim = write(tmp_path / "victim", "precious")
    Path(files.temporary_name(str(tmp_path / "id"))).symlink_to(victim)
    files.replace_file(str(tmp_path / "id"), b"new", mode=0o644)
    assert victim.read_text() == "precious"


def test_killed_at_every_step_the_file_holds_the_old_or_the_new(tmp_path: Path) -> None:
    path = write(tmp_path / "id", "old")
    step = 1
    while killed_at_step(step, lambda: files.replace_file(str(path), b"new", mode=0o644)):
        assert path.read_text() in ("old", "new")
        step += 1
    assert step > 3
    assert path.read_text() == "new"
    assert [found.name for found in tmp_path.iterdir()] == ["id"]


def test_an_absolute_link_is_taken_below_the_root(tmp_path: Path) -> None:
    write(tmp_path / "data/id", "x")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/id").symlink_to("/data/id")
    assert files.resolve(Paths(str(tmp_path)), f"{tmp_path}/etc/id") == f"{tmp_path}/data/id"


def test_a_loop_of_links_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ActionError, match="symbolic links"):
        files.resolve(Paths(str(tmp_path)), f"{tmp_path}/a")


def test_a_missing_directory_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ActionError, match="nowhere/id"):
        files.replace_file(str(tmp_path / "nowhere/id"), b"new", mode=0o644)
