# SPDX-License-Identifier: Apache-2.0
"""Does a cost stay proportional? Hooks, subscribers, history, devicetrees and ACPI tables that grow."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bench.crowd import Crowd, hook_times
from bench.footprint import memory_mib, start_ms
from bench.place import environment, fake_daemon, guest_python, scratch
from bench.samples import Chapter, Curve, Series
from support.fakeguest import FIRST_GENERATION_ID, FakeGuest
from vmfork import state
from vmfork.history import KEPT

# What one more may cost in the last step over what it cost before: n log n reaches 1.5, n to the 1.5 2.2, a square 3.3.
_STRAIGHT = 2.0


def hooks(rounds: int, sizes: Sequence[int] = (1, 10, 100, 300, 1000)) -> Curve:
    samples = []
    for count in sizes:
        samples.append((float(count), hook_times(count, rounds if count < 300 else 3).ends))
    return Curve(key="hooks", what="edge to settled", over="hooks", unit="ms", samples=samples)


def subscribers(rounds: int) -> tuple[Curve, Curve]:
    """With three daemons one after the other: what one of them holds is always the same."""
    told: dict[float, list[float]] = {}
    held: dict[float, list[float]] = {}
    for _ in range(3):
        with fake_daemon() as daemon, contextlib.ExitStack() as stack:
            crowd = Crowd(daemon, stack)
            for count in (1, 10, 100, 300, 1000):
                if crowd.grow(count) < count:
                    break
                told.setdefault(count, []).extend(crowd.told_ms() for _ in range(rounds))
                held.setdefault(count, []).append(memory_mib(daemon.pid)["Rss"])
    return (
        Curve(
            key="subscribers",
            what="edge to the last subscriber told",
            over="subscribers",
            unit="ms",
            samples=list(told.items()),
        ),
        Curve(
            key="subscribers-rss",
            what="RSS with subscribers",
            over="subscribers",
            unit="MiB",
            samples=list(held.items()),
        ),
    )


def fill_history(guest: FakeGuest, count: int) -> None:
    """As after so many forks; the state says where the last daemon was, without it the start asks the history."""
    state.store_saved(guest.paths, state.Saved(generation=2, generation_id=FIRST_GENERATION_ID))
    event = {
        "generation": 2,
        "kind": "live",
        "edges": ["kmsg"],
        "generation_id": "00" * 16,
        "previous_generation_id": "11" * 16,
        "detected_at": "2026-01-01T00:00:00.000000Z",
        "boottime_ns": 1,
        "identity": {"policy": "keep", "reason": "no evidence of a clone"},
        "state": "settled",
        "hooks": [{"name": f"{number}0-hook", "path": "/x", "result": "ok"} for number in range(1, 9)],
    }
    lines = [json.dumps({**event, "token": os.urandom(16).hex()}) for _ in range(count)]
    Path(guest.paths.history).write_text("".join(f"{line}\n" for line in lines))


def history(rounds: int) -> Curve:
    """In turns: what is compared is a difference of nothing."""
    with contextlib.ExitStack() as stack:
        guests = {}
        for count in (0, 10, 100, KEPT):
            name = stack.enter_context(scratch())
            guests[count] = stack.enter_context(FakeGuest(Path(name) / "guest"))
            fill_history(guests[count], count)
        times: dict[int, list[float]] = {count: [] for count in guests}
        for _ in range(max(3 * rounds, 9)):
            for count, guest in guests.items():
                times[count].append(start_ms(guest))
    samples = [(float(max(count, 1)), values) for count, values in times.items()]
    return Curve(key="history", what="start to READY", over="forks in the history", unit="ms", samples=samples)


_PROBE = """
import sys, time
from vmfork.config import Config
from vmfork.daemon.sources import Sources
from vmfork.paths import Paths
paths = Paths(sys.argv[1])
for _ in range(int(sys.argv[2])):
    begin = time.perf_counter_ns()
    Sources(paths, Config(), kmsg_after=None).close()
    print((time.perf_counter_ns() - begin) / 1e6)
