# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.fakeguest import RESEED_LINE, RESUME_LINE, FakeGuest
from vmfork.edges.kmsg import FORK_LINE, Kmsg, bound_device, parse
from vmfork.errors import InputError


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    with FakeGuest(tmp_path) as made:
        yield made


@pytest.mark.parametrize(
    "raw",
    [
        b"5,344,1284104,-;random: crng reseeded due to virtual machine fork\n",
        b"5,344,1284104,-,caller=T1;random: crng reseeded due to virtual machine fork\n",
        b"5,344,1284104,c,some=thing,new=1;random: crng reseeded due to virtual machine fork\n SUBSYSTEM=x\n",
    ],
)
def test_the_kernels_line_is_understood_in_every_form(raw: bytes) -> None:
    record = parse(raw)
    assert record.announces_fork
    assert (record.sequence, record.microseconds) == (344, 1284104)


@pytest.mark.parametrize(
    "raw",
    [
        b"13,344,1284104,-;random: crng reseeded due to virtual machine fork\n",
        b"5,344,1284104,-; random: crng reseeded due to virtual machine fork\n",
        b"5,344,1284104,-;random: crng reseeded due to virtual machine fork!\n",
        b"5,344,1284104,-;x\nrandom: crng reseeded due to virtual machine fork\n",
        b"5,344,1284104,-;",
    ],
)
def test_what_only_resembles_the_kernels_line_is_not_believed(raw: bytes) -> None:
    assert not parse(raw).announces_fork


@pytest.mark.parametrize(
    "raw", [b"", b";", b"5;x", b"a,b,c,-;x", b"5,1;x", b"5,344,1284104,-", b"-1,2,3,-;x", b"\xff" * 50]
)
def test_what_is_no_record_is_refused(raw: bytes) -> None:
    with pytest.raises(InputError):
        parse(raw)


@settings(max_examples=1000, derandomize=True, deadline=None)
@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: b"5,344,12841" + tail + b";" + FORK_LINE))
def test_any_bytes_give_a_record_or_an_input_error(raw: bytes) -> None:
    try:
        record = parse(raw)
    except InputError:
        return
    assert record.sequence >= 0
    assert record.announces_fork == (record.facility == 0 and record.text == FORK_LINE)


def test_lines_are_counted_and_the_newest_time_is_kept(guest: FakeGuest) -> None:
    edge = Kmsg(guest.paths, after=None)
    guest.kmsg_line(RESEED_LINE, usec=10)
    guest.kmsg_line("something else", usec=15)
    guest.kmsg_line(RESEED_LINE, usec=20)
    heard = edge.drain()
    assert (heard.words, heard.record_us, heard.lost) == (2, 20, False)
    assert edge.drain().words == 0


def test_a_flood_in_few_reads_does_not_keep_the_detector_from_looking_at_the_truths(guest: FakeGuest) -> None:
    edge = Kmsg(guest.paths, after=None)
    for _ in range(10):
        guest.kmsg_bytes(b"6,1,1,-;\n" * 600)
    guest.kmsg_line(RESEED_LINE)
    first, second = edge.drain(), edge.drain()
    assert (first.words, second.words) == (0, 1)


def test_a_line_without_its_end_is_kept_until_the_rest_comes(guest: FakeGuest) -> None:
    edge = Kmsg(guest.paths, after=None)
    guest.kmsg_bytes(b"5,1,1,-;" + FORK_LINE[:20])
    assert edge.drain().words == 0
    guest.kmsg_bytes(FORK_LINE[20:] + b"\n")
    assert edge.drain().words == 1


def test_an_endless_line_does_not_fill_the_memory(guest: FakeGuest) -> None:
    edge = Kmsg(guest.paths, after=None)
    for _ in range(40):
        guest.kmsg_bytes(b"x" * 8192)
        edge.drain()
    guest.kmsg_bytes(b"\n")
    guest.reseed_line()
    assert edge.drain().words == 1
    assert len(edge._partial) <= 65536


def test_it_is_live_only_with_a_bound_device(guest: FakeGuest) -> None:
    edge = Kmsg(guest.paths, after=None)
    assert edge.status().live
    guest.unbind_driver()
    assert not edge.status().live
    assert "no device is bound" in edge.status().detail


def test_a_missing_log_is_explained(tmp_path: Path) -> None:
    with FakeGuest(tmp_path) as guest:
        Path(guest.paths.kmsg).unlink()
        status = Kmsg(guest.paths, after=None).status()
        assert not status.live
        assert guest.paths.kmsg in status.detail
        assert status.hint


def test_a_file_in_the_place_of_the_log_is_refused(tmp_path: Path) -> None:
    with FakeGuest(tmp_path) as guest:
        Path(guest.paths.kmsg).unlink()
        Path(guest.paths.kmsg).write_text("5,1,1,-;x\n")
        edge = Kmsg(guest.paths, after=None)
        assert edge.fileno() == -1
        assert "neither the kernel's device nor a FIFO" in edge.status().detail


def test_the_driver_is_found_under_acpi_as_before_linux_6_10(tmp_path: Path) -> None:
    with FakeGuest(tmp_path) as guest:
        guest.unbind_driver()
        assert bound_device(guest.paths) is None
        device = Path(guest.paths.acpi_driver) / "QEMUVGID:00"
        device.mkdir(parents=True)
        assert bound_device(guest.paths) == "QEMUVGID:00"


def test_after_a_suspension_the_sources_are_looked_at_again(guest: FakeGuest) -> None:
    edge = Kmsg(guest.paths, after=None)
    guest.kmsg_line(RESUME_LINE, facility=1)
    assert not edge.drain().hotplug
    guest.kmsg_line(RESUME_LINE)
    heard = edge.drain()
    assert (heard.hotplug, heard.words) == (True, 0)


def test_it_is_not_live_where_acpi_events_do_not_arrive(guest: FakeGuest) -> None:
    edge = Kmsg(guest.paths, after=None)
    guest.set_gpe("EN    ")
    assert edge.status().live
    guest.set_gpe("EN STS")
    assert not edge.status().live
    assert "ACPI events do not reach the kernel" in edge.status().detail
    assert edge.status().hint
