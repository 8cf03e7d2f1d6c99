# SPDX-License-Identifier: Apache-2.0
"""Every setting of vmfork.conf: section, key, default, how its text is understood, one sentence for the manual.

This table is the only place where a setting is named. The loader (config.py), vmfork.conf(5), `vmforkctl cat-config`
and the shell completion are made from it. The sections `[Hook NN-name]` take the keys of `HOOK` and, for the shipped
hooks, the rows of `HOOK_OWN`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmfork.annotations import Any, Generic, TypeVar
from vmfork.values import boolean, choice, command, integer, networks, ports, seconds_or_zero, text, units, words
from vmfork.values import seconds as seconds

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting(Generic[T]):
    """One setting; `parse` raises ValueError with what it wanted, and must accept `default`."""

    section: str
    key: str
    default: str
    parse: Callable[[str], T]
    summary: str


POLL_INTERVAL_SEC = Setting(
    section="Detect",
    key="PollIntervalSec",
    default="1",
    parse=seconds,
    summary="How often truths are read while one of them has no live edge; with a live edge the daemon never polls.",
)
PHYSICAL_MEMORY = Setting(
    section="Detect",
    key="PhysicalMemory",
    default="auto",
    parse=choice("auto", "yes", "no"),
    summary="Whether the generation ID may be read from /dev/mem; auto does so only where no other one is readable.",
)
UEVENT = Setting(
    section="Detect",
    key="Uevent",
    default="auto",
    parse=choice("auto", "no"),
    summary="Whether to listen for the kernel's NEW_VMGENID=1 uevent (Linux 6.8.0 to 6.8.7 and some vendors).",
)
SYSGENID = Setting(
    section="Publish",
    key="SysGenId",
    default="no",
    parse=boolean,
    summary="Whether to offer /dev/sysgenid to programs linked to AWS-LC; read docs/library.md about its hazard first.",
)
METRICS = Setting(
    section="Publish",
    key="Metrics",
    default="yes",
    parse=boolean,
    summary="Whether to keep /run/vmfork/metrics.prom for a Prometheus textfile collector.",
)
IDENTITY = Setting(
    section="React",
    key="Identity",
    default="auto",
    parse=choice("auto", "rotate", "keep"),
    summary="Whether a fork gives this guest a new identity; auto does so only with evidence that it is a clone.",
)
TEMPLATE = Setting(
    section="React",
    key="Template",
    default="no",
    parse=boolean,
    summary="Whether this guest is a template, so that every fork of it is a clone that needs its own identity.",
)
TIMEOUT_SEC = Setting(
    section="React",
    key="TimeoutSec",
    default="30",
    parse=seconds,
    summary="How long a hook may run before it is told to end; five seconds later it is killed.",
)
ACK_TIMEOUT_SEC = Setting(
    section="React",
    key="AckTimeoutSec",
    default="10",
    parse=seconds,
    summary="How long the tracked subscribers may take to acknowledge a fork before it counts as settled without them.",
)
SPREAD_SEC = Setting(
    section="React",
    key="SpreadSec",
    default="0",
    parse=seconds_or_zero,
    summary="Window after the fork over which clones spread what they ask of shared servers, by fork token; 0 is off. "
    "Hooks that come after one that waits begin later, too.",
)
# The hooks that wait for this clone's turn in that window; it comes on top of their time-out.
SPREADING_HOOKS = frozenset(("30-hostname", "35-mac-address", "40-leases", "55-wireguard"))

GENERAL: tuple[Setting[float] | Setting[str] | Setting[bool], ...] = (
    POLL_INTERVAL_SEC,
    PHYSICAL_MEMORY,
    UEVENT,
    SYSGENID,
    METRICS,
    IDENTITY,
    TEMPLATE,
    TIMEOUT_SEC,
    ACK_TIMEOUT_SEC,
    SPREAD_SEC,
)

HOOK_ENABLE = Setting(
    section="Hook",
    key="Enable",
    default="auto",
    parse=choice("auto", "yes", "no"),
    summary="Whether the hook runs; auto leaves it to the hook, which skips what this guest does not have.",
)
HOOK_TIMEOUT_SEC = Setting(
    section="Hook",
    key="TimeoutSec",
    default="",
    parse=lambda text: seconds(text) if text else None,
    summary="The time-out of this hook; without it, TimeoutSec= of [React].",
)


# Keys of the shipped hooks beside Enable= and TimeoutSec=; the section names the hook.
CLOCK_THRESHOLD_MS = Setting(
    section="Hook 15-clock",
    key="ThresholdMs",
    default="100",
    parse=integer(1, 86_400_000),
    summary="How many milliseconds the clock must be wrong before it is stepped; at least 1500 where only an RTC is.",
)
CLOCK_DEVICES = Setting(
    section="Hook 15-clock",
    key="PtpDevices",
    default="auto",
    parse=words,
    summary="PTP clocks to trust, such as /dev/ptp0; auto takes those of the hypervisor and no network card's.",
)
MACHINE_ID_RESTART = Setting(
    section="Hook 20-machine-id",
    key="RestartUnits",
    default="systemd-networkd.service systemd-journald.service systemd-resolved.service",
    parse=units,
    summary="Running units that remember the machine ID and are restarted, in this order.",
)
SSH_VERIFY = Setting(
    section="Hook 25-ssh-host-keys",
    key="Verify",
    default="yes",
    parse=boolean,
    summary="Whether to ask the sshd that listens on this machine which keys it presents afterwards.",
)
HOSTNAME_TEMPLATE = Setting(
    section="Hook 30-hostname",
    key="Template",
    default="",
    parse=text,
    summary="The new host name, in which %t is the fork token (%8t: its first 8 hex digits); empty: no new name.",
)
HOSTNAME_COMMAND = Setting(
    section="Hook 30-hostname",
    key="Command",
    default="",
    parse=command,
    summary="A command that prints the new host name; it gets the hook's environment.",
)
MAC_INTERFACES = Setting(
    section="Hook 35-mac-address",
    key="Interfaces",
    default="",
    parse=words,
    summary="Network interfaces that get a new MAC address, as shell patterns such as eth*; empty: none.",
)
MAC_TEMPLATE = Setting(
    section="Hook 35-mac-address",
    key="Template",
    default="%t",
    parse=text,
    summary="The new MAC address: %t makes it from fork token and interface; 52:54:00:%t keeps the given bytes.",
)
MAC_COMMAND = Setting(
    section="Hook 35-mac-address",
    key="Command",
    default="",
    parse=command,
    summary="A command that prints the new MAC address of the interface named by its last argument.",
)
LEASES_WAIT_SEC = Setting(
    section="Hook 40-leases",
    key="WaitSec",
    default="10",
    parse=seconds,
    summary="How long to wait for the server's answer before the lease counts as not renewed.",
)
CONNECTIONS_DESTROY = Setting(
    section="Hook 50-connections",
    key="Destroy",
    default="no",
    parse=boolean,
    summary="Whether to end all TCP connections; peers get a reset, also the peers of a sibling with the same address.",
)
CONNECTIONS_CONNTRACK = Setting(
    section="Hook 50-connections",
    key="Conntrack",
    default="yes",
    parse=boolean,
    summary="Whether to forget the firewall's tracked connections as well, where Destroy=yes.",
)
CONNECTIONS_KEEP_PORTS = Setting(
    section="Hook 50-connections",
    key="KeepPorts",
    default="",
    parse=ports,
    summary="Ports, at either end, of connections to leave alone, such as 22.",
)
CONNECTIONS_KEEP_NETWORKS = Setting(
    section="Hook 50-connections",
    key="KeepNetworks",
    default="",
    parse=networks,
    summary="Networks or addresses, at either end, of connections to leave alone, such as 10.0.0.0/8.",
)
WIREGUARD_INTERFACES = Setting(
    section="Hook 55-wireguard",
    key="Interfaces",
    default="",
    parse=words,
    summary="WireGuard interfaces that get a new private key, as shell patterns such as wg*; empty: none.",
)
WIREGUARD_PUBLISH = Setting(
    section="Hook 55-wireguard",
    key="PublishCommand",
    default="",
    parse=command,
    summary="A command that tells the peers; its last arguments are interface, new and old public key.",
)
WIREGUARD_PERSIST = Setting(
    section="Hook 55-wireguard",
    key="Persist",
    default="yes",
    parse=boolean,
    summary="Whether to write the new key to the interface's file in /etc/wireguard or /etc/systemd/network.",
)
SESSION_KEYS_SERVERS = Setting(
    section="Hook 60-session-keys",
    key="Servers",
    default="nginx haproxy apache2 postfix dovecot exim4",
    parse=words,
    summary="Which of the known TLS servers to reload where they run.",
)
SERVICES_RESTART = Setting(
    section="Hook 70-services",
    key="Restart",
    default="",
    parse=units,
    summary="Running units to restart after each fork.",
)
SERVICES_RELOAD = Setting(
    section="Hook 70-services",
    key="Reload",
    default="",
    parse=units,
    summary="Running units to reload after each fork.",
)
SERVICES_WAIT_SEC = Setting(
    section="Hook 70-services",
    key="WaitSec",
    default="20",
    parse=seconds,
    summary="How long to wait until the restarted and reloaded units are up again.",
)

# Every row above whose section names a hook, in this order.
HOOK_OWN: tuple[Setting[Any], ...] = tuple(
    row for row in tuple(globals().values()) if isinstance(row, Setting) and row.section.startswith("Hook ")
)
