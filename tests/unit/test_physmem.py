# SPDX-License-Identifier: Apache-2.0
"""Physical memory: a sparse file below a root prefix, a character device, and every way of being refused."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

from support.privilege import unprivileged
from support.tools import need_root
from vmfork.errors import AbsentError, InputError
from vmfork.paths import Paths
from vmfork.truths.physmem import PhysicalMemory, explain

PAGE = os.sysconf("SC_PAGESIZE")


def memory(root: Path) -> PhysicalMemory:
    return PhysicalMemory(Paths(str(root)))


def device(root: Path, target: str) -> PhysicalMemory:
    """Memory whose file is this character device."""
    (root / "dev").mkdir()
    (root / "dev/mem").symlink_to(target)
    return memory(root)


def put(root: Path, address: int, data: bytes) -> Path:
    path = root / "dev/mem"
    path.parent.mkdir(exist_ok=True)
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.seek(address)
        file.write(data)
    return path


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# A file below a root prefix.


@pytest.mark.parametrize("address", [0, 40, 0xDFFF0, PAGE - 8, 5 * 2**30 + 3])
def test_bytes_are_read_from_their_address_in_a_sparse_file(tmp_path: Path, address: int) -> None:
    put(tmp_path, address, b"sixteen bytes...and more")
    assert memory(tmp_path).read(address, 16) == b"sixteen bytes..."


def test_a_file_written_in_place_is_seen(tmp_path: Path) -> None:
    put(tmp_path, 100, b"a" * 16)
    reader = memory(tmp_path)
    assert reader.read(100, 16) == b"a" * 16
    put(tmp_path, 100, b"b" * 16)
    assert reader.read(100, 16) == b"b" * 16


def test_a_file_replaced_by_rename_is_seen(tmp_path: Path) -> None:
    path = put(tmp_path, 100, b"a" * 16)
    reader = memory(tmp_path)
    assert reader.read(100, 16) == b"a" * 16
    new = tmp_path / "new"
    new.write_bytes(bytes(100) + b"b" * 16)
    new.rename(path)
    assert reader.read(100, 16) == b"b" * 16


def test_a_read_beyond_the_end_is_absent_and_never_a_signal(tmp_path: Path) -> None:
    path = put(tmp_path, 0, bytes(PAGE))
    reader = memory(tmp_path)
    assert reader.read(PAGE - 16, 16) == bytes(16)
    for address in (PAGE - 15, PAGE, 2**40):
        with pytest.raises(AbsentError, match=r"dev/mem ends before 0x"):
            reader.read(address, 16)
    os.truncate(path, 8)
    with pytest.raises(AbsentError, match="ends before"):
        reader.read(0, 16)


def test_a_file_that_goes_and_comes_back_is_absent_in_between(tmp_path: Path) -> None:
    path = put(tmp_path, 0, b"a" * 16)
    reader = memory(tmp_path)
    reader.read(0, 16)
    path.unlink()
    with pytest.raises(AbsentError, match="no /dev/mem"):
        reader.read(0, 16)
    put(tmp_path, 0, b"b" * 16)
    assert reader.read(0, 16) == b"b" * 16


def test_reading_on_and_on_keeps_one_descriptor_and_closing_none(tmp_path: Path) -> None:
    path = put(tmp_path, 0, bytes(64))
    before = descriptors()
    reader = memory(tmp_path)
    for _ in range(20):
        reader.read(0, 16)
        path.rename(tmp_path / "old")
        put(tmp_path, 0, bytes(64))
    assert descriptors() == before + 1
    reader.close()
    assert descriptors() == before


@pytest.mark.parametrize(("address", "size"), [(-1, 16), (0, 0), (0, 4097), (2**52 - 15, 16), (2**64, 16)])
def test_what_is_no_memory_is_refused(tmp_path: Path, address: int, size: int) -> None:
    put(tmp_path, 0, bytes(8192))
    with pytest.raises(InputError, match="are no memory"):
        memory(tmp_path).read(address, size)


def test_a_directory_and_a_fifo_are_no_memory(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/mem").mkdir()
    with pytest.raises(AbsentError, match="neither a device nor a file"):
        memory(tmp_path).read(0, 16)
    (tmp_path / "dev/mem").rmdir()
    os.mkfifo(tmp_path / "dev/mem")
    with pytest.raises(AbsentError, match="neither a device nor a file"):
        memory(tmp_path).read(0, 16)


# A character device, which is mapped.


@pytest.mark.parametrize(("address", "size"), [(0, 16), (PAGE - 8, 16), (3, 16), (0x28, 16), (6, 4), (1, 4096)])
def test_a_device_is_mapped_at_any_alignment(tmp_path: Path, address: int, size: int) -> None:
    assert device(tmp_path, "/dev/zero").read(address, size) == bytes(size)


def test_the_maps_of_a_device_are_kept_and_bounded(tmp_path: Path) -> None:
    reader = device(tmp_path, "/dev/zero")
    before = descriptors()
    for number in range(40):
        reader.read(number * PAGE, 16)
        reader.read(0, 16)
    # Python keeps a descriptor for each map.
    assert descriptors() <= before + 1 + 8
    reader.close()
    assert descriptors() == before


def test_a_device_that_cannot_be_mapped_is_absent(tmp_path: Path) -> None:
    with pytest.raises(AbsentError, match=r"dev/mem: reading memory failed: No such device"):
        device(tmp_path, "/dev/null").read(0, 16)


def test_a_device_node_without_a_driver_means_a_kernel_without_dev_mem(tmp_path: Path) -> None:
    need_root()
    (tmp_path / "dev").mkdir()
    # A major number that no driver has: 240 and up are for local use, and the highest of them is unlikely.
    os.mknod(tmp_path / "dev/mem", 0o20600, os.makedev(254, 2**20 - 1))
    with pytest.raises(AbsentError, match="CONFIG_DEVMEM is off"):
        memory(tmp_path).read(0, 16)


# Being refused.


def test_without_privilege_the_hint_is_to_be_root() -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        put(Path(directory), 0, bytes(64)).chmod(0)
        with unprivileged(), pytest.raises(AbsentError, match="may not be opened") as caught:
            memory(Path(directory)).read(0, 16)
    assert caught.value.hint == "run as root with CAP_SYS_RAWIO"


@pytest.mark.parametrize(
    ("code", "opening", "lockdown", "words", "help_with"),
    [
        (errno.ENOENT, True, "", "CONFIG_DEVMEM", "CONFIG_DEVMEM"),
        (errno.ENXIO, True, "", "CONFIG_DEVMEM", "CONFIG_DEVMEM"),
        (errno.EPERM, True, "none [integrity] confidentiality", "lockdown is in force (integrity)", "Secure Boot"),
        (errno.EPERM, True, "none integrity [confidentiality]", "(confidentiality)", "Secure Boot"),
        (errno.EPERM, True, "[none] integrity confidentiality", "may not be opened", "CAP_SYS_RAWIO"),
        (errno.EPERM, True, "", "may not be opened", "CAP_SYS_RAWIO"),
        (errno.EACCES, True, "none [integrity] confidentiality", "may not be opened", "root"),
        (errno.EPERM, False, "", "IO_STRICT_DEVMEM", "iomem=relaxed"),
    ],
)
def test_a_refusal_is_explained(code: int, opening: bool, lockdown: str, words: str, help_with: str) -> None:
    reason, hint = explain(code, opening=opening, lockdown=lockdown)
    assert words in reason
    assert hint is not None
    assert help_with in hint


@pytest.mark.parametrize("opening", [True, False])
def test_an_unexpected_refusal_keeps_the_systems_own_words(opening: bool) -> None:
    reason, hint = explain(errno.EMFILE, opening=opening)
    assert os.strerror(errno.EMFILE) in reason
    assert hint is None
