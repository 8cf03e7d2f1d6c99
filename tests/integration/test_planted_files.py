# SPDX-License-Identifier: Apache-2.0
"""Devices, FIFOs, sockets and directories in the place of what vmforkd publishes, before its start and meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.tools import need_root
from torture.liveguest import LiveGuest
from vmfork.page import read_page

Plant = Callable[[Path], None]
_TARGET = "../run/vmfork/sysgenid"


@pytest.fixture
def live() -> Iterator[LiveGuest]:
    need_root()
    with LiveGuest("guest") as made:
        yield made


def _file(path: Path) -> None:
    path.write_bytes(b"precious")


def _device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))


def _disk(path: Path) -> None:
    os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(7, 0))


def _directory(path: Path) -> None:
    path.mkdir()
    (path / "precious").touch()


def _socket(path: Path) -> None:
    # By a short name: a socket's address has room for 107 bytes.
    with socket.socket(socket.AF_UNIX) as sock, contextlib.chdir(path.parent):
        sock.bind(path.name)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.symlink_to("/run/vmfork/sysgenid")


def looks(path: Path) -> tuple[object, ...]:
    """What a file is, and what it holds."""
    status = path.lstat()
    content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
    return status.st_ino, status.st_mode, status.st_uid, status.st_rdev, status.st_mtime_ns, content


IN_PLACE_OF_SYSGENID = [_file, _device, _disk, _directory, _socket, _fifo, _link]


@pytest.mark.parametrize("plant", IN_PLACE_OF_SYSGENID)
def test_whatever_stands_in_the_place_of_sysgenid_is_left_alone_and_named(live: LiveGuest, plant: Plant) -> None:
    place = Path(live.guest.paths.dev_sysgenid)
    plant(place)
    before = looks(place)
    live.configure("[Publish]\nSysGenId=yes\n")
    live.start()
    assert live.problems() == [f"SysGenId=yes, and yet it is not offered: {place}: is not ours and is left alone"]
    value = live.fork()
    live.until(lambda: live.is_written(2, value), "the fork settled")
    live.stop()
    assert looks(place) == before


@pytest.mark.parametrize("plant", IN_PLACE_OF_SYSGENID)
def test_what_is_put_in_the_place_of_sysgenid_meanwhile_is_left_alone(live: LiveGuest, plant: Plant) -> None:
    place = Path(live.guest.paths.dev_sysgenid)
    live.configure("[Publish]\nSysGenId=yes\n")
    live.start()
    live.until(place.is_symlink, "it is offered")
    place.unlink()
    plant(place)
    before = looks(place)
    value = live.fork()
    live.until(lambda: live.is_written(2, value), "the fork settled")
    live.reload()
    assert live.problems() == [f"SysGenId=yes, and yet it is not offered: {place}: is not ours and is left alone"]
    live.stop()
    assert looks(place) == before
    assert not Path(live.guest.paths.sysgenid).exists()


def test_a_link_to_sysgenid_that_somebody_removed_comes_back_with_a_reload(live: LiveGuest) -> None:
    place = Path(live.guest.paths.dev_sysgenid)
    live.configure("[Publish]\nSysGenId=yes\n")
    live.start()
    place.unlink()
    live.reload()
    assert os.readlink(place) == _TARGET
    assert live.problems() == []


@pytest.mark.parametrize("reason", ["switched off", "no live edge"])
def test_a_killed_daemons_sysgenid_is_not_left_to_those_who_would_believe_it(live: LiveGuest, reason: str) -> None:
    place = Path(live.guest.paths.dev_sysgenid)
    live.configure("[Publish]\nSysGenId=yes\n")
    live.start()
    live.until(place.is_symlink, "it is offered")
    assert live.process is not None
    live.process.kill()
    live.process.wait()
    if reason == "switched off":
        live.configure("[Publish]\nSysGenId=no\n")
    else:
        live.guest.unbind_driver()
    live.start()
    live.until(lambda: not os.path.lexists(place), "the link is gone")
    live.until(lambda: not os.path.lexists(live.guest.paths.sysgenid), "the file is gone")


@pytest.mark.parametrize("plant", [_device, _disk, _socket])
def test_a_device_or_a_socket_in_the_place_of_the_page_is_replaced(live: LiveGuest, plant: Plant) -> None:
    page = Path(live.guest.paths.generation_page)
    plant(page)
    live.start()
    assert stat.S_ISREG(page.lstat().st_mode)
    assert read_page(str(page)).generation == 1
    value = live.fork()
    live.until(lambda: live.is_written(2, value), "the fork settled")


@pytest.mark.parametrize(
    ("name", "plant"),
    [("generation", _directory)]
    + [("io.vmfork", plant) for plant in (_file, _device, _disk, _directory, _fifo, _link)],
)
def test_what_nobody_can_replace_safely_is_named_and_costs_no_fork(live: LiveGuest, name: str, plant: Plant) -> None:
    live.start()
    live.stop()
    place = Path(live.guest.paths.run_public, name)
    place.unlink(missing_ok=True)
    plant(place)
    before = looks(place)
    value = live.fork()
    assert live.launch().wait(20) == 1
    assert f"{place}: " in live.last_words()
    assert looks(place) == before
    shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()
    live.start()
    live.until(lambda: live.is_written(2, value), "the fork settled")
