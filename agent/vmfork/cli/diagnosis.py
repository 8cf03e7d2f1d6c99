# SPDX-License-Identifier: Apache-2.0
"""What keeps a fork from being noticed on this guest, and what the admin can do about it.

Looks at what the hypervisor offers (an ACPI or devicetree device), what the kernel makes of it (driver, module, build
configuration) and what this process may read. Changes nothing and never raises for what it finds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vmfork import atomicfile
from vmfork.edges.kmsg import bound_device
from vmfork.errors import AbsentError, InputError
from vmfork.model import Role, SourceStatus
from vmfork.paths import Paths
from vmfork.truths.acpi import find_device
from vmfork.truths.devicetree import VMGENID, locate

_SUFFIXES = ("", ".xz", ".zst", ".gz")


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """What was found out about this guest. `device` names the vmgenid device that the hypervisor offers, if any."""

    release: str
    device: str | None
    device_is_devicetree: bool
    bound: str | None
    driver_is_loaded: bool
    module_is_installed: bool
    configured: str | None

    @property
    def version(self) -> tuple[int, int]:
        match = re.match(r"(\d{1,6})\.(\d{1,6})", self.release)
        return (int(match[1]), int(match[2])) if match else (0, 0)


def look(paths: Paths) -> Guest:
    """Find out about this guest."""
    release = _line(paths.osrelease) or os.uname().release
    device, is_tree = _device(paths)
    return Guest(
        release=release,
        device=device,
        device_is_devicetree=is_tree,
        bound=bound_device(paths),
        driver_is_loaded=any(map(os.path.isdir, (paths.platform_driver, paths.acpi_driver))),
        module_is_installed=any(
            os.path.exists(f"{paths.kernel_modules}/{release}/kernel/drivers/virt/vmgenid.ko{suffix}")
            for suffix in _SUFFIXES
        ),
        configured=_option(f"{paths.kernel_configs}/config-{release}", "CONFIG_VMGENID")
        or _built_in(f"{paths.kernel_modules}/{release}/modules.builtin"),
    )


def _device(paths: Paths) -> tuple[str | None, bool]:
    try:
        found = find_device(paths)
        return f"{found.name} ({found.path})", False
    except (AbsentError, InputError):
        pass
    try:
        return locate(paths, VMGENID).node, True
    except (AbsentError, InputError):
        return None, False


def _line(path: str) -> str | None:
    try:
        return atomicfile.read_bounded(path, 256).decode("ascii", "replace").strip()
    except (OSError, InputError):
        return None


def _option(path: str, name: str) -> str | None:
    """y, m or n as the kernel was built; None where its configuration is not installed."""
    try:
        text = atomicfile.read_bounded(path, 4 << 20).decode("ascii", "replace")
    except (OSError, InputError):
        return None
    match = re.search(rf"^{name}=([ym])$", text, re.MULTILINE)
    return match[1] if match else "n"


def _built_in(path: str) -> str | None:
    """y or n by the list of what the kernel has built in; None where the list is not installed."""
    try:
        text = atomicfile.read_bounded(path, 4 << 20).decode("ascii", "replace")
    except (OSError, InputError):
        return None
    return "y" if "/virt/vmgenid.ko" in text else "n"


def next_steps(guest: Guest, sources: Sequence[SourceStatus]) -> Iterator[str]:
    """What would make more sources live, the most useful first."""
    if guest.bound is None:
        yield from _about_the_driver(guest)
    kmsg = next((one for one in sources if one.name == "kmsg"), None)
    if kmsg is not None and not kmsg.live and guest.bound is not None:
        yield f"kmsg: {kmsg.detail}; {kmsg.hint}" if kmsg.hint else f"kmsg: {kmsg.detail}"
    for one in sources:
        if not one.live and one.hint and one.name != "kmsg":
            yield f"{one.name}: {one.hint}"
        elif not one.live and one.name == "vmclock" and one.role is Role.TRUTH and "counter" in one.detail:
            yield "vmclock: the host's vmclock has no generation counter; a newer hypervisor may offer one"


def _about_the_driver(guest: Guest) -> Iterator[str]:
    if guest.device is None:
        yield (
            "ask for a generation ID on the host: QEMU -device vmgenid,guid=auto; libvirt <genid/>; "
            "Firecracker, Hyper-V and Xen have their own"
        )
        return
    if guest.device_is_devicetree and guest.version < (6, 10):
        yield f"Linux {guest.release} finds this device over ACPI only; over devicetree it takes Linux 6.10 or newer"
    elif guest.driver_is_loaded:
        yield (
            f"the vmgenid driver is there but did not take {guest.device}: its hardware ID may be unknown to "
            f"Linux {guest.release}; see `dmesg | grep -i vmgenid`"
        )
    elif guest.module_is_installed:
        yield "modprobe vmgenid, and list it in /etc/modules-load.d"
    elif guest.configured == "n":
        cloud = " (Debian 12's cloud kernel is one; linux-image-amd64 has it)" if "cloud" in guest.release else ""
        yield f"this kernel was built without the vmgenid driver{cloud}: boot one with CONFIG_VMGENID"
    elif guest.version < (5, 18):
        yield f"Linux {guest.release} is older than the vmgenid driver, which came with 5.18"
    else:
        yield (
            "no vmgenid driver is loaded: try modprobe vmgenid (Ubuntu has it in linux-modules-extra), "
            "or boot a kernel with CONFIG_VMGENID"
        )
