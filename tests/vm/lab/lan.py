# SPDX-License-Identifier: Apache-2.0
"""A guest as a member of the switch's network under systemd-networkd, and which of vmfork's hooks it runs there."""

from __future__ import annotations

from lab import view
from lab.guest import Guest

# Without a host name of the server's: systemd-hostnamed would be started for it, at each lease of each clone.
_NETWORK = """[Match]
Name=eth0

[Network]
DHCP=ipv4

[DHCPv4]
UseHostname=no
"""


def join(guest: Guest) -> None:
    """Have systemd-networkd take a lease from the switch's server, now and after each boot."""
    view.put(guest, "/etc/systemd/network/20-lan.network", _NETWORK)
    guest.check("systemctl", "enable", "--now", "systemd-networkd.service")
    guest.until("grep", "-q", "^CLIENTID=ff", "/run/systemd/netif/leases/2", what="a lease")


def address(guest: Guest) -> str:
    """The IPv4 address of the guest's network card; it has exactly one."""
    lines = guest.check("sh", "-c", "ip -o addr show dev eth0 | grep -w inet").splitlines()
    (found,) = (line.split()[3].partition("/")[0] for line in lines)
    return found


def mask_all_but(guest: Guest, *hooks: str) -> None:
    """Switch the other shipped hooks off: other tests show them, and they take most of the time."""
    script = "cd /usr/lib/vmfork/hooks.d; for hook in [0-9]*; do ln -s /dev/null /etc/vmfork/hooks.d/$hook; done"
    guest.check("sh", "-ec", f'{script}; cd /etc/vmfork/hooks.d; rm "$@"', "mask", *hooks)
