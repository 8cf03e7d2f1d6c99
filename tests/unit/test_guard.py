# SPDX-License-Identifier: Apache-2.0
"""Guards: one answer for each fork, whoever asks, from the page or from a vmclock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmfork
from support.fakeguest import vmclock_page
from vmfork.page import DETECTION_EVENT, DETECTION_NONE, PAGE_SIZE, PageWriter


class Guest:
    """The page and the vmclock of a guest, changed as a fork changes them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.page_path = str(root / "run/vmfork/generation")
        self.vmclock = root / "dev/vmclock0"

    def fork(self) -> None:
        with PageWriter(self.page_path) as writer:
            writer.publish(
                generation=writer.current.generation + 1,
                token=os.urandom(16),
                detected_at_ns=time.time_ns(),
                boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            )

    def watch(self, detection: int = DETECTION_EVENT) -> None:
        with PageWriter(self.page_path) as writer:
            writer.set_detection(detection)

    def set_vmclock(self, page: bytes, *, in_place: bool = False) -> None:
        self.vmclock.parent.mkdir(exist_ok=True)
        if in_place:
            with self.vmclock.open("r+b") as file:
                file.write(page)
            return
        fresh = self.vmclock.with_name("fresh")
        fresh.write_bytes(page)
        fresh.replace(self.vmclock)


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guest:
    monkeypatch.setenv("VMFORK_ROOT", str(tmp_path))
    return Guest(tmp_path)


@pytest.fixture
def watched(guest: Guest) -> Guest:
    guest.watch()
    return guest


def test_generation_is_the_pages(watched: Guest) -> None:
    assert vmfork.generation() == 1
    watched.fork()
    assert vmfork.generation() == 2


def test_generation_without_a_page_is_unavailable(guest: Guest) -> None:
    with pytest.raises(vmfork.Unavailable):
        vmfork.generation()


def test_generation_of_a_broken_page_is_unavailable(guest: Guest) -> None:
    Path(guest.page_path).parent.mkdir(parents=True)
    Path(guest.page_path).write_bytes(bytes(PAGE_SIZE))
    with pytest.raises(vmfork.Unavailable):
        vmfork.generation()


def test_supported_needs_somebody_who_watches(guest: Guest) -> None:
    assert not vmfork.supported()
    guest.watch(DETECTION_NONE)
    assert not vmfork.supported()
    guest.watch()
    assert vmfork.supported()


def test_a_fork_is_told_once(watched: Guest) -> None:
    guard = vmfork.Guard()
    assert guard.source == "page"
    assert not guard.forked()
    watched.fork()
    assert guard.forked()
    assert not guard.forked()


def test_a_fork_before_the_guard_is_not_told(watched: Guest) -> None:
    watched.fork()
    assert not vmfork.Guard().forked()


def test_each_guard_is_told(watched: Guest) -> None:
    guards = [vmfork.Guard() for _ in range(3)]
    watched.fork()
    assert [guard.forked() for guard in guards] == [True] * 3


def test_a_generation_that_goes_back_is_a_fork_too(watched: Guest) -> None:
    watched.fork()
    guard = vmfork.Guard()
    with PageWriter(watched.page_path) as writer:
        writer.publish(generation=1, token=bytes(16), detected_at_ns=0, boottime_ns=0)
    assert guard.forked()


def test_changes_of_state_and_detection_are_no_fork(watched: Guest) -> None:
    guard = vmfork.Guard()
    with PageWriter(watched.page_path) as writer:
        writer.set_state(2)
        writer.set_detection(1)
    assert not guard.forked()


def test_a_page_that_comes_later_is_opened(guest: Guest) -> None:
    guard = vmfork.Guard()
    assert not guard.forked()
    guest.watch()
    assert not guard.forked()
    guest.fork()
    assert guard.forked()
    assert not guard.forked()


def test_a_fork_before_the_late_page_was_opened_is_told(guest: Guest) -> None:
    guard = vmfork.Guard()
    guest.fork()
    assert guard.forked()
    assert not guard.forked()


def test_a_page_that_is_broken_at_first_is_opened_when_it_is_sound(guest: Guest) -> None:
    Path(guest.page_path).parent.mkdir(parents=True)
    Path(guest.page_path).write_bytes(b"VM")
    guard = vmfork.Guard()
    assert not guard.forked()
    guest.watch()
    assert not guard.forked()
    guest.fork()
    assert guard.forked()


def test_a_new_guard_follows_a_page_that_was_replaced(watched: Guest) -> None:
    vmfork.Guard()
    os.unlink(watched.page_path)
    watched.watch()
    guard = vmfork.Guard()
    watched.fork()
    assert guard.forked()


def test_a_strict_guard_raises_without_a_page(guest: Guest) -> None:
    guard = vmfork.Guard(strict=True)
    with pytest.raises(vmfork.Unavailable):
        guard.forked()


def test_a_strict_guard_raises_when_the_daemon_has_gone_and_only_then(watched: Guest) -> None:
    guard = vmfork.Guard(strict=True)
    assert not guard.forked()
    watched.watch(DETECTION_NONE)
    with pytest.raises(vmfork.Unavailable):
        guard.forked()
    assert not vmfork.Guard().forked()
    watched.watch()
    assert not guard.forked()


def test_a_strict_guard_tells_a_fork_also_when_nobody_watches_any_more(watched: Guest) -> None:
    guard = vmfork.Guard(strict=True)
    watched.fork()
    watched.watch(DETECTION_NONE)
    assert guard.forked()


