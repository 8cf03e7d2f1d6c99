# SPDX-License-Identifier: Apache-2.0
"""Hook 35-mac-address on a real interface: the IPv6 addresses that came from the old MAC address do not stay."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

import pytest

from support.netns import Network
from vmfork.actions.ipv6_eui64 import interface_identifier

SETTINGS = {"Interfaces": "c0"}


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as made:
        made.wait_for(lambda: link_local(made) is not None, what="a link-local address")
        yield made


def link_local(network: Network) -> str | None:
    words = network.ip(network.client, "-o -6 addr show dev c0 scope link").split()
    return words[words.index("inet6") + 1] if words else None


def mac(network: Network) -> str:
    words = network.ip(network.client, "-o link show dev c0").split()
    return words[words.index("link/ether") + 1]


def of(mac_address: str, prefix: bytes = b"\xfe\x80" + bytes(6)) -> str:
    """The address that the kernel makes of a MAC address."""
    return str(ipaddress.IPv6Address(prefix + interface_identifier(mac_address)))


def setting(network: Network, name: str, value: str) -> None:
    path = f"/proc/sys/net/ipv6/conf/c0/{name}"
    assert network.run(network.client, "sh", "-c", f"echo {value} >{path}").returncode == 0


def test_the_identifier_is_that_of_rfc_4291() -> None:
    assert interface_identifier("34:56:78:9a:bc:de").hex() == "365678fffe9abcde"


def test_the_link_local_address_is_that_of_the_new_mac_address(network: Network) -> None:
    old = mac(network)
    assert link_local(network) == f"{of(old)}/64"
    done = network.action("mac-address", settings=SETTINGS)
    assert done.returncode == 0, done.stderr
    assert mac(network) != old
    assert link_local(network) == f"{of(mac(network))}/64"
    assert f"took away {of(old)}" in done.stdout


def test_what_a_router_gave_a_prefix_for_goes_and_what_an_admin_set_stays(network: Network) -> None:
    prefix, other = (ipaddress.ip_network(f"2001:db8:{number}::/64").network_address.packed[:8] for number in (1, 2))
    advertised, static = of(mac(network), prefix), of(mac(network), other)
    network.ip(network.client, f"addr add {advertised}/64 dev c0 valid_lft 600 preferred_lft 300")
    network.ip(network.client, f"addr add {static}/64 dev c0")
    network.ip(network.client, "addr add 2001:db8:1::5/64 dev c0 valid_lft 600 preferred_lft 300")
    done = network.action("mac-address", settings=SETTINGS)
    assert done.returncode == 0, done.stderr
    shown = network.ip(network.client, "-6 addr show dev c0")
    assert advertised not in shown
    assert static in shown
    assert "2001:db8:1::5/64" in shown


def test_killed_after_the_change_it_is_completed_by_the_next_run(network: Network) -> None:
    assert network.action("mac-address", settings=SETTINGS).returncode == 0
    network.ip(network.client, f"addr del {link_local(network)} dev c0")
    assert network.action("mac-address", settings=SETTINGS).returncode == 0
    assert link_local(network) == f"{of(mac(network))}/64"


def test_where_the_kernel_makes_no_addresses_none_is_made(network: Network) -> None:
    setting(network, "addr_gen_mode", "1")
    done = network.action("mac-address", settings=SETTINGS)
    assert done.returncode == 0, done.stderr
    assert link_local(network) is None


def test_a_dry_run_takes_nothing_away(network: Network) -> None:
    before = link_local(network)
    assert network.action("mac-address", "--dry-run", settings=SETTINGS).returncode == 0
    assert link_local(network) == before


def test_without_ipv6_the_mac_address_is_new_all_the_same(network: Network) -> None:
    setting(network, "disable_ipv6", "1")
    old = mac(network)
    done = network.action("mac-address", settings=SETTINGS)
    assert done.returncode == 0, done.stderr
    assert mac(network) != old
    assert link_local(network) is None
