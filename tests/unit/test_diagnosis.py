# SPDX-License-Identifier: Apache-2.0
"""What doctor says about each guest that cannot notice forks at once, and what it tells the admin to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fakeguest import FakeGuest
from support.flattree import grow
from vmfork.cli.diagnosis import Guest, look, next_steps
from vmfork.cli.doctor import Verdict, judge
from vmfork.cli.localview import local_sources
from vmfork.model import Role, SourceStatus

CLOUD_KERNEL = "6.1.0-42-cloud-amd64"


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    with FakeGuest(tmp_path / "guest", generation_id=None) as made:
        made.unbind_driver()
        kernel(made, "6.12.107+deb13-amd64")
        yield made


def kernel(guest: FakeGuest, release: str) -> None:
    guest.put(guest.paths.osrelease, f"{release}\n".encode())


def no_driver(guest: FakeGuest) -> None:
    for attribute in Path(guest.paths.platform_driver).iterdir():
        attribute.unlink()
    Path(guest.paths.platform_driver).rmdir()


def offer_acpi_device(guest: FakeGuest) -> None:
    device = guest.paths.acpi_devices + "/QEMUVGID:00"
    guest.put(f"{device}/modalias", b"acpi:QEMUVGID:VM_GEN_COUNTER:\n")
    guest.put(f"{device}/path", b"\\_SB_.VGEN\n")
    guest.put(f"{device}/hid", b"QEMUVGID\n")


def offer_devicetree_device(guest: FakeGuest) -> None:
    grow(
        """
        / {
            #address-cells = <2>;
            #size-cells = <2>;
            vmgenid {
                compatible = "microsoft,vmgenid";
                reg = <0x0 0x80000000 0x0 0x1000>;
                interrupts = <0 35 1>;
            };
        };
        """,
        Path(guest.paths.device_tree_sysfs),
    )


def advice(guest: FakeGuest) -> str:
    return "\n".join(next_steps(look(guest.paths), local_sources(guest.paths)))


def verdict(guest: FakeGuest, *, runs: bool = True) -> Verdict:
    return judge(local_sources(guest.paths), runs=runs, guest=look(guest.paths), may_look=True, problems=[])


def test_a_guest_without_a_device_is_told_what_to_ask_of_its_host(guest: FakeGuest) -> None:
    assert "-device vmgenid,guid=auto" in advice(guest)
    assert verdict(guest).code == 4


def test_a_module_that_is_not_loaded_is_named(guest: FakeGuest) -> None:
    offer_acpi_device(guest)
    no_driver(guest)
    guest.put(f"{guest.paths.kernel_modules}/6.12.107+deb13-amd64/kernel/drivers/virt/vmgenid.ko.xz", b"x")
    assert "modprobe vmgenid" in advice(guest)


def test_debian_12s_cloud_kernel_is_known_to_have_no_driver(guest: FakeGuest) -> None:
    kernel(guest, CLOUD_KERNEL)
    offer_acpi_device(guest)
    no_driver(guest)
    guest.put(f"{guest.paths.kernel_configs}/config-{CLOUD_KERNEL}", b"# CONFIG_VIRT_DRIVERS is not set\n")
    assert "Debian 12's cloud kernel" in advice(guest)


def test_without_the_kernels_configuration_its_list_of_built_in_drivers_tells_the_same(guest: FakeGuest) -> None:
    kernel(guest, CLOUD_KERNEL)
    offer_acpi_device(guest)
    no_driver(guest)
    guest.put(f"{guest.paths.kernel_modules}/{CLOUD_KERNEL}/modules.builtin", b"kernel/drivers/char/tpm/tpm.ko\n")
    assert "Debian 12's cloud kernel" in advice(guest)


def test_devicetree_before_linux_6_10_is_explained(guest: FakeGuest) -> None:
    kernel(guest, "6.1.0-42-arm64")
    offer_devicetree_device(guest)
    assert "over devicetree it takes Linux 6.10" in advice(guest)


def test_a_driver_that_did_not_take_the_device_points_at_the_hardware_id(guest: FakeGuest) -> None:
    offer_acpi_device(guest)
    assert "its hardware ID may be unknown" in advice(guest)


def test_a_kernel_older_than_the_driver_is_told_so(guest: FakeGuest) -> None:
    kernel(guest, "5.10.0-30-amd64")
    offer_acpi_device(guest)
    no_driver(guest)
    assert "came with 5.18" in advice(guest)


def test_an_unknown_kernel_without_the_driver_gets_both_ways_out(guest: FakeGuest) -> None:
    offer_acpi_device(guest)
    no_driver(guest)
    assert "linux-modules-extra" in advice(guest)


def test_a_vmclock_without_a_counter_is_explained(guest: FakeGuest) -> None:
    guest.set_vmclock(flags=0)
    assert "vmclock has no generation counter" in advice(guest)


def test_a_log_that_does_not_serve_is_explained(guest: FakeGuest) -> None:
    found = Guest(
        release="6.12",
        device="VMGENCTR:00",
        device_is_devicetree=False,
        bound="VMGENCTR:00",
        driver_is_loaded=True,
        module_is_installed=False,
        configured="y",
    )
    kmsg = SourceStatus(name="kmsg", role=Role.EDGE, live=False, detail="refused", hint="run as root")
    assert list(next_steps(found, [kmsg])) == ["kmsg: refused; run as root"]


def test_cannot_notice_comes_before_not_running(guest: FakeGuest) -> None:
    assert verdict(guest, runs=False).code == 4


def test_not_running_comes_before_a_problem(guest: FakeGuest) -> None:
    guest.bind_driver()
    found = judge(
        local_sources(guest.paths), runs=False, guest=look(guest.paths), may_look=True, problems=["something"]
    )
    assert found.code == 3


def test_the_timer_alone_is_fine_with_a_warning(guest: FakeGuest) -> None:
    guest.set_generation_id(bytes(16))
    found = verdict(guest)
    assert found.code == 0
    assert "only by the timer" in found.sentence


def test_without_root_nothing_is_claimed_that_was_not_seen(guest: FakeGuest) -> None:
    found = judge(local_sources(guest.paths), runs=False, guest=look(guest.paths), may_look=False, problems=[])
    assert found.code == 3
    assert "no more can be told" in found.sentence


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"x" * 5000])
def test_a_hostile_kernel_release_does_no_harm(guest: FakeGuest, content: bytes) -> None:
    guest.put(guest.paths.osrelease, content)
    offer_acpi_device(guest)
    no_driver(guest)
    assert advice(guest)