def test_an_unknown_source_is_refused(guest: Guest) -> None:
    with pytest.raises(ValueError, match="sysgenid"):
        vmfork.Guard("sysgenid")  # type: ignore[arg-type]


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns after every few instructions."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-7)
    yield
    sys.setswitchinterval(usual)


def test_one_of_many_threads_is_told(watched: Guest, restless: None) -> None:
    guard = vmfork.Guard()
    for _ in range(100):
        told: list[bool] = []
        barrier = threading.Barrier(9)

        def ask(barrier: threading.Barrier = barrier, told: list[bool] = told) -> None:
            barrier.wait()
            told.extend(guard.forked() for _ in range(20))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        watched.fork()
        barrier.wait()
        for thread in threads:
            thread.join()
        assert sum(told) == 1


def test_a_child_of_fork_and_its_parent_are_both_told(watched: Guest) -> None:
    guard = vmfork.Guard()
    go_read, go_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(go_read, 1)
        os._exit(10 * guard.forked() + guard.forked())
    watched.fork()
    assert guard.forked()
    os.write(go_write, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 10
    assert not guard.forked()


def test_a_child_forked_while_a_thread_asks_does_not_hang(watched: Guest) -> None:
    guard = vmfork.Guard("page", strict=True)
    over = threading.Event()
    watched.watch(DETECTION_NONE)

    def ask() -> None:
        while not over.is_set():
            try:
                guard.forked()
            except vmfork.Unavailable:
                continue

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for _ in range(30):
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                try:
                    guard.forked()
                except vmfork.Unavailable:
                    os._exit(0)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        over.set()
        thread.join()


def test_a_valid_vmclock_is_preferred(watched: Guest) -> None:
    watched.set_vmclock(vmclock_page(counter=5))
    guard = vmfork.Guard()
    assert guard.source == "vmclock"
    assert not guard.forked()
    watched.fork()
    assert not guard.forked()
    watched.set_vmclock(vmclock_page(counter=6), in_place=True)
    assert guard.forked()
    assert not guard.forked()


def test_a_vmclock_below_a_root_may_be_replaced_by_rename(guest: Guest) -> None:
    guest.set_vmclock(vmclock_page(counter=5))
    guard = vmfork.Guard("vmclock")
    guest.set_vmclock(vmclock_page(counter=5, disruption=9))
    assert not guard.forked()
    guest.set_vmclock(vmclock_page(counter=6))
    assert guard.forked()
    assert not guard.forked()


@pytest.mark.parametrize(
    "page",
    [
        vmclock_page(flags=0),
        vmclock_page(size=104),
        vmclock_page(magic=1),
        vmclock_page(version=2),
        vmclock_page()[:104],
        b"",
    ],
    ids=["no counter", "old structure", "magic", "version", "short", "empty"],
)
def test_a_vmclock_without_a_valid_counter_is_not_used(watched: Guest, page: bytes) -> None:
    watched.set_vmclock(page)
    assert vmfork.Guard().source == "page"
    with pytest.raises(vmfork.Unavailable):
        vmfork.Guard("vmclock")


def test_source_page_ignores_a_vmclock(watched: Guest) -> None:
    watched.set_vmclock(vmclock_page())
    guard = vmfork.Guard("page")
    assert guard.source == "page"
    watched.fork()
    assert guard.forked()


def test_a_strict_guard_on_a_vmclock_needs_no_daemon(guest: Guest) -> None:
    guest.set_vmclock(vmclock_page())
    assert not vmfork.Guard(strict=True).forked()


def test_a_fork_inside_an_unforked_block_raises_at_its_end(watched: Guest) -> None:
    block = vmfork.unforked()
    block.__enter__()
    watched.fork()
    with pytest.raises(vmfork.Forked):
        block.__exit__(None, None, None)


def test_a_quiet_unforked_block_raises_nothing(watched: Guest) -> None:
    watched.fork()
    with vmfork.unforked() as guard:
        assert not guard.forked()


def test_an_exception_of_an_unforked_block_is_not_replaced(watched: Guest) -> None:
    def block() -> None:
        with vmfork.unforked():
            watched.fork()
            raise KeyError

    with pytest.raises(KeyError):
        block()


def test_a_strict_unforked_block_is_not_entered_when_nobody_watches(guest: Guest) -> None:
    entered = False
    with pytest.raises(vmfork.Unavailable), vmfork.unforked(strict=True):
        entered = True
    assert not entered


def test_the_root_of_the_environment_counts_for_nothing_with_other_rights(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    program = "import os; os.seteuid(65534)\nfrom vmfork.library.root import paths\nprint(repr(paths().root))"
    environment = {**os.environ, "VMFORK_ROOT": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "''\n"


@pytest.mark.parametrize("strict", [False, True])
def test_asking_costs_no_more_than_a_few_calls_of_a_function(watched: Guest, strict: bool) -> None:
    guard = vmfork.Guard(strict=strict)

    def nothing() -> bool:
        return False

    asked = min(timeit.repeat(guard.forked, number=20000, repeat=7))
    bare = min(timeit.repeat(nothing, number=20000, repeat=7))
    assert asked < 6 * bare, f"forked() takes {asked / 20000 * 1e9:.0f} ns, an empty function {bare / 20000 * 1e9:.0f}"
