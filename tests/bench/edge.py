# SPDX-License-Identifier: Apache-2.0
"""From the kernel's line to the page: vmforkd, the C reference and a bare Python loop, in turns.

The writer puts the line into the FIFO that stands for /dev/kmsg, then spins on its own mapping of the page, on another
CPU than the program that it waits for. The clock starts before the write.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.place import HERE, build, can_copy, fake_daemon, guest_python, on_cpu, pinned, real_daemon, running, scratch
from bench.place import until as wait_until
from bench.samples import Chapter, Series, ratio
from support.fakeguest import RESEED_LINE, FakeGuest

_GENERATION, _STATE = 2, 3  # as u64 and as u32 in the page
_GIVE_UP_NS = 5_000_000_000


@dataclass(slots=True, kw_only=True)
class Watched:
    """One program under test: `fork` makes what a fork leaves besides the line, `idle` waits until it rests again."""

    pid: int
    kmsg: int
    page: mmap.mmap
    fork: Callable[[], None] = lambda: None
    idle: Callable[[], None] = lambda: None

    def latency_us(self) -> float:
        """Microseconds from writing the line to seeing the new generation."""
        words = memoryview(self.page).cast("Q")
        self.fork()
        line = f"5,{time.monotonic_ns()},{time.monotonic_ns() // 1000},-;{RESEED_LINE}\n".encode()
        before = words[_GENERATION]
        begin = time.perf_counter_ns()
        os.write(self.kmsg, line)
        while words[_GENERATION] == before:
            if time.perf_counter_ns() - begin > _GIVE_UP_NS:
                raise TimeoutError("the page did not change")
        end = time.perf_counter_ns()
        words.release()
        self.idle()
        return (end - begin) / 1000


@contextlib.contextmanager
def _mapped(path: str) -> Iterator[mmap.mmap]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 4096, access=mmap.ACCESS_READ) as page:
        yield page


@contextlib.contextmanager
def simple(
    directory: Path, name: str, command: list[str], *, fork: Callable[[], None] = lambda: None
) -> Iterator[Watched]:
    """A program that takes a kernel log and a page as its last arguments."""
    kmsg, page = str(directory / f"{name}.kmsg"), directory / f"{name}.page"
    os.mkfifo(kmsg)
    descriptor = os.open(kmsg, os.O_RDWR | os.O_NONBLOCK)
    try:
        with running(pinned(1, [*command, kmsg, str(page)])) as child:
            wait_until(lambda: page.exists() and page.stat().st_size == 4096 and page.read_bytes()[16] == 1, name)
            with _mapped(str(page)) as view:
                yield Watched(pid=child.pid, kmsg=descriptor, page=view, fork=fork)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def vmforkd(*, real: bool = False) -> Iterator[Watched]:
    """vmforkd with no hooks: each sample waits until the reaction to it has ended."""
    place = real_daemon(cpu=1) if real else fake_daemon(cpu=1)
    with place as daemon, _mapped(daemon.page_path) as view:
        guest: FakeGuest = daemon.guest
        descriptor = os.open(guest.paths.kmsg, os.O_RDWR | os.O_NONBLOCK)

        def settle() -> None:
            wait_until(lambda: daemon.content().state == 0, "settled")

        try:
            yield Watched(
                pid=daemon.pid,
                kmsg=descriptor,
                page=view,
                fork=lambda: guest.set_generation_id(os.urandom(16)),
                idle=settle,
            )
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def same_steps(directory: Path) -> Iterator[Watched]:
    """The steps of vmforkd in C, on files like its own."""
    with FakeGuest(directory / "same") as guest:
        files = [guest.paths.fw_cfg_guid, guest.paths.devices, str(directory / "note")]
        command = [str(build("same.c", directory / "same-steps")), *files]
        with simple(directory, "steps", command, fork=lambda: guest.set_generation_id(os.urandom(16))) as watched:
            yield watched


def measure(rounds: int, pause: float = 0.03) -> Chapter:
    """Interleaved samples of all; the pause lets every program and CPU become idle."""
    chapter = Chapter(name="edge")
    with scratch() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        found: dict[str, Watched] = {
            "vmfork": stack.enter_context(vmforkd()),
            "c": stack.enter_context(simple(directory, "c", [str(build("reference.c", directory / "reference"))])),
            "python": stack.enter_context(
                simple(directory, "python", [guest_python(), "-I", str(HERE / "bare.py")]),
            ),
            "same": stack.enter_context(same_steps(directory)),
        }
        reason = can_copy()
        if reason is None:
            found["real"] = stack.enter_context(vmforkd(real=True))
        else:
            chapter.remarks.append(f"vmforkd without a root prefix was not measured: {reason}.")
        values: dict[str, list[float]] = {key: [] for key in found}
        with on_cpu(0):
            for number in range(-3, rounds):
                for key, watched in found.items():
                    time.sleep(pause)
                    value = watched.latency_us()
                    if number >= 0:
                        values[key].append(value)
    chapter.remarks.append(
        f"Before each sample, all rest for {pause * 1000:g} ms; the one that is asked has rested since its last"
        f" turn, for {len(found)} times that and what the others took."
    )
    titles = {
        "vmfork": ("edge to page", "below a root prefix in RAM"),
        "c": ("edge to page, C reference", "poll, read, compare, bump: no truth, no memory, no policy"),
        "python": ("edge to page, bare Python loop", "the same in 30 lines of Python"),
        "same": ("edge to page, vmforkd's steps in C", "every system call that vmforkd makes, in its order"),
        "real": ("edge to page, no root prefix", "in namespaces: real RNG ioctls, netlink socket, libraries"),
    }
    for key, (what, note) in titles.items():
        if key in values:
            budget = 300.0 if key in ("vmfork", "real") else None
            chapter.series.append(
                Series(
                    key=f"edge-{key}",
                    what=what,
                    unit="us",
                    values=values[key],
                    budget=budget,
                    peer=budget is None,
                    note=note,
                )
            )
    own = chapter["edge-vmfork"]
    chapter.series.append(
        Series(
            key="edge-p99",
            what="edge to page, 99th percentile",
            unit="us",
            values=own.values,
            budget=1500,
            budget_of="p99",
        )
    )
    chapter.series.append(ratio("edge-ratio", "edge to page over the C reference", own, chapter["edge-c"], budget=3.0))
    chapter.series.append(
        ratio("edge-same-ratio", "edge to page over its steps in C", own, chapter["edge-same"], budget=3.0)
    )
    chapter.series.append(
        ratio("edge-python-ratio", "bare Python over the C reference", chapter["edge-python"], chapter["edge-c"])
    )
    return chapter
