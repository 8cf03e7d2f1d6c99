# SPDX-License-Identifier: Apache-2.0
"""The kinds of guest that users run, as specifications ready to boot. Images are built when first asked for."""

from __future__ import annotations

from lab import image
from lab.archive import Packages
from lab.board import BoardSpec
from lab.guest import Spec
from lab.kernel import cloud_kernel
from lab.payload import Payload
from lab.qemu import backports_emulator, host_emulator

# QEMU 7.2 emulates cmpxchg16b in a way that now and then corrupts Linux 6.12.
_X86 = ("-machine", "q35", "-cpu", "Nehalem,-cx16")
_X86_NEW = ("-machine", "q35", "-cpu", "max")
# A systemd guest with vmfork in it has what vmfork itself asks for in modules-load.d.
_FW_CFG = ("qemu_fw_cfg",)

_SYSTEMD_PACKAGES = (
    "systemd", "systemd-sysv", "udev", "dbus", "kmod", "procps", "iproute2", "busybox-static", "openssh-server",
    "openssl", "python3", "python3-pyudev", "python3-systemd", "python3-pyroute2", "stress-ng",
)  # fmt: skip
# A guest as it comes: of vmfork's dependencies it has Python alone, the others are offered by its archive.
_FRESH_PACKAGES = (
    "apt", "systemd", "systemd-sysv", "udev", "dbus", "kmod", "procps", "iproute2", "busybox-static", "openssh-server",
    "python3",
)  # fmt: skip
_OFFERED = ("python3-pyroute2", "python3-pyudev", "python3-systemd")
# Of use to a few tests only, which unpack it for themselves.
_BESIDE = ("network-manager",)
_MINI_PACKAGES = ("busybox-static", "openssl", "python3", "python3-pyudev", "python3-systemd", "python3-pyroute2")


def _systemd_base(suite: str) -> Packages:
    return Packages(
        name=f"root-{suite}-amd64",
        suite=suite,
        architecture="amd64",
        include=_SYSTEMD_PACKAGES,
        installed=True,
        offered=_BESIDE if suite == "trixie" else (),
    )


def _mini_base(suite: str, architecture: str) -> Packages:
    return Packages(name=f"mini-{suite}-{architecture}", suite=suite, architecture=architecture, include=_MINI_PACKAGES)


class Guests:
    """Every kind of guest, with one payload installed (None: the bare guest, for tests of the lab itself)."""

    def __init__(self, made: Payload | None) -> None:
        self._made = made
        self._modules = () if made else _FW_CFG

    def trixie(self, *, vmgenid: bool = True, processors: int = 1) -> Spec:
        """x86, Debian 13, Linux 6.12, systemd; ACPI VM Generation ID."""
        kernel = cloud_kernel("trixie", "amd64")
        made = image.systemd_image(
            "image-trixie-amd64", _systemd_base("trixie"), kernel, self._made, modules=self._modules
        )
        return Spec(
            name="trixie-amd64",
            image=made,
            emulator=host_emulator("x86_64"),
            machine=_X86,
            processors=processors,
            acpi_vmgenid=vmgenid,
        )

    def bookworm(self) -> Spec:
        """x86, Debian 12, Linux 6.1, whose cloud kernel has no driver for the VM Generation ID."""
        kernel = cloud_kernel("bookworm", "amd64")
        made = image.systemd_image(
            "image-bookworm-amd64", _systemd_base("bookworm"), kernel, self._made, modules=self._modules
        )
        return Spec(
            name="bookworm-amd64", image=made, emulator=host_emulator("x86_64"), machine=_X86, acpi_vmgenid=True
        )

    def fresh(self, suite: str) -> Spec:
        """x86, a Debian release that vmfork is yet to be installed in; its archive offers what vmfork depends on."""
        base = Packages(
            name=f"fresh-{suite}-amd64",
            suite=suite,
            architecture="amd64",
            include=_FRESH_PACKAGES,
            installed=True,
            offered=_OFFERED,
        )
        made = image.systemd_image(f"image-fresh-{suite}-amd64", base, cloud_kernel(suite, "amd64"), None)
        return Spec(
            name=f"fresh-{suite}-amd64",
            image=made,
            emulator=host_emulator("x86_64"),
            machine=_X86,
            acpi_vmgenid=True,
        )

    def backports(self) -> Spec:
        """x86, Debian 13 with the kernel and the QEMU of backports: VM Generation ID, and a vmclock without counter."""
        kernel = cloud_kernel("trixie", "amd64", backports=True)
        # Without udev nobody loads the driver that the ACPI device asks for.
        modules = (*_FW_CFG, "ptp_vmclock")
        made = image.mini_image(
            "image-backports-amd64", _mini_base("trixie", "amd64"), kernel, self._made, modules=modules
        )
        return Spec(
            name="backports-amd64",
            image=made,
            emulator=backports_emulator(),
            machine=_X86_NEW,
            acpi_vmgenid=True,
            acpi_vmclock=True,
        )

    def arm64(self, *, backports: bool = False, vmgenid: bool = True, vmclock: bool = False) -> Spec:
        """arm64, Debian 13, devicetree; the devices it has are as asked for."""
        kernel = cloud_kernel("trixie", "arm64", backports=backports)
        suffix = "backports-arm64" if backports else "trixie-arm64"
        made = image.mini_image(f"image-{suffix}", _mini_base("trixie", "arm64"), kernel, self._made)
        return Spec(
            name=f"{suffix}{'-vmgenid' if vmgenid else ''}{'-vmclock' if vmclock else ''}",
            image=made,
            emulator=host_emulator("aarch64"),
            board=BoardSpec(vmgenid=vmgenid, vmclock=vmclock),
        )
