# SPDX-License-Identifier: Apache-2.0
"""Every path that vmfork reads or writes, below one root prefix.

With `Paths("")` the paths are those of the running system; with `Paths("/some/dir")` the directory is a complete fake
guest and nothing outside of it is touched. No other module spells a path of the system.
"""

from __future__ import annotations

import os


class _Below:
    """A path below the root, computed when an instance of Paths is asked for it."""

    __slots__ = ("_relative",)

    def __init__(self, relative: str) -> None:
        self._relative = relative

    def __get__(self, instance: Paths, _owner: type[Paths]) -> str:
        return instance.root + self._relative


def _below(relative: str) -> str:
    # Typed as what it gives. The overloads that would say so exactly need the typing module, whose import costs more
    # than all else that a program pays for its first Guard.
    return _Below(relative)  # type: ignore[return-value]


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
    run_public = _below("/run/vmfork")
    generation_page = _below("/run/vmfork/generation")
    public_socket = _below("/run/vmfork/io.vmfork")
    metrics = _below("/run/vmfork/metrics.prom")
    sysgenid = _below("/run/vmfork/sysgenid")
    dev_sysgenid = _below("/dev/sysgenid")
    run_private = _below("/run/vmforkd")
    admin_socket = _below("/run/vmforkd/admin")
    detector_memory = _below("/run/vmforkd/detector.json")
    detector_intent = _below("/run/vmforkd/detector.intent")
    react_lock = _below("/run/vmforkd/react.lock")
    react_hooks = _below("/run/vmforkd/react.hooks")
    template_mark_run = _below("/run/vmforkd/template")

    # What survives a power cycle.
    state_dir = _below("/var/lib/vmfork")
    state = _below("/var/lib/vmfork/state.json")
    history = _below("/var/lib/vmfork/history.jsonl")
    template_mark = _below("/var/lib/vmfork/template")

    # Configuration and hooks; the later directory of each pair wins.
    config_etc = _below("/etc/vmfork")
    config_run = _below("/run/vmfork")
    config_lib = _below("/usr/lib/vmfork")
    hooks_lib = _below("/usr/lib/vmfork/hooks.d")
    hooks_etc = _below("/etc/vmfork/hooks.d")

    # Edges.
    kmsg = _below("/dev/kmsg")
    platform_driver = _below("/sys/bus/platform/drivers/vmgenid")
    acpi_driver = _below("/sys/bus/acpi/drivers/vmgenid")
    vmgenid_module = _below("/sys/module/vmgenid")
    osrelease = _below("/proc/sys/kernel/osrelease")
    kernel_modules = _below("/lib/modules")
    kernel_configs = _below("/boot")
    interrupts = _below("/proc/interrupts")
    gpe05 = _below("/sys/firmware/acpi/interrupts/gpe05")

    # Truths.
    fw_cfg = _below("/sys/firmware/qemu_fw_cfg")
    fw_cfg_guid = _below("/sys/firmware/qemu_fw_cfg/by_name/etc/vmgenid_guid/raw")
    fw_cfg_address = _below("/sys/firmware/qemu_fw_cfg/by_name/etc/vmgenid_addr/raw")
    device_tree = _below("/proc/device-tree")
    device_tree_sysfs = _below("/sys/firmware/devicetree/base")
    acpi_devices = _below("/sys/bus/acpi/devices")
    acpi_tables = _below("/sys/firmware/acpi/tables")
    physical_memory = _below("/dev/mem")
    lockdown = _below("/sys/kernel/security/lockdown")
    devices = _below("/dev")
    smbios_uuid = _below("/sys/class/dmi/id/product_uuid")
    cloud_instance_id = _below("/var/lib/cloud/data/instance-id")
    boot_id = _below("/proc/sys/kernel/random/boot_id")

    # The service manager.
    systemd_runs = _below("/run/systemd/system")

    # The reactor's view of the process table.
    processes = _below("/proc")

    # The kernel's random number generator.
    urandom = _below("/dev/urandom")
    random = _below("/dev/random")
    hwrng = _below("/dev/hwrng")
    hwrng_current = _below("/sys/class/misc/hw_random/rng_current")
    entropy_available = _below("/proc/sys/kernel/random/entropy_avail")
    random_seed = _below("/var/lib/systemd/random-seed")
    random_seed_service = _below("/usr/lib/systemd/systemd-random-seed")

    # Clocks.
    ptp_class = _below("/sys/class/ptp")
    rtc_epoch = _below("/sys/class/rtc/rtc0/since_epoch")
    adjtime = _below("/etc/adjtime")
    chronyd_socket = _below("/run/chrony/chronyd.sock")

    # Identity.
    machine_id = _below("/etc/machine-id")
    machine_id_run = _below("/run/machine-id")
    machine_id_dbus = _below("/var/lib/dbus/machine-id")
    kernel_command_line = _below("/proc/cmdline")
    system_credentials = _below("/run/credentials/@system")
    journal_run = _below("/run/log/journal")
    journal_var = _below("/var/log/journal")
    sshd_config = _below("/etc/ssh/sshd_config")
    sshd_pid = _below("/run/sshd.pid")
    hostname = _below("/etc/hostname")
    hosts = _below("/etc/hosts")
    mailname = _below("/etc/mailname")

    # Leases, connections and keys of the network.
    ipv4_settings = _below("/proc/sys/net/ipv4/conf")
    ipv6_settings = _below("/proc/sys/net/ipv6/conf")
    conntrack_count = _below("/proc/sys/net/netfilter/nf_conntrack_count")
    networkd_links = _below("/run/systemd/netif/links")
    networkd_leases = _below("/run/systemd/netif/leases")
    network_manager_state = _below("/var/lib/NetworkManager")
    dhclient_state = _below("/var/lib/dhcp")
    dhcpcd_state = _below("/var/lib/dhcpcd")
    networkd_etc = _below("/etc/systemd/network")
    wireguard_etc = _below("/etc/wireguard")
    control_groups = _below("/sys/fs/cgroup")
