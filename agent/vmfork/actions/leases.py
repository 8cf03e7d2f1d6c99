# SPDX-License-Identifier: Apache-2.0
"""Renews the DHCP leases of this machine, or takes new ones under a new client identifier when the identity rotates.

Each DHCP client that runs is asked in its own way; static configurations are left alone. In the early boot, when none
runs yet, only the files that carry an identity are renewed. Clones of one snapshot can be spread over SpreadSec=.
"""

from __future__ import annotations

from vmfork import settings
from vmfork.actions import dhcp_dhclient, dhcp_dhcpcd, dhcp_network_manager, dhcp_networkd, duid, spread
from vmfork.actions.contract import Action, ActionContext
from vmfork.actions.dhcp import Plan
from vmfork.annotations import Protocol
from vmfork.errors import ActionError, ActionSkipped
from vmfork.model import IdentityPolicy


class Client(Protocol):
    """One kind of DHCP client; both functions return what they found to do, in a dry run too."""

    def forget(self, context: ActionContext, plan: Plan) -> tuple[str, ...]:
        """Renew the identity in the client's files while it does not run."""

    def care(self, context: ActionContext, plan: Plan) -> tuple[str, ...]:
        """Renew the leases of the running client, or replace them; ActionError where none is given in time."""


CLIENTS: tuple[Client, ...] = (dhcp_networkd, dhcp_network_manager, dhcp_dhclient, dhcp_dhcpcd)


def after_fork(context: ActionContext) -> None:
    plan = Plan(
        rotate=context.identity is IdentityPolicy.ROTATE,
        duid=duid.fresh(),
        wait_sec=context.get(settings.LEASES_WAIT_SEC),
    )
    if context.early or context.paths.is_fake:
        _edit_files(context, plan)
        return
    spread.wait(context)
    found: list[str] = []
    problems: list[str] = []
    for client in CLIENTS:
        try:
            found += client.care(context, plan)
        except ActionError as error:
            problems.append(str(error))
    if problems:
        raise ActionError("; ".join(problems))
    if not found:
        raise ActionSkipped("no interface has its address from a DHCP client that is known here")


def _edit_files(context: ActionContext, plan: Plan) -> None:
    if not plan.rotate:
        raise ActionSkipped("this guest keeps its identity, and no DHCP client runs yet")
    if not sum(len(client.forget(context, plan)) for client in CLIENTS):
        raise ActionSkipped("no DHCP client has left an identity here")


ACTION = Action(
    name="leases",
    hook="40-leases",
    summary="Renew DHCP leases, or take new ones under a new client identifier.",
    keys=(settings.LEASES_WAIT_SEC,),
    after_fork=after_fork,
)
