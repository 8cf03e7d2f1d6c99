# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.tools import need_root
from vmfork.trust import Inspector, Untrusted


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "etc" / "hooks.d").mkdir(parents=True)
    hook = tmp_path / "etc" / "hooks.d" / "10-x"
    hook.write_text("#!/bin/sh\n")
    hook.chmod(0o755)
    return tmp_path


@pytest.fixture
def inspector(root: Path) -> Iterator[Inspector]:
    with Inspector(str(root)) as inspector:
        yield inspector


def refusal(inspector: Inspector, path: Path) -> Untrusted:
    with pytest.raises(Untrusted) as caught:
        inspector.check_program(str(path))
    return caught.value


def test_a_plain_file_in_plain_directories_is_trusted(inspector: Inspector, root: Path) -> None:
    assert inspector.check_program(f"{root}/etc/hooks.d/10-x").path == f"{root}/etc/hooks.d/10-x"


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_a_file_that_others_may_write_is_refused(inspector: Inspector, root: Path, mode: int) -> None:
    path = root / "etc/hooks.d/10-x"
    path.chmod(mode)
    error = refusal(inspector, path)
    assert str(path) in str(error)
    assert error.hint == f"chmod go-w {path}"


@pytest.mark.parametrize("part", ["etc", "etc/hooks.d"])
def test_a_directory_on_the_way_that_others_may_write_is_named(inspector: Inspector, root: Path, part: str) -> None:
    (root / part).chmod(0o1777)
    assert refusal(inspector, root / "etc/hooks.d/10-x").hint == f"chmod go-w {root / part}"


@pytest.mark.parametrize("mode", [0o4755, 0o2755])
def test_setuid_and_setgid_are_refused(inspector: Inspector, root: Path, mode: int) -> None:
    path = root / "etc/hooks.d/10-x"
    path.chmod(mode)
    assert refusal(inspector, path).hint == f"chmod ug-s {path}"


def test_only_regular_files_are_programs(inspector: Inspector, root: Path) -> None:
    os.mkfifo(root / "etc/hooks.d/20-fifo", 0o644)
    refusal(inspector, root / "etc/hooks.d/20-fifo")
    refusal(inspector, root / "etc/hooks.d")


@pytest.mark.parametrize("part", ["etc", "etc/hooks.d", "etc/hooks.d/10-x"])
def test_what_belongs_to_a_user_is_refused(inspector: Inspector, root: Path, part: str) -> None:
    need_root()
    os.chown(root / part, 12345, -1)
    error = refusal(inspector, root / "etc/hooks.d/10-x")
    assert "uid 12345" in str(error)
    assert error.hint == f"chown root {root / part}"


def test_a_link_is_walked_to_a_path_without_links(inspector: Inspector, root: Path) -> None:
    (root / "opt").mkdir()
    (root / "opt/real").write_text("x")
    (root / "opt/real").chmod(0o755)
    (root / "etc/relative").symlink_to("../opt")
    (root / "etc/hooks.d/20-absolute").symlink_to("/etc/relative/real")
    assert inspector.check_program(f"{root}/etc/hooks.d/20-absolute").path == f"{root}/opt/real"


def test_the_target_of_a_link_is_checked_with_its_directories(inspector: Inspector, root: Path) -> None:
    (root / "home").mkdir()
    (root / "home").chmod(0o777)
    (root / "home/script").write_text("x")
    (root / "etc/hooks.d/20-link").symlink_to("../../home/script")
    assert refusal(inspector, root / "etc/hooks.d/20-link").hint == f"chmod go-w {root}/home"


def test_a_link_of_a_user_is_refused(inspector: Inspector, root: Path) -> None:
    need_root()
    (root / "etc/hooks.d/20-link").symlink_to("10-x")
    os.lchown(root / "etc/hooks.d/20-link", 12345, -1)
    assert "chown -h root" in str(refusal(inspector, root / "etc/hooks.d/20-link").hint)


def test_links_in_a_circle_are_refused(inspector: Inspector, root: Path) -> None:
    (root / "etc/hooks.d/20-a").symlink_to("20-b")
    (root / "etc/hooks.d/20-b").symlink_to("20-a")
    refusal(inspector, root / "etc/hooks.d/20-a")


def test_dots_cannot_lead_out_of_the_root(inspector: Inspector, root: Path) -> None:
    (root / "etc/hooks.d/20-out").symlink_to("../../../../../../../../../bin/sh")
    with pytest.raises(FileNotFoundError):
        inspector.check_program(f"{root}/etc/hooks.d/20-out")


def test_a_file_cannot_be_a_directory_on_the_way(inspector: Inspector, root: Path) -> None:
    with pytest.raises(NotADirectoryError):
        inspector.check(f"{root}/etc/hooks.d/10-x/deeper")


def test_the_running_system_trusts_root_alone(tmp_path: Path) -> None:
    with Inspector() as inspector:
        assert inspector.check_program("/usr/bin/env").path.startswith("/usr/bin/")
        with pytest.raises(Untrusted, match="/tmp"):
            inspector.check("/tmp/whatever")


def test_no_descriptor_is_left(root: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with Inspector(str(root)) as inspector:
        inspector.check_program(f"{root}/etc/hooks.d/10-x")
        inspector.check_program(f"{root}/etc/hooks.d/10-x")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_root_directory_that_others_may_write_is_refused_again_and_again(tmp_path: Path) -> None:
    """Linux 7.3 makes the root of an initramfs with mode 1777."""
    need_root()
    (tmp_path / "hook").write_text("x")
    tmp_path.chmod(0o1777)
    child = os.fork()
    if child == 0:
        refused = 0
        os.chroot(tmp_path)
        with Inspector() as inspector:
            for _ in range(2):
                try:
                    inspector.check("/hook")
                except Untrusted:
                    refused += 1
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
