# SPDX-License-Identifier: Apache-2.0
"""What the DHCP clients have in common: their plan, the wait for a lease, addresses of leases that are over.

The plan's DUID is always random (RFC 6355): what dhclient and dhcpcd would make of the MAC address and the time, or of
the hypervisor's UUID, can be the same in every clone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vmfork.actions import netlink, processes
from vmfork.actions.contract import ActionContext
from vmfork.actions.netlink import Address
from vmfork.errors import ActionError

_ARRIVAL_SEC = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What all clients are told: whether the identity rotates, the new DUID then, and how long to wait for a lease."""

    rotate: bool
    duid: bytes
    wait_sec: float


def wait_for_lease(context: ActionContext, plan: Plan, condition: Callable[[], object]) -> bool:
    """Wait until a lease is there, within the plan's time and the hook's."""
    return processes.wait_until(condition, timeout=context.run.remaining(plan.wait_sec))


def leased_addresses(index: int) -> tuple[Address, ...]:
    """The addresses with a lifetime of one interface: what leases gave it, and IPv6 routers."""
    if not netlink.is_installed():
        return ()
    with netlink.socket() as route:
        return tuple(address for address in netlink.addresses(route, index) if not address.permanent)


def drop_replaced(
    context: ActionContext, plan: Plan, name: str, before: tuple[Address, ...], *, version: int, leased: str | None
) -> None:
    """Take away what an old lease gave an interface, once the new lease's address is there.

    A client that lost its memory of the old lease leaves its address in place, and siblings have the same one. `leased`
    is the new address where it is known; otherwise any address that was not there counts.
    """
    old = {a.text: a for a in before if a.version == version and (version == 4 or a.prefix == 128)}
    if not old:
        return
    index = before[0].index

    def arrived() -> bool:
        now = {address.text for address in leased_addresses(index) if address.version == version}
        return leased in now if leased is not None else bool(now - old.keys())

    wanted = plan.wait_sec if leased is not None else _ARRIVAL_SEC
    if not processes.wait_until(arrived, timeout=context.run.remaining(wanted)):
        if leased is not None:
            raise ActionError(f"{name}: has a lease of {leased}, but not the address")
        return
    now = {address.text: address for address in leased_addresses(index)}
    gone = [a for text, a in old.items() if text != leased and text in now and now[text].updated == a.updated]
    with netlink.socket() as route, _promotion(context, name):
        for address in gone:
            netlink.remove_address(route, address)
            context.say(f"{name}: took away {address.text}, the old lease's address")


@contextlib.contextmanager
def _promotion(context: ActionContext, name: str) -> Iterator[None]:
    """Without promotion, the kernel takes all other addresses of a network away together with its first one."""
    path = os.path.join(context.paths.ipv4_settings, name, "promote_secondaries")
    try:
        with open(path, "r+", encoding="ascii") as file:
            before = file.read(16)
            file.seek(0)
            file.write("1")
    except OSError as error:
        raise ActionError(f"{path}: cannot be set: {error.strerror}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError), open(path, "w", encoding="ascii") as file:
            file.write(before)


def index_of(name: str) -> int | None:
    """The index of an interface, None if there is none of that name."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def name_of(index: int) -> str | None:
    """The name of an interface, None if there is none with that index."""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return None


def wait_for_restart(context: ActionContext, unit: str, *, wait_sec: float) -> None:
    """Restart a unit without blocking, then wait until another main process runs it. ActionError if none does.

    `wait_sec` is how long the lease may take that is wanted from it; the restart may take as long, or ten seconds.
    """
    before = main_process(context, unit)
    context.run.systemctl("try-restart", unit, no_block=True)
    end = time.monotonic() + context.run.remaining(max(10.0, wait_sec))
    while main_process(context, unit) in (before, "0", "") or not context.run.is_active(unit):
        if time.monotonic() >= end:
            raise ActionError(f"{unit} was not restarted in time")
        time.sleep(0.05)


def main_process(context: ActionContext, unit: str) -> str:
    """The ID of a unit's main process as systemd prints it."""
    return context.run.run("systemctl", "show", "--property=MainPID", "--value", unit).text.strip()
