# SPDX-License-Identifier: Apache-2.0
"""The vmclock page and the device that shows it."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fakeguest import COUNTER_PRESENT, NOTIFICATION_PRESENT, FakeGuest, vmclock_page
from support.privilege import unprivileged
from vmfork.errors import AbsentError, InputError
from vmfork.truths import Truth
from vmfork.truths.vmclock import VmclockCounter, VmclockDevice
from vmfork.truths.vmclockabi import parse


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    with FakeGuest(tmp_path) as fake:
        yield fake


@pytest.fixture
def device(guest: FakeGuest) -> Iterator[VmclockDevice]:
    opened = VmclockDevice(guest.paths)
    yield opened
    opened.close()


def test_every_field_is_read_at_its_offset() -> None:
    page = parse(vmclock_page(counter=2**64 - 1, disruption=7, seq=4, flags=0x301, tai_offset=-3), "vmclock")
    assert page.generation_counter == 2**64 - 1
    assert page.disruption_marker == 7
    assert page.seq_count == 4
    assert page.flags == 0x301
    assert page.size == 4096
    assert (page.counter_id, page.time_type, page.clock_status, page.tai_offset_sec) == (0xFF, 1, 2, -3)


def test_tai_offset_without_its_flag_is_none() -> None:
    assert parse(vmclock_page(flags=COUNTER_PRESENT), "vmclock").tai_offset_sec is None


def test_counter_without_flag_bit_eight_is_none() -> None:
    assert parse(vmclock_page(counter=9, flags=~COUNTER_PRESENT & 2**64 - 1), "vmclock").generation_counter is None


def test_counter_beyond_the_stated_size_is_none() -> None:
    assert parse(vmclock_page(counter=9, size=0x6F), "vmclock").generation_counter is None
    assert parse(vmclock_page(counter=9, size=0x70), "vmclock").generation_counter == 9


def test_counter_zero_is_a_value() -> None:
    assert parse(vmclock_page(counter=0), "vmclock").generation_counter == 0


def test_flag_bit_nine_means_that_changes_are_notified() -> None:
    assert parse(vmclock_page(flags=NOTIFICATION_PRESENT), "vmclock").notifies
    assert not parse(vmclock_page(flags=~NOTIFICATION_PRESENT & 2**64 - 1), "vmclock").notifies


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        (b"", "ends after 0 bytes"),
        (vmclock_page()[:0x67], "ends after 103 bytes"),
        (vmclock_page()[:0x6F], "within the generation counter"),
        (vmclock_page(magic=0x4B4C4357), "magic"),
        (vmclock_page(version=2), "version 2"),
        (vmclock_page(version=0), "version 0"),
        (vmclock_page(size=0x67), "says that it has 103 bytes"),
        (bytes(4096), "magic"),
    ],
)
def test_broken_page_is_an_error_that_names_the_file(page: bytes, problem: str) -> None:
    with pytest.raises(InputError, match=f"^/dev/vmclock0: .*{problem}"):
        parse(page, "/dev/vmclock0")


def test_old_page_that_ends_before_the_counter_is_understood() -> None:
    assert parse(vmclock_page(flags=0, size=0x68)[:0x68], "vmclock").generation_counter is None


def test_counter_is_eight_little_endian_bytes(guest: FakeGuest, device: VmclockDevice) -> None:
    guest.set_vmclock(counter=0x0102)
    truth: Truth = VmclockCounter(device)
    assert (truth.name, truth.read()) == ("vmclock", b"\x02\x01\0\0\0\0\0\0")


def test_replaced_page_is_read_anew(guest: FakeGuest, device: VmclockDevice) -> None:
    guest.set_vmclock(counter=1)
    first = device.read().generation_counter
    guest.set_vmclock(counter=2)
    assert (first, device.read().generation_counter) == (1, 2)


def test_descriptor_stays_the_same_while_the_page_does(guest: FakeGuest, device: VmclockDevice) -> None:
    guest.set_vmclock()
    fd = device.fileno()
    device.read()
    device.read()
    assert device.fileno() == fd
    assert os.path.samestat(os.fstat(fd), os.stat(f"{guest.paths.devices}/vmclock0"))


def test_device_that_appears_later_is_opened_then(guest: FakeGuest, device: VmclockDevice) -> None:
    with pytest.raises(AbsentError, match="no vmclock device") as caught:
        device.read()
    assert caught.value.hint is not None
    assert "6.13" in caught.value.hint
    guest.set_vmclock(counter=5)
    assert device.read().generation_counter == 5


def test_device_that_goes_away_is_absent(guest: FakeGuest, device: VmclockDevice) -> None:
    guest.set_vmclock()
    device.read()
    Path(f"{guest.paths.devices}/vmclock0").unlink()
    with pytest.raises(AbsentError):
        device.read()


def test_smallest_number_that_can_be_understood_is_taken(guest: FakeGuest, device: VmclockDevice) -> None:
    guest.put(f"{guest.paths.devices}/vmclock0", bytes(4096))
    guest.put(f"{guest.paths.devices}/vmclock10", vmclock_page(counter=10))
    guest.put(f"{guest.paths.devices}/vmclock9", vmclock_page(counter=9))
    guest.put(f"{guest.paths.devices}/vmclock", vmclock_page(counter=1))
    guest.put(f"{guest.paths.devices}/vmclock01", vmclock_page(counter=1))
    assert device.read().generation_counter == 9
    assert device.path.endswith("/vmclock9")


def test_only_device_that_cannot_be_understood_is_an_error(guest: FakeGuest, device: VmclockDevice) -> None:
    guest.put(f"{guest.paths.devices}/vmclock0", b"VCLK")
    with pytest.raises(InputError, match="vmclock0: ends after 4 bytes"):
        device.read()


def test_page_that_stays_odd_is_absent_within_a_bound(guest: FakeGuest, device: VmclockDevice) -> None:
    guest.set_vmclock(seq=2)
    device.read()
    guest.set_vmclock(seq=3)
    with pytest.raises(AbsentError, match="did not finish"):
        device.read()


def test_update_in_progress_is_waited_for(guest: FakeGuest) -> None:
    path = Path(f"{guest.paths.devices}/vmclock0")
    guest.put(str(path), vmclock_page(counter=1, seq=3))

    def finish() -> None:
        # In place, as a hypervisor does it.
        with path.open("r+b") as page:
            page.write(vmclock_page(counter=2, seq=4))

    device = VmclockDevice(guest.paths, update_sec=60)
    hypervisor = threading.Timer(0.05, finish)
    hypervisor.start()
    try:
        page = device.read()
    finally:
        hypervisor.join()
        device.close()
    assert (page.seq_count, page.generation_counter) == (4, 2)


def test_counter_is_absent_with_the_reason_where_the_flags_deny_it(guest: FakeGuest, device: VmclockDevice) -> None:
    guest.set_vmclock(flags=0)
    with pytest.raises(AbsentError, match="flags say that the hypervisor keeps no generation counter"):
        VmclockCounter(device).read()


def test_counter_is_absent_with_the_reason_where_the_page_is_too_small(guest: FakeGuest, device: VmclockDevice) -> None:
    guest.put(f"{guest.paths.devices}/vmclock0", vmclock_page(size=0x68))
    with pytest.raises(AbsentError, match="104 bytes end before the generation counter"):
        VmclockCounter(device).read()


def test_unreadable_device_names_its_mode_and_the_udev_rule() -> None:
    # Not tmp_path: pytest lets nobody else into it, and then the directory would be what is refused.
    with tempfile.TemporaryDirectory() as directory, FakeGuest(Path(directory)) as guest:
        Path(directory).chmod(0o755)
        guest.put(f"{guest.paths.devices}/vmclock0", vmclock_page(), mode=0)
        with unprivileged(), pytest.raises(AbsentError, match=r"Permission denied \(mode 0000\)") as caught:
            VmclockDevice(guest.paths).fileno()
    assert caught.value.hint is not None
    assert 'KERNEL=="vmclock*"' in caught.value.hint


def test_closed_device_leaves_no_descriptor(guest: FakeGuest) -> None:
    guest.put(f"{guest.paths.devices}/vmclock0", b"broken")
    guest.put(f"{guest.paths.devices}/vmclock1", vmclock_page())
    before = len(os.listdir("/proc/self/fd"))
    device = VmclockDevice(guest.paths)
    device.read()
    device.close()
    device.close()
    assert len(os.listdir("/proc/self/fd")) == before
