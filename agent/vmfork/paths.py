# SPDX-License-Identifier: Apache-2.0
"""Every path that vmfork reads or writes, below one root prefix.

With `Paths("")` the paths are those of the running system; with `Paths("/some/dir")` the directory is a complete fake
guest and nothing outside of it is touched. No other module spells a path of the system.
"""

from __future__ import annotations

import os
from typing import overload


class _Below:
    """A path below the root, as a read-only attribute."""

    __slots__ = ("_relative",)

    def __init__(self, relative: str) -> None:
        self._relative = relative

    @overload
    def __get__(self, instance: None, owner: type[Paths]) -> _Below: ...
    @overload
    def __get__(self, instance: Paths, owner: type[Paths]) -> str: ...
    def __get__(self, instance: Paths | None, owner: type[Paths]) -> str | _Below:
        return self if instance is None else instance.root + self._relative


class Paths:
    """The system's paths below `root` ("" is the running system itself)."""

    __slots__ = ("root",)

    def __init__(self, root: str = "") -> None:
        self.root = "" if root in ("", "/") else os.path.abspath(root)

    @classmethod
    def from_environment(cls) -> Paths:
        """The root that VMFORK_ROOT names, else the running system."""
        return cls(os.environ.get("VMFORK_ROOT", ""))

    @property
    def is_fake(self) -> bool:
        """True below a root prefix: netlink, ioctls and the service manager are then left alone."""
        return bool(self.root)

    def at(self, absolute: str) -> str:
        """An absolute path that another file named (a configuration value, a symbolic link), below the root."""
        return self.root + absolute

    # What vmfork publishes (0755) and what it keeps to itself (0700), both in RAM: they travel with a snapshot.
    run_public = _Below("/run/vmfork")
    generation_page = _Below("/run/vmfork/generation")
    public_socket = _Below("/run/vmfork/io.vmfork")
    metrics = _Below("/run/vmfork/metrics.prom")
    sysgenid = _Below("/run/vmfork/sysgenid")
    dev_sysgenid = _Below("/dev/sysgenid")
    run_private = _Below("/run/vmforkd")
    admin_socket = _Below("/run/vmforkd/admin")
    detector_memory = _Below("/run/vmforkd/detector.json")
    react_lock = _Below("/run/vmforkd/react.lock")
    react_hooks = _Below("/run/vmforkd/react.hooks")
    template_mark_run = _Below("/run/vmforkd/template")

    # What survives a power cycle.
    state_dir = _Below("/var/lib/vmfork")
    state = _Below("/var/lib/vmfork/state.json")
    history = _Below("/var/lib/vmfork/history.jsonl")
    template_mark = _Below("/var/lib/vmfork/template")

    # Configuration and hooks; the later directory of each pair wins.
    config_etc = _Below("/etc/vmfork")
    config_run = _Below("/run/vmfork")
    config_lib = _Below("/usr/lib/vmfork")
    hooks_lib = _Below("/usr/lib/vmfork/hooks.d")
    hooks_etc = _Below("/etc/vmfork/hooks.d")

    # Edges.
    kmsg = _Below("/dev/kmsg")
    dmesg_restrict = _Below("/proc/sys/kernel/dmesg_restrict")
    platform_driver = _Below("/sys/bus/platform/drivers/vmgenid")
    acpi_driver = _Below("/sys/bus/acpi/drivers/vmgenid")
    vmgenid_module = _Below("/sys/module/vmgenid")
    osrelease = _Below("/proc/sys/kernel/osrelease")
    kernel_modules = _Below("/lib/modules")
    kernel_configs = _Below("/boot")
    interrupts = _Below("/proc/interrupts")
    gpe05 = _Below("/sys/firmware/acpi/interrupts/gpe05")

    # Truths.
    fw_cfg = _Below("/sys/firmware/qemu_fw_cfg")
    fw_cfg_guid = _Below("/sys/firmware/qemu_fw_cfg/by_name/etc/vmgenid_guid/raw")
    fw_cfg_address = _Below("/sys/firmware/qemu_fw_cfg/by_name/etc/vmgenid_addr/raw")
    device_tree = _Below("/proc/device-tree")
    device_tree_sysfs = _Below("/sys/firmware/devicetree/base")
    acpi_devices = _Below("/sys/bus/acpi/devices")
    acpi_tables = _Below("/sys/firmware/acpi/tables")
    physical_memory = _Below("/dev/mem")
    lockdown = _Below("/sys/kernel/security/lockdown")
    devices = _Below("/dev")
    smbios_uuid = _Below("/sys/class/dmi/id/product_uuid")
    cloud_instance_id = _Below("/var/lib/cloud/data/instance-id")
    boot_id = _Below("/proc/sys/kernel/random/boot_id")

    # The service manager.
    systemd_runs = _Below("/run/systemd/system")

    # The reactor's view of the process table.
    processes = _Below("/proc")

    # The kernel's random number generator.
    urandom = _Below("/dev/urandom")
    random = _Below("/dev/random")
    hwrng = _Below("/dev/hwrng")
    hwrng_current = _Below("/sys/class/misc/hw_random/rng_current")
    entropy_available = _Below("/proc/sys/kernel/random/entropy_avail")
    random_seed = _Below("/var/lib/systemd/random-seed")
    random_seed_service = _Below("/usr/lib/systemd/systemd-random-seed")

    # Clocks.
    ptp_class = _Below("/sys/class/ptp")
    rtc_epoch = _Below("/sys/class/rtc/rtc0/since_epoch")
    adjtime = _Below("/etc/adjtime")
    chronyd_socket = _Below("/run/chrony/chronyd.sock")

    # Identity.
    machine_id = _Below("/etc/machine-id")
    machine_id_run = _Below("/run/machine-id")
    machine_id_dbus = _Below("/var/lib/dbus/machine-id")
    kernel_command_line = _Below("/proc/cmdline")
    system_credentials = _Below("/run/credentials/@system")
    journal_run = _Below("/run/log/journal")
    journal_var = _Below("/var/log/journal")
    sshd_config = _Below("/etc/ssh/sshd_config")
    sshd_pid = _Below("/run/sshd.pid")
    hostname = _Below("/etc/hostname")
    hosts = _Below("/etc/hosts")
    mailname = _Below("/etc/mailname")
