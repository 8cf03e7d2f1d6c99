# SPDX-License-Identifier: Apache-2.0
"""Hook 50-connections on real sockets in network namespaces."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator

import pytest

from support.netns import Network
from support.tools import need

DESTROY = {"Destroy": "yes"}


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as made:
        made.ip(made.client, "addr add 192.0.2.1/24 dev c0")
        made.ip(made.client, "addr add 2001:db8::1/64 dev c0 nodad")
        made.ip(made.server, "addr add 192.0.2.2/24 dev s0")
        made.ip(made.server, "addr add 2001:db8::2/64 dev s0 nodad")
        yield made


@contextlib.contextmanager
def connected(network: Network, address: str) -> Iterator[tuple[socket.socket, socket.socket, int]]:
    """The client's and the server's end of a connection to the server, and the server's port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    where = network.client if address.startswith("127.") else network.server
    with network.socket(where, lambda: socket.create_server((address, 0), family=family)) as door:
        port = door.getsockname()[1]
        mine = network.socket(network.client, lambda: socket.create_connection((address, port), 5))
        theirs, _ = door.accept()
        with mine, theirs:
            mine.settimeout(3)
            theirs.settimeout(3)
            yield mine, theirs, port


def alive(one: socket.socket, other: socket.socket) -> bool:
    try:
        one.sendall(b"x")
        return other.recv(1) == b"x"
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            raise
        return False


def skip_without_support(done_stderr: str) -> None:
    if "this kernel cannot destroy connections" in done_stderr:
        pytest.skip("this kernel cannot destroy sockets (CONFIG_INET_DIAG_DESTROY)")


@pytest.mark.parametrize("address", ["192.0.2.2", "2001:db8::2"])
def test_inherited_connections_end_at_both_ends(network: Network, address: str) -> None:
    with connected(network, address) as (mine, theirs, _):
        assert alive(mine, theirs)
        done = network.action("connections", settings=DESTROY)
        skip_without_support(done.stderr)
        assert done.returncode == 0, done.stderr
        assert "destroyed 1 TCP connections, kept 0; verified" in done.stdout
        assert not alive(mine, theirs)
        with pytest.raises(ConnectionResetError):
            theirs.recv(1)


def test_listening_sockets_and_loopback_connections_stay(network: Network) -> None:
    with (
        network.socket(network.client, lambda: socket.create_server(("192.0.2.1", 0))) as door,
        connected(network, "127.0.0.1") as (mine, theirs, _),
    ):
        done = network.action("connections", settings=DESTROY)
        assert done.returncode == 0, done.stderr
        assert alive(mine, theirs)
        peer = network.socket(network.server, lambda: socket.create_connection(door.getsockname(), 5))
        peer.close()


@pytest.mark.parametrize("kept", ["port", "network"])
def test_what_the_admin_keeps_stays(network: Network, kept: str) -> None:
    with connected(network, "192.0.2.2") as (mine, theirs, port):
        keep = {"KeepPorts": str(port)} if kept == "port" else {"KeepNetworks": "192.0.2.0/25"}
        done = network.action("connections", settings=DESTROY | keep)
        assert done.returncode == 0, done.stderr
        assert "kept 1" in done.stdout
        assert alive(mine, theirs)


def test_tracked_connections_are_forgotten_except_kept_ones(network: Network) -> None:
    # A rule that looks at the state is what turns tracking on in a namespace.
    nft = need("nft", package="nftables")
    rules = "add table t; add chain t c { type filter hook input priority 0; }; add rule t c ct state new accept"
    if network.run(network.client, nft, rules).returncode != 0:
        pytest.skip("this kernel tracks no connections (CONFIG_NF_CONNTRACK, CONFIG_NF_TABLES)")

    def tracked() -> str:
        return network.run(network.client, "cat", "/proc/sys/net/netfilter/nf_conntrack_count").stdout.strip()

    with (
        connected(network, "192.0.2.2") as (_, _, _),
        connected(network, "192.0.2.2") as (mine, theirs, port),
    ):
        assert tracked() == "2"
        done = network.action("connections", settings=DESTROY | {"KeepPorts": str(port)})
        skip_without_support(done.stderr)
        assert done.returncode == 0, done.stderr
        assert "forgot 1 tracked connections, kept 1" in done.stdout
        assert tracked() == "1"
        assert alive(mine, theirs)


def test_a_dry_run_destroys_nothing(network: Network) -> None:
    with connected(network, "192.0.2.2") as (mine, theirs, _):
        done = network.action("connections", "--dry-run", settings=DESTROY)
        assert done.returncode == 0, done.stderr
        assert "would destroy 1 TCP connections and keep 0" in done.stdout
        assert alive(mine, theirs)


def test_without_configuration_it_is_skipped(network: Network) -> None:
    with connected(network, "192.0.2.2") as (mine, theirs, _):
        done = network.action("connections")
        assert done.returncode == 77
        assert alive(mine, theirs)
