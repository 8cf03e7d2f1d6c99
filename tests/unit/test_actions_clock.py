# SPDX-License-Identifier: Apache-2.0
"""Which clock is believed, how far, and in which direction."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.actions import prepared, write
from vmfork.actions import clock, perform, ptp
from vmfork.errors import AbsentError, ActionSkipped
from vmfork.paths import Paths

SECOND = 1_000_000_000


def answer(*times: tuple[int, int]) -> bytes:
    """A struct ptp_sys_offset: (seconds, ns) of system, device, system, ..."""
    packed = struct.pack("@I12x", len(times) // 2) + b"".join(struct.pack("@qI4x", *pair) for pair in times)
    return packed.ljust(832, b"\0")


def test_the_request_number_is_the_one_of_the_structure() -> None:
    assert (1 << 30) | (len(answer()) << 16) | (ord("=") << 8) | 5 == ptp.PTP_SYS_OFFSET


def test_the_tightest_bracket_wins() -> None:
    best = ptp.tightest(answer((100, 0), (200, 0), (100, 9000), (205, 1000), (100, 11000)))
    assert best == ptp.Offset(ns=105 * SECOND + 1000 - 10000, bracket_ns=2000)


def test_the_middle_of_the_bracket_is_the_moment_of_the_reading() -> None:
    assert ptp.tightest(answer((100, 0), (99, 0), (100, 2000))).ns == -SECOND - 1000


def test_a_step_of_the_system_clock_within_a_bracket_spoils_that_sample_only() -> None:
    best = ptp.tightest(answer((100, 0), (200, 0), (50, 0), (200, 0), (50, 500)))
    assert best.bracket_ns == 500


@pytest.mark.parametrize("hostile", [answer(), answer((5, 0), (0, 0), (5, 1)), answer((9, 0), (9, 0), (8, 0))])
def test_an_answer_without_a_usable_sample_is_absent(hostile: bytes) -> None:
    with pytest.raises(AbsentError):
        ptp.tightest(hostile)


def test_a_sample_count_beyond_the_structure_is_not_believed() -> None:
    raw = bytearray(answer((100, 0), (200, 0), (100, 10)))
    struct.pack_into("@I", raw, 0, 4_000_000)
    assert ptp.tightest(bytes(raw)).ns == 100 * SECOND - 5


def page(*, scale: int, offset: int | None) -> bytes:
    flags = 0 if offset is None else 1
    return struct.pack(
        "<IIHBBIQQ2xBBh", 0x4B4C4356, 4096, 1, 1, scale, 2, 0, flags, 2, 0, 0 if offset is None else offset
    )


@pytest.mark.parametrize(
    ("scale", "offset", "version", "wanted"),
    [
        (0, None, (6, 13), 0),
        (0, -37, (6, 18), 0),
        (1, -37, (7, 0), -37),
        (1, 37, (7, 0), -37),
        (0, -37, (7, 0), -37),
        (0, None, (6, 1), 0),
    ],
)
def test_the_time_scale_of_a_vmclock_follows_from_page_and_kernel(
    scale: int, offset: int | None, version: tuple[int, int], wanted: int
) -> None:
    assert ptp.vmclock_to_utc(page(scale=scale, offset=offset), "vmclock0", version) == wanted


@pytest.mark.parametrize(
    ("scale", "offset", "version"),
    [(1, None, (7, 0)), (0, None, (7, 0)), (1, -37, (6, 18)), (2, None, (7, 0)), (0, -37, (6, 1)), (3, -37, (7, 0))],
)
def test_a_vmclock_of_unknown_time_scale_is_refused(scale: int, offset: int | None, version: tuple[int, int]) -> None:
    with pytest.raises(AbsentError):
        ptp.vmclock_to_utc(page(scale=scale, offset=offset), "vmclock0", version)


@pytest.mark.parametrize("hostile", [b"", b"VCLK", b"\0" * 112])
def test_a_broken_vmclock_page_is_refused(hostile: bytes) -> None:
    with pytest.raises(AbsentError):
        ptp.vmclock_to_utc(hostile, "vmclock0", (7, 0))


def ptp_guest(root: Path, **names: str) -> Paths:
    for device, name in names.items():
        write(root / f"sys/class/ptp/{device}/clock_name", name + "\n")
    return Paths(str(root))


def test_the_clock_of_a_network_card_is_not_believed(tmp_path: Path) -> None:
    paths = ptp_guest(tmp_path, ptp0="mlx5_ptp", ptp1="KVM virtual PTP", ptp2="vmclock0", ptp3="ena-ptp-05")
    assert [found.name for found in ptp.clocks(paths, ("auto",))] == ["KVM virtual PTP", "vmclock0"]


def test_a_clock_that_was_named_is_believed(tmp_path: Path) -> None:
    paths = ptp_guest(tmp_path, ptp0="ena-ptp-05")
    assert [found.name for found in ptp.clocks(paths, ("/dev/ptp0",))] == ["ena-ptp-05"]


def test_a_device_that_is_no_ptp_clock_is_passed_over(tmp_path: Path) -> None:
    paths = ptp_guest(tmp_path, ptp0="KVM virtual PTP")
    write(tmp_path / "dev/ptp0", "")
    with pytest.raises(AbsentError, match="not a PTP clock"):
        ptp.measure(paths, ptp.clocks(paths, ("auto",))[0])


@dataclass
class Told:
    """A reference clock that says what the test wants."""

    offsets: Iterator[int]
    forward_only: bool = False
    threshold_ms: int = 100
    name: str = "the test's clock"
    asked: list[bool] = field(default_factory=list)

    def offset_ns(self, *, exact: bool) -> int:
        self.asked.append(exact)
        value = next(self.offsets, None)
        if value is None:
            raise AbsentError("gone")
        return value


def test_a_clock_within_the_threshold_is_left_alone(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    clock.adjust(run.context, (Told(iter([99_000_000])),))
    assert "nothing to step: the clock is 0.099000 s behind" in run.said


@pytest.mark.parametrize("offset", [101_000_000, -101_000_000])
def test_a_clock_beyond_the_threshold_would_be_stepped_in_both_directions(tmp_path: Path, offset: int) -> None:
    run = prepared(tmp_path, dry_run=True)
    clock.adjust(run.context, (Told(iter([offset])),))
    assert f"would step the clock by {offset / SECOND:+.6f} s" in run.said


def test_a_forward_only_clock_never_moves_ours_back(tmp_path: Path) -> None:
    run = prepared(tmp_path, dry_run=True)
    clock.adjust(run.context, (Told(iter([-3600 * SECOND]), forward_only=True),))
    assert "nothing to step" in run.said


def test_the_next_clock_serves_where_the_first_cannot_be_read(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    clock.adjust(run.context, (Told(iter([])), Told(iter([0]), name="the other")))
    assert "not using the test's clock: gone" in run.said
    assert "the other" in run.lines[-1]


def test_without_any_clock_the_action_is_skipped(tmp_path: Path) -> None:
    with pytest.raises(ActionSkipped):
        clock.adjust(prepared(tmp_path).context, ())


def test_below_a_root_the_clock_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "sys/class/rtc/rtc0/since_epoch", "4000000000\n")
    run = prepared(tmp_path)
    assert perform(clock.ACTION, run.context) == 77


def test_an_rtc_far_ahead_would_step_the_clock(tmp_path: Path) -> None:
    write(tmp_path / "sys/class/rtc/rtc0/since_epoch", f"{int(time.time()) + 1000}\n")
    run = prepared(tmp_path, dry_run=True)
    assert perform(clock.ACTION, run.context) == 0
    assert "would step the clock by +9" in run.said


def test_an_rtc_has_a_threshold_that_fits_its_resolution(tmp_path: Path) -> None:
    write(tmp_path / "sys/class/rtc/rtc0/since_epoch", "1\n")
    assert [found.threshold_ms for found in clock.references(prepared(tmp_path).context)] == [1500]


def test_an_rtc_in_local_time_is_not_used(tmp_path: Path) -> None:
    write(tmp_path / "sys/class/rtc/rtc0/since_epoch", "4000000000\n")
    write(tmp_path / "etc/adjtime", "0.0 0 0.0\n0\nLOCAL\n")
    run = prepared(tmp_path, dry_run=True)
    assert perform(clock.ACTION, run.context) == 77
    assert "in local time" in run.said


@pytest.mark.parametrize("hostile", ["", "soon\n", "9" * 5000])
def test_a_broken_rtc_is_absent(tmp_path: Path, hostile: str) -> None:
    write(tmp_path / "sys/class/rtc/rtc0/since_epoch", hostile)
    assert perform(clock.ACTION, prepared(tmp_path, dry_run=True).context) in (0, 77)


def test_an_rtc_that_does_not_tick_gives_no_exact_time(tmp_path: Path) -> None:
    write(tmp_path / "sys/class/rtc/rtc0/since_epoch", "4000000000\n")
    with pytest.raises(AbsentError, match="does not tick"):
        clock.RtcReference(paths=Paths(str(tmp_path)), threshold_ms=1500).offset_ns(exact=True)
