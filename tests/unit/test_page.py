# SPDX-License-Identifier: Apache-2.0
"""The generation page: its layout in bytes, its reader's refusals, and a writer that keeps one inode."""

from __future__ import annotations

import logging
import mmap
import os
import re
import shlex
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vmfork
from support.runningdaemon import environment
from support.tools import need, need_ptrace, need_root
from torture.injection import Injection, strace
from vmfork.errors import InputError, Unavailable
from vmfork.page import (
    DETECTION_EVENT,
    DETECTION_NONE,
    DETECTION_OFFSET,
    DETECTION_TIMER,
    PAGE_SIZE,
    STATE_FAILED,
    STATE_REACTING,
    STATE_SETTLED,
    PageContent,
    PageWriter,
    read_page,
)

TOKEN = bytes(range(16))
UNITS = Path(__file__).resolve().parents[2] / "units"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run/vmfork/generation")


def patch(path: str, offset: int, data: bytes) -> None:
    os.chmod(path, 0o644)
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
    os.chmod(path, 0o444)


def test_a_new_page_has_the_documented_bytes(path: str) -> None:
    PageWriter(path).close()
    assert Path(path).read_bytes() == (b"VMFK" + struct.pack("<IIIQ", 1, 0, 0, 1)).ljust(PAGE_SIZE, b"\0")


def test_a_published_fork_has_the_documented_bytes(path: str) -> None:
    with PageWriter(path) as writer:
        writer.publish(
            generation=0x1122334455667788,
            token=TOKEN,
            detected_at_ns=0x0102030405060708,
            boottime_ns=0x1112131415161718,
            detection=DETECTION_EVENT,
        )
    raw = Path(path).read_bytes()
    assert raw[:16] == b"VMFK" + struct.pack("<III", 1, 2, STATE_REACTING)
    assert raw[16:24] == bytes.fromhex("8877665544332211")
    assert raw[24:40] == struct.pack("<QQ", 0x0102030405060708, 0x1112131415161718)
    assert raw[40:60] == TOKEN + struct.pack("<I", DETECTION_EVENT)
    assert raw[60:] == bytes(PAGE_SIZE - 60)


def test_the_reader_returns_what_was_published(path: str) -> None:
    with PageWriter(path) as writer:
        writer.publish(generation=5, token=TOKEN, detected_at_ns=6, boottime_ns=7, detection=DETECTION_TIMER)
        expected = PageContent(STATE_REACTING, 5, 6, 7, TOKEN, DETECTION_TIMER)
        assert read_page(path) == writer.current == expected


def test_state_and_detection_change_alone(path: str) -> None:
    with PageWriter(path) as writer:
        writer.publish(generation=5, token=TOKEN, detected_at_ns=6, boottime_ns=7)
        writer.set_state(STATE_FAILED)
        writer.set_detection(DETECTION_EVENT)
        assert read_page(path) == PageContent(STATE_FAILED, 5, 6, 7, TOKEN, DETECTION_EVENT)
        writer.publish(generation=6, token=TOKEN, detected_at_ns=6, boottime_ns=7, state=STATE_SETTLED)
        assert read_page(path) == PageContent(STATE_SETTLED, 6, 6, 7, TOKEN, DETECTION_EVENT)


def test_a_page_is_readable_by_all_and_writable_by_none(path: str) -> None:
    previous = os.umask(0o077)
    try:
        PageWriter(path).close()
    finally:
        os.umask(previous)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o444


def test_content_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        PageContent().generation = 7


def test_a_token_of_another_size_is_refused(path: str) -> None:
    with PageWriter(path) as writer, pytest.raises(ValueError, match="16 bytes"):
        writer.publish(generation=2, token=b"short", detected_at_ns=0, boottime_ns=0)


def test_no_page_is_unavailable(path: str) -> None:
    with pytest.raises(Unavailable, match="generation"):
        read_page(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"VMFK", b"\0" * PAGE_SIZE, b"VMFK" + bytes(PAGE_SIZE - 4)],
    ids=["empty", "short", "zero", "abi-0"],
)
def test_a_file_that_is_no_page_is_named(path: str, content: bytes) -> None:
    Path(path).parent.mkdir(parents=True)
    Path(path).write_bytes(content)
    with pytest.raises(InputError, match="generation"):
        read_page(path)


def test_a_directory_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        read_page(str(tmp_path))


def test_a_newer_abi_version_is_read(path: str) -> None:
    PageWriter(path, initial_generation=9).close()
    patch(path, 4, struct.pack("<I", 2))
    assert read_page(path).generation == 9


def test_a_page_left_odd_is_reported_within_a_bounded_time(path: str) -> None:
    PageWriter(path).close()
    patch(path, 8, struct.pack("<I", 1))
    begin = time.monotonic()
    with pytest.raises(InputError, match="never finished"):
        read_page(path)
    assert time.monotonic() - begin < 5