"""


def _probe_ms(guest: FakeGuest, rounds: int) -> list[float]:
    command = [guest_python(), "-c", _PROBE, str(guest.root), str(rounds)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.splitlines()]


def devicetree(rounds: int, sizes: Sequence[int] = (10, 100, 1000, 10_000)) -> Curve:
    samples = []
    for count in sizes:
        with scratch() as name, FakeGuest(Path(name) / "guest", generation_id=None) as guest:
            base = Path(guest.paths.device_tree)
            for number in range(count):
                # As wide and as deep as real ones are: buses of a hundred devices.
                node = base / f"bus@{number // 100}" / f"device@{number}"
                node.mkdir(parents=True)
                (node / "compatible").write_bytes(b"vendor,device\0")
            samples.append((float(count), _probe_ms(guest, rounds)))
    return Curve(key="devicetree", what="probing the sources", over="devicetree nodes", unit="ms", samples=samples)


def acpi(rounds: int, sizes: Sequence[int] = (1 << 10, 1 << 14, 1 << 17, 1 << 20)) -> Curve:
    samples = []
    for size in sizes:
        with scratch() as name, FakeGuest(Path(name) / "guest", generation_id=None) as guest:
            tables = Path(guest.paths.acpi_tables)
            tables.mkdir(parents=True)
            (tables / "DSDT").write_bytes(_table(size))
            device = Path(guest.paths.acpi_devices) / "PNP0C02:00"
            device.mkdir(parents=True)
            for attribute, text in (
                ("modalias", "acpi:PNP0C02:VM_GEN_COUNTER:"),
                ("path", "\\VGEN"),
                ("hid", "PNP0C02"),
            ):
                (device / attribute).write_text(f"{text}\n")
            samples.append((size / 1024, _probe_ms(guest, rounds)))
    return Curve(key="acpi", what="probing the sources", over="KiB of ACPI tables", unit="ms", samples=samples)


def _table(size: int) -> bytes:
    """A DSDT full of devices with names and a method each, and the one looked for at its end, with no address."""
    body = bytearray()
    number = 0
    wanted = b"VGEN\x08_HID\x0dPNP0C02\0\x08_CID\x0dVM_Gen_Counter\0"
    while len(body) + 200 < size:
        name = f"D{number % 0xFFF:03X}".encode()
        inside = name + b"\x08_HID\x0dPNP0C02\0" + b"\x08_UID\x0c" + number.to_bytes(4, "little")
        inside += b"\x14\x09_STA\x00\xa4\x0a\x0f"
        # PkgLength with one following byte: its own two bytes count.
        length = len(inside) + 2
        body += b"\x5b\x82" + bytes((0x40 | length & 0x0F, length >> 4)) + inside
        number += 1
    body += b"\x5b\x82" + bytes((0x40 | (len(wanted) + 2) & 0x0F, (len(wanted) + 2) >> 4)) + wanted
    whole = bytearray(b"DSDT" + (36 + len(body)).to_bytes(4, "little") + b"\x02\0BENCH BENCHTAB" + bytes(12)) + body
    whole[9] = -sum(whole) & 0xFF
    return bytes(whole)


def measure(rounds: int) -> Chapter:
    chapter = Chapter(name="growth")
    chapter.curves.append(hooks(rounds))
    chapter.curves += subscribers(rounds)
    chapter.curves += [history(rounds), devicetree(rounds), acpi(rounds)]
    chapter.series += [*straight(chapter.curves), _history_ratio(chapter.curves[3])]
    chapter.remarks.append(
        "The sizes of a curve are measured one after the other, not in turns, but for those of the history."
    )
    return chapter


def straight(curves: Iterable[Curve]) -> Iterator[Series]:
    """Is it linear? One row for each that grows at all."""
    for curve in curves:
        if curve.bend is not None:
            what = f"{curve.what}, by {curve.over}: one more in the last step over one more before"
            yield Series(key=f"{curve.key}-bend", what=what, unit="x", values=[curve.bend], budget=_STRAIGHT)


def _history_ratio(curve: Curve) -> Series:
    (_, empty), *_, (_, full) = curve.points
    what = f"start with {KEPT} forks in the history over start with none"
    return Series(key="history-ratio", what=what, unit="x", values=[full / empty], budget=1.2)
