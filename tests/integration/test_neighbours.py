# SPDX-License-Identifier: Apache-2.0
"""Hook 45-neighbours on real interfaces: what a neighbour on the wire sees, and what must survive."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator

import pytest

from support.netns import Network


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as made:
        made.ip(made.client, "addr add 192.0.2.1/24 dev c0")
        made.ip(made.client, "addr add 2001:db8::1/64 dev c0")
        made.ip(made.server, "addr add 192.0.2.2/24 dev s0")
        made.wait_for(lambda: "tentative" not in made.ip(made.client, "-6 addr show dev c0"), what="addresses settle")
        yield made


def mac(network: Network, namespace: str, link: str) -> bytes:
    words = network.ip(namespace, f"-o link show dev {link}").split()
    return bytes.fromhex(words[words.index("link/ether") + 1].replace(":", ""))


def is_arp(operation: int, address: str) -> object:
    packed = socket.inet_aton(address)
    return lambda frame: (
        frame[12:14] == b"\x08\x06"
        and frame[20:22] == struct.pack("!H", operation)
        and frame[28:32] == packed
        and frame[38:42] == packed
    )


def icmp6(frame: bytes) -> tuple[int, str, str] | None:
    """Type, source, and target of a neighbour discovery frame."""
    if frame[12:14] != b"\x86\xdd" or frame[20] != 58:
        return None
    return (
        frame[54],
        socket.inet_ntop(socket.AF_INET6, frame[22:38]),
        socket.inet_ntop(socket.AF_INET6, frame[62:78]) if len(frame) >= 78 else "",
    )


def test_every_ipv4_address_is_announced_by_gratuitous_arp(network: Network) -> None:
    network.ip(network.client, "addr add 192.0.2.77/24 dev c0")
    seen = network.capture(network.server, "s0")
    done = network.action("neighbours")
    assert done.returncode == 0, done.stderr
    for address in ("192.0.2.1", "192.0.2.77"):
        for operation in (1, 2):
            frame = seen.wait(is_arp(operation, address))  # type: ignore[arg-type]
            assert frame is not None, (operation, address)
            assert frame[:6] == b"\xff" * 6
            assert frame[6:12] == frame[22:28] == mac(network, network.client, "c0")


def test_every_ipv6_address_is_announced_before_it_is_checked_again(network: Network) -> None:
    seen = network.capture(network.server, "s0")
    done = network.action("neighbours")
    assert done.returncode == 0, done.stderr
    local = next(
        word.partition("/")[0]
        for word in network.ip(network.client, "-6 addr show dev c0 scope link").split()
        if word.startswith("fe80")
    )
    for address in ("2001:db8::1", local):
        advertised = seen.wait(lambda frame, a=address: icmp6(frame) == (136, a, a))  # type: ignore[misc]
        assert advertised is not None, address
        assert advertised[21] == 255
        assert advertised[58] & 0x20
        assert advertised[80:86] == mac(network, network.client, "c0")
        solicited = seen.wait(lambda frame, a=address: icmp6(frame) == (135, "::", a))  # type: ignore[misc]
        assert solicited is not None, address
        assert seen.frames.index(advertised) < seen.frames.index(solicited)


def test_detection_is_not_waited_for_and_the_address_works_meanwhile(network: Network) -> None:
    network.ip(network.server, "addr add 2001:db8::2/64 dev s0 nodad")
    with network.socket(
        network.client, lambda: socket.create_server(("2001:db8::1", 0), family=socket.AF_INET6)
    ) as door:
        port = door.getsockname()[1]
        peer = network.socket(network.server, lambda: socket.create_connection(("2001:db8::1", port), 5))
        mine, _ = door.accept()
        start = time.monotonic()
        done = network.action("neighbours")
        assert done.returncode == 0, done.stderr
        assert "tentative" in network.ip(network.client, "-6 addr show dev c0"), "the check still runs"
        assert time.monotonic() - start < 5
        with peer, mine:
            # What comes in is taken at once; a neighbour that was forgotten is asked for when the check has ended.
            mine.settimeout(0.5)
            peer.settimeout(6)
            peer.sendall(b"ping")
            assert mine.recv(10) == b"ping"
            mine.sendall(b"pong")
            assert peer.recv(10) == b"pong"


def test_routes_flags_and_lifetimes_survive(network: Network) -> None:
    for command in (
        "addr add 2001:db8:1::1/64 dev c0 noprefixroute metric 77",
        "addr add 2001:db8:2::1/64 dev c0 valid_lft 5000 preferred_lft 4000",
    ):
        network.ip(network.client, command)
    network.wait_for(lambda: "tentative" not in network.ip(network.client, "-6 addr show dev c0"), what="settled")
    for command in (
        "-6 route add 2001:db8:9::/64 via 2001:db8::9 dev c0",
        "-6 route add default via fe80::9 dev c0 src 2001:db8::1 metric 5",
    ):
        network.ip(network.client, command)

    def view() -> tuple[list[str], list[str]]:
        routes = sorted(
            line.partition(" expires")[0].strip() for line in network.ip(network.client, "-6 route").splitlines()
        )
        words = (
            network.ip(network.client, "-o -6 addr show dev c0").replace(" optimistic", "").replace(" tentative", "")
        )
        return routes, sorted(" ".join(line.partition("valid_lft")[0].split()) for line in words.splitlines())

    before = view()
    done = network.action("neighbours")
    assert done.returncode == 0, done.stderr
    assert view() == before
    assert "4" in network.ip(network.client, "-6 addr show to 2001:db8:2::1").partition("valid_lft ")[2][:1]
    assert network.run(network.client, "cat", "/proc/sys/net/ipv6/conf/c0/optimistic_dad").stdout == "0\n"


def test_a_router_keeps_the_address_that_routes_prefer(network: Network) -> None:
    network.ip(network.client, "-6 route add 2001:db8:9::/64 via 2001:db8::9 dev c0 src 2001:db8::1")
    network.run(network.client, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/c0/forwarding")
    done = network.action("neighbours")
    assert done.returncode == 0, done.stderr
    assert "2001:db8::1 is left as it is" in done.stdout
    assert "src 2001:db8::1" in network.ip(network.client, "-6 route show 2001:db8:9::/64")


def test_temporary_addresses_are_renewed(network: Network) -> None:
    network.run(network.client, "sh", "-c", "echo 2 > /proc/sys/net/ipv6/conf/c0/use_tempaddr")
    network.ip(network.client, "addr add 2001:db8:5::1/64 dev c0 valid_lft 5000 preferred_lft 4000 mngtmpaddr")

    def temporary() -> set[str]:
        lines = network.ip(network.client, "-o -6 addr show dev c0 temporary").splitlines()
        return {line.split()[3] for line in lines}

    network.wait_for(temporary, what="a temporary address")
    network.wait_for(lambda: "tentative" not in network.ip(network.client, "-6 addr show dev c0"), what="settled")
    before = temporary()
    done = network.action("neighbours")
    assert done.returncode == 0, done.stderr
    network.wait_for(temporary, what="a new temporary address")
    assert not temporary() & before


def test_learned_neighbours_are_forgotten_and_permanent_ones_stay(network: Network) -> None:
    network.ip(network.client, "neigh add 192.0.2.50 lladdr 02:00:00:00:00:50 dev c0 nud permanent")
    network.ip(network.client, "neigh add 192.0.2.51 lladdr 02:00:00:00:00:51 dev c0 nud stale")
    network.ip(network.client, "neigh add 2001:db8::51 lladdr 02:00:00:00:00:51 dev c0 nud stale")
    done = network.action("neighbours")
    assert done.returncode == 0, done.stderr
    left = network.ip(network.client, "neigh show dev c0")
    assert "192.0.2.50" in left
    assert "192.0.2.51" not in left
    assert "2001:db8::51" not in left


def test_a_dry_run_sends_and_changes_nothing(network: Network) -> None:
    network.ip(network.client, "neigh add 192.0.2.51 lladdr 02:00:00:00:00:51 dev c0 nud stale")
    seen = network.capture(network.server, "s0")
    done = network.action("neighbours", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "would flush the neighbours of c0" in done.stdout
    assert (
        seen.wait(lambda frame: frame[12:14] == b"\x08\x06" or (icmp6(frame) or (0,))[0] in (135, 136), timeout=0.5)
        is None
    )
    assert "192.0.2.51" in network.ip(network.client, "neigh show dev c0")


def test_a_duplicate_is_found(network: Network) -> None:
    # The sibling has the same address: it was never checked there, as after a restore.
    network.ip(network.server, "addr add 2001:db8::1/64 dev s0 nodad")
    done = network.action("neighbours")
    assert done.returncode == 0, done.stderr
    network.wait_for(lambda: "dadfailed" in network.ip(network.client, "-6 addr show dev c0"), what="DAD fails")


def test_without_a_usable_interface_it_is_skipped() -> None:
    with Network() as network:
        network.ip(network.client, "link set c0 down")
        done = network.action("neighbours")
        assert done.returncode == 77
        assert "skipped: no interface" in done.stdout