def test_a_page_left_odd_is_repaired_in_place(path: str) -> None:
    with PageWriter(path) as writer:
        writer.publish(generation=5, token=TOKEN, detected_at_ns=6, boottime_ns=7)
    inode = os.stat(path).st_ino
    patch(path, 8, struct.pack("<I", 3))
    with PageWriter(path) as writer:
        assert writer.torn
        assert writer.current.generation == 5
        assert read_page(path) == writer.current
    assert os.stat(path).st_ino == inode


def test_a_sound_page_is_taken_over_without_a_write(path: str) -> None:
    with PageWriter(path) as writer:
        writer.publish(generation=5, token=TOKEN, detected_at_ns=6, boottime_ns=7)
    before = Path(path).read_bytes()
    with PageWriter(path, initial_generation=3) as writer:
        assert not writer.torn
        assert writer.current.generation == 5
    assert Path(path).read_bytes() == before


def test_mapped_readers_see_updates_of_the_next_writer(path: str) -> None:
    PageWriter(path).close()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), PAGE_SIZE, prot=mmap.PROT_READ) as mapped:
        with PageWriter(path) as writer:
            writer.publish(generation=7, token=TOKEN, detected_at_ns=0, boottime_ns=0)
        assert struct.unpack_from("<Q", mapped, 16) == (7,)


def test_the_seq_number_wraps(path: str) -> None:
    PageWriter(path).close()
    patch(path, 8, struct.pack("<I", 0xFFFFFFFE))
    with PageWriter(path) as writer:
        writer.publish(generation=7, token=TOKEN, detected_at_ns=0, boottime_ns=0)
        assert read_page(path).generation == 7
        assert Path(path).read_bytes()[8:12] == bytes(4)


def test_garbage_is_written_anew_in_place(path: str) -> None:
    PageWriter(path).close()
    inode = os.stat(path).st_ino
    patch(path, 0, b"\xff" * PAGE_SIZE)
    with PageWriter(path, initial_generation=4) as writer:
        assert read_page(path) == writer.current == PageContent(generation=4)
    assert os.stat(path).st_ino == inode
    assert Path(path).read_bytes()[60:] == bytes(PAGE_SIZE - 60)


@pytest.mark.parametrize("size", [0, 20, 60, 4095])
def test_a_short_file_is_made_whole_in_place(path: str, size: int) -> None:
    PageWriter(path, initial_generation=8).close()
    inode = os.stat(path).st_ino
    os.truncate(path, size)
    with PageWriter(path, initial_generation=8) as writer:
        assert writer.current.generation == 8
    assert (os.stat(path).st_ino, os.stat(path).st_size) == (inode, PAGE_SIZE)
    assert read_page(path).generation == 8


def test_a_longer_file_is_never_made_shorter(path: str) -> None:
    PageWriter(path).close()
    os.truncate(path, 2 * PAGE_SIZE)
    PageWriter(path).close()
    assert os.stat(path).st_size == 2 * PAGE_SIZE


def plant_link(path: Path) -> None:
    (path.parent / "elsewhere").write_bytes(b"mine")
    path.symlink_to(path.parent / "elsewhere")


def plant_second_name(path: Path) -> None:
    PageWriter(str(path)).close()
    os.link(path, path.parent / "second")


def plant_writable(path: Path) -> None:
    PageWriter(str(path)).close()
    path.chmod(0o664)


