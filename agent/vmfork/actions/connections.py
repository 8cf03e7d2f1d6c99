# SPDX-License-Identifier: Apache-2.0
"""Ends the TCP connections that this machine shares with its siblings, and forgets what the firewall tracked of them.

Only where Destroy= says so. Listening sockets, connections within this machine, and what KeepPorts= and KeepNetworks=
name are left alone. That the connections are gone is checked by listing them again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

from vmfork import settings
from vmfork.actions import conntrack, rawnetlink, sock_diag
from vmfork.actions.contract import Action, ActionContext
from vmfork.actions.rawnetlink import Channel
from vmfork.errors import ActionError, ActionSkipped


def after_fork(context: ActionContext) -> None:
    if not context.get(settings.CONNECTIONS_DESTROY):
        raise ActionSkipped("not configured (Destroy=yes)")
    if context.paths.is_fake:
        raise ActionSkipped("the network belongs to the machine around this root")
    if context.early:
        raise ActionSkipped("a machine that boots has no connections yet")
    _destroy(context)
    if context.get(settings.CONNECTIONS_CONNTRACK):
        _forget_tracked(context)


def is_kept(context: ActionContext, addresses: Iterable[IPv4Address | IPv6Address], ports: Iterable[int]) -> bool:
    """Whether the admin wants to keep what has one of these addresses or ports at either end."""
    kept_ports, networks = context.get(settings.CONNECTIONS_KEEP_PORTS), context.get(settings.CONNECTIONS_KEEP_NETWORKS)
    return not kept_ports.isdisjoint(ports) or any(address in network for address in addresses for network in networks)


def _destroy(context: ActionContext) -> None:
    with Channel(rawnetlink.SOCK_DIAG) as channel:
        found = [connection for connection in sock_diag.connections(channel) if not connection.is_local]
        ends = {c: ((c.local, c.remote), (c.local_port, c.remote_port)) for c in found}
        doomed = [connection for connection in found if not is_kept(context, *ends[connection])]
        kept = len(found) - len(doomed)
        if context.would(f"destroy {len(doomed)} TCP connections and keep {kept}"):
            return
        gone = sum(sock_diag.destroy(channel, connection) for connection in doomed)
        left = {connection.identity for connection in sock_diag.connections(channel)}
    alive = [connection for connection in doomed if connection.identity in left]
    if alive:
        raise ActionError(f"{len(alive)} TCP connections are still there, such as {alive[0]}")
    context.say(f"destroyed {gone} TCP connections, kept {kept}; verified")


def _forget_tracked(context: ActionContext) -> None:
    # Without this file connection tracking is not loaded, and asking for it would load it.
    if not os.path.exists(context.paths.conntrack_count):
        return
    with conntrack.open_channel() as channel:
        found = [entry for entry in conntrack.entries(channel) if not all(a.is_loopback for a in entry.addresses)]
        doomed = [entry for entry in found if not is_kept(context, entry.addresses, entry.ports)]
        if context.would(f"forget {len(doomed)} tracked connections"):
            return
        gone = sum(conntrack.delete(channel, entry) for entry in doomed)
    context.say(f"forgot {gone} tracked connections, kept {len(found) - len(doomed)}")


ACTION = Action(
    name="connections",
    hook="50-connections",
    summary="Destroy inherited TCP connections and forget tracked ones, where the admin asks for it.",
    keys=(
        settings.CONNECTIONS_DESTROY,
        settings.CONNECTIONS_CONNTRACK,
        settings.CONNECTIONS_KEEP_PORTS,
        settings.CONNECTIONS_KEEP_NETWORKS,
    ),
    after_fork=after_fork,
)
