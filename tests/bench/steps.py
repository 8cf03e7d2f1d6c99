# SPDX-License-Identifier: Apache-2.0
"""The profile of the way from the edge to the page: what each step takes after idling, and right after another fork.

It is the same code, on the same files in RAM. Each fork that comes after a pause is followed by a second one soon, so
that both are taken in turns.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from statistics import median

from bench.place import HERE, environment, guest_python, on_cpu, pinned, running, scratch, until
from bench.samples import Chapter, Series
from support.fakeguest import RESEED_LINE, FakeGuest
from vmfork import page

_IDLE_SEC = 0.1
_SOON_SEC = 0.003  # it has gone back to sleep by then


def _forks(guest: FakeGuest, count: int) -> None:
    """So many pairs of forks: one after idling, one soon after that.

    Before the second, this process stays awake, so that its own processor is no slower to answer.
    """
    kmsg = os.open(guest.paths.kmsg, os.O_RDWR | os.O_NONBLOCK)
    with open(guest.paths.generation_page, "rb") as file:
        view = mmap.mmap(file.fileno(), page.PAGE_SIZE, access=mmap.ACCESS_READ)
        words = memoryview(view).cast("Q")
        for number in range(2 * count):
            if number % 2 == 0:
                time.sleep(_IDLE_SEC)
            else:
                end = time.monotonic() + _SOON_SEC
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """Microseconds of each step, and what the kernel counted meanwhile (steps_probe.counted)."""

    steps: dict[str, float]
    counted: dict[str, int]

    @property
    def all(self) -> float:
        return sum(self.steps.values())

    @property
    def computing(self) -> float:
        """The share of the time after the wake-up in which the detector had the CPU."""
        return self.counted["computing"] / self.counted["all"]


def _profile(pairs: int) -> tuple[list[Fork], list[Fork]]:
    """The forks after idling and those soon after; the first few pairs are left out."""
    with scratch() as name, FakeGuest(Path(name) / "guest") as guest, on_cpu(0):
        out = Path(name) / "steps.json"
        command = [guest_python(), str(HERE / "steps_probe.py"), str(out), "--root", str(guest.root)]
        with running(pinned(1, command), env=environment(), stderr=subprocess.DEVNULL):
            until(lambda: Path(guest.paths.public_socket).exists(), "vmforkd is up")
            until(lambda: page.read_page(guest.paths.generation_page).detection, "vmforkd watches")
            _forks(guest, pairs + 3)
        forks = [
            Fork(steps={step: ns / 1000 for step, ns in fork["steps"].items()}, counted=fork["counted"])
            for fork in json.loads(out.read_text())
        ]
    if len(forks) != 2 * (pairs + 3):
        raise ValueError(f"{2 * (pairs + 3)} forks were made, and {len(forks)} were seen")
    return forks[6::2], forks[7::2]


def measure(rounds: int) -> Chapter:
    chapter = Chapter(name="steps")
    cold, warm = _profile(rounds)
    for key, title, forks in (("cold", "after idling", cold), ("warm", "right after another fork", warm)):
        for number, step in enumerate(forks[0].steps):
            values = [fork.steps[step] for fork in forks if step in fork.steps]
            chapter.series.append(Series(key=f"{key}-{number}", what=f"{title}: {step}", unit="us", values=values))
        total = [fork.all for fork in forks]
        chapter.series.append(Series(key=f"{key}-all", what=f"{title}: all of it", unit="us", values=total))
    chapter.remarks += [*_sentences(cold, warm), _of_the_processor()]
    return chapter


def _sentences(cold: list[Fork], warm: list[Fork]) -> Iterator[str]:
    times = median(fork.all for fork in cold) / median(fork.all for fork in warm)
    medians = {step: median(fork.steps.get(step, 0) for fork in cold) for step in cold[0].steps}
    longest, took = max(medians.items(), key=itemgetter(1))
    yield (
        f"The same steps take {times:.1f} times as long after {_IDLE_SEC * 1000:g} ms in which nothing happens as"
        f" {_SOON_SEC * 1000:g} ms after another fork. After idling, the longest of them is {longest}, with"
        f" {100 * took / median(fork.all for fork in cold):.0f} % of the whole."
    )
    for title, forks in (("After idling", cold), ("Right after another fork", warm)):
        waits, faults = (sum(fork.counted[name] for fork in forks) for name in ("waits", "faults"))
        taken = sum(fork.counted["preemptions"] for fork in forks)
        yield (
            f"{title}, from the wake-up to the page, the detector has computed for"
            f" {100 * median(fork.computing for fork in forks):.0f} % of the time (median); in all {len(forks)} forks"
            f" it has waited for something {waits} times, lost the CPU {taken} times, and had {faults} page faults."
        )


def _of_the_processor() -> str:
    known = "read here" if any(Path("/sys/bus/event_source/devices").glob("cpu*")) else "offered by this machine"
    return (
        "What differs between the two is what the processor's caches hold, how deep it sleeps while it idles, and the"
        f" speed of its clock afterwards. Its counters, which would tell them apart, are not {known}."
    )