@pytest.mark.parametrize("plant", [plant_link, plant_second_name, plant_writable, os.mkfifo])
def test_a_planted_file_is_replaced_and_that_is_logged(
    path: str, plant: object, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(plant)
    Path(path).parent.mkdir(parents=True)
    plant(Path(path))
    planted = os.lstat(path).st_ino
    with caplog.at_level(logging.WARNING), PageWriter(path, initial_generation=6) as writer:
        assert writer.current.generation == 6
    found = os.lstat(path)
    assert stat.S_ISREG(found.st_mode)
    assert (found.st_ino != planted, found.st_nlink, stat.S_IMODE(found.st_mode)) == (True, 1, 0o444)
    assert "replaced" in caplog.text
    elsewhere = Path(path).parent / "elsewhere"
    assert not elsewhere.exists() or elsewhere.read_bytes() == b"mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_file_of_somebody_else_is_replaced(path: str) -> None:
    PageWriter(path).close()
    os.chown(path, 65534, 65534)
    PageWriter(path, initial_generation=6).close()
    assert os.stat(path).st_uid == 0
    assert read_page(path).generation == 6


def test_a_directory_in_the_place_of_the_page_is_an_error(path: str) -> None:
    Path(path).mkdir(parents=True)
    with pytest.raises(InputError, match="generation"):
        PageWriter(path)


def test_leftovers_of_a_killed_creation_do_not_matter(path: str) -> None:
    Path(path).parent.mkdir(parents=True)
    (Path(path).parent / ".generation.new").write_bytes(b"half")
    PageWriter(path).close()
    assert read_page(path).generation == 1
    assert os.listdir(Path(path).parent) == ["generation"]


WRITER = """
import sys
from vmfork.page import PageWriter
with PageWriter(sys.argv[1]) as writer:
    print("ready", flush=True)
    while True:
        n = writer.current.generation + 1
        writer.publish(generation=n, token=n.to_bytes(8, "little") * 2, detected_at_ns=n, boottime_ns=n)
"""


def writing(path: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(vmfork.__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", WRITER, path], env=environment, stdout=subprocess.PIPE)


def test_a_barrier_that_the_kernel_refuses_leaves_a_page_that_can_be_read(path: str) -> None:
    need_ptrace()
    PageWriter(path).close()
    program = (
        "import sys; from vmfork.page import PageWriter; "
        "PageWriter(sys.argv[1]).publish(generation=7, token=bytes(16), detected_at_ns=1, boottime_ns=1)"
    )
    refusing = strace(injections=[Injection(call="pread64", when="1+", fault="error=EIO", path=path)])
    run = subprocess.run(
        [*refusing, sys.executable, "-c", program, path], env=environment(), capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert read_page(path).generation == 7


# A page with a hole, in a /run that has no room left to fill it.
_FULL = """
import os, sys
from vmfork.errors import InputError
from vmfork.page import PageWriter
path = sys.argv[1] + "/generation"
PageWriter(path).close()
os.truncate(path, 0)
os.truncate(path, int(sys.argv[2]))
try:
    with open(sys.argv[1] + "/full", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
except OSError:
    pass
try:
    PageWriter(path)
except InputError as error:
    print(error.problem)
"""


@pytest.mark.parametrize("size", [0, PAGE_SIZE])
def test_a_page_without_room_is_an_error_and_not_the_end_of_the_writer(tmp_path: Path, size: int) -> None:
    need_root()
    need("unshare", package="util-linux")
    need("mount", package="mount")
    script = 'mount -t tmpfs -o size=64k none "$1" && exec "$2" -c "$3" "$1" "$4"'
    run = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "-", tmp_path, sys.executable, _FULL, str(size)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "No space left on device" in run.stdout


def test_a_copy_is_never_torn_while_another_process_writes(path: str) -> None:
    with writing(path) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            seen: set[int] = set()
            end = time.monotonic() + 30
            # As long as it takes on a busy machine; a writer that never pauses may also keep a reader out for a while.
            while len(seen) <= 10 and time.monotonic() < end:
                try:
                    copy = read_page(path)
                except InputError as error:
                    assert "never finished" in error.problem  # noqa: PT017
                    continue
                if copy.generation > 1:
                    assert copy.token == copy.generation.to_bytes(8, "little") * 2
                    assert copy.detected_at_ns == copy.boottime_ns == copy.generation
                seen.add(copy.generation)
            assert len(seen) > 10
        finally:
            writer.kill()


def test_a_writer_killed_anywhere_leaves_a_page_that_the_next_one_repairs(path: str) -> None:
    last = 0
    for _ in range(10):
        with writing(path) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            writer.send_signal(signal.SIGKILL)
        with PageWriter(path) as repaired:
            assert repaired.current.generation >= last
            last = repaired.current.generation
            assert read_page(path) == repaired.current


@pytest.mark.parametrize("unit", ["vmforkd.service", "vmfork-unwatched.service"])
def test_a_unit_of_a_dead_daemon_changes_the_field_detection_and_no_other(unit: str, tmp_path: Path) -> None:
    (command,) = re.findall(r"^Exec\w+=[-+]*(/bin/dd .*)$", (UNITS / unit).read_text(), re.M)
    page = tmp_path / "generation"
    words = shlex.split(command.replace("/run/vmfork/generation", str(page)))
    assert subprocess.run(words, check=False, stderr=subprocess.DEVNULL).returncode != 0
    assert not page.exists()
    with PageWriter(str(page)) as writer:
        writer.publish(
            generation=7, token=TOKEN, detected_at_ns=8, boottime_ns=9, state=STATE_FAILED, detection=DETECTION_EVENT
        )
    before = page.read_bytes()
    page.chmod(0o644)
    subprocess.run(words, check=True)
    assert read_page(str(page)).detection == DETECTION_NONE
    after = page.read_bytes()
    assert after[:DETECTION_OFFSET] + after[DETECTION_OFFSET + 4 :] == (
        before[:DETECTION_OFFSET] + before[DETECTION_OFFSET + 4 :]
    )
