# SPDX-License-Identifier: Apache-2.0
"""The profile of the way from the edge to the page: what each step takes after idling, and right after another fork.

Between the two stands nothing but the processor's caches: it is the same code, on the same files in RAM.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import time
from pathlib import Path

from bench.place import HERE, environment, guest_python, on_cpu, pinned, running, scratch, until
from bench.samples import Chapter, Series
from support.fakeguest import RESEED_LINE, FakeGuest
from vmfork import page

_IDLE_SEC = 0.1
_SOON_SEC = 0.003  # it has gone back to sleep by then


def _forks(guest: FakeGuest, count: int, pause: float) -> None:
    """Fork the guest so many times; a short pause is spent awake, so that this processor is no slower to answer."""
    kmsg = os.open(guest.paths.kmsg, os.O_RDWR | os.O_NONBLOCK)
    with open(guest.paths.generation_page, "rb") as file:
        view = mmap.mmap(file.fileno(), page.PAGE_SIZE, access=mmap.ACCESS_READ)
        words = memoryview(view).cast("Q")
        for _ in range(count):
            if pause >= _IDLE_SEC:
                time.sleep(pause)
            end = time.monotonic() + (0 if pause >= _IDLE_SEC else pause)
            while time.monotonic() < end:
                pass
            guest.set_generation_id(os.urandom(16))
            before = words[page.GENERATION_OFFSET // 8]
            stamp = time.monotonic_ns() // 1000
            os.write(kmsg, f"5,{stamp},{stamp},-;{RESEED_LINE}\n".encode())
            until(lambda old=before: words[page.GENERATION_OFFSET // 8] != old, "a fork", pause=0)  # type: ignore[misc]
        words.release()
        view.close()
    os.close(kmsg)


def _profile(count: int, pause: float) -> list[dict[str, float]]:
    """Microseconds of each step of each fork; the first few are left out."""
    with scratch() as name, FakeGuest(Path(name) / "guest") as guest, on_cpu(0):
        out = Path(name) / "steps.json"
        command = [guest_python(), str(HERE / "steps_probe.py"), str(out), "--root", str(guest.root)]
        with running(pinned(1, command), env=environment(), stderr=subprocess.DEVNULL):
            until(lambda: Path(guest.paths.public_socket).exists(), "vmforkd is up")
            until(lambda: page.read_page(guest.paths.generation_page).detection, "vmforkd watches")
            _forks(guest, count + 5, pause)
        return [{step: ns / 1000 for step, ns in fork.items()} for fork in json.loads(out.read_text())[5:]]


def measure(rounds: int) -> Chapter:
    chapter = Chapter(name="steps")
    cold, warm = _profile(rounds, _IDLE_SEC), _profile(rounds, _SOON_SEC)
    for key, title, forks in (("cold", "after idling", cold), ("warm", "right after another fork", warm)):
        for number, step in enumerate(forks[0]):
            values = [fork[step] for fork in forks if step in fork]
            chapter.series.append(Series(key=f"{key}-{number}", what=f"{title}: {step}", unit="us", values=values))
        total = [sum(fork.values()) for fork in forks]
        chapter.series.append(Series(key=f"{key}-all", what=f"{title}: all of it", unit="us", values=total))
    times = chapter["cold-all"].median / chapter["warm-all"].median
    chapter.remarks.append(
        f"The same steps take {times:.1f} times as long after {_IDLE_SEC * 1000:g} ms of idling as right after another"
        " fork. No step stands out, and none of them waits: what is paid for is fetching the interpreter, the kernel"
        " and the data from memory anew, since an idle detector has no wake-up that would keep them in the processor's"
        " caches. So fewer steps would help and faster ones hardly; each of these is one that the contract asks for."
    )
    return chapter
