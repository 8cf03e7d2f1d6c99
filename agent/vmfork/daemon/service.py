# SPDX-License-Identifier: Apache-2.0
"""The two sockets: what everybody may ask on the public one, and what only root may on the admin one.

The public socket grants nothing, whoever asks: root of a container that mounts /run/vmfork looks like root of the
guest. Generation IDs are shown on the admin socket to uid 0 alone (below a root prefix: to the daemon's own uid).
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from vmfork import __version__
from vmfork.annotations import Protocol
from vmfork.daemon.forklist import ForkList
from vmfork.daemon.ledger import Ledger
from vmfork.daemon.loop import Loop
from vmfork.jsonfields import JsonObject
from vmfork.model import ForkEvent, IdentityPolicy
from vmfork.paths import Paths
from vmfork.varlink.server import Call, Handler, Product, Server

_INTERFACE = "io.vmfork"
_STREAMS = (f"{_INTERFACE}.Subscribe",)
_BESIDE_STREAM = (f"{_INTERFACE}.Acknowledge",)
_QUERIES = (f"{_INTERFACE}.GetStatus", f"{_INTERFACE}.ListForks")


class Agent(Protocol):
    """What the service needs of the daemon."""

    paths: Paths
    ledger: Ledger

    def status(self, *, with_ids: bool) -> JsonObject: ...
    def subscribe(self, call: Call) -> None: ...
    def acknowledge(self, call: Call) -> None: ...
    def trigger(self, reason: str, identity: IdentityPolicy | None) -> ForkEvent: ...
    def reload(self) -> tuple[str, ...]: ...
    def prepare(self, call: Call) -> None: ...
    def resume(self, call: Call) -> None: ...
    def reactor_methods(self) -> Mapping[str, Handler]: ...


class Service:
    """Answers the calls of both sockets."""

    def __init__(self, loop: Loop, agent: Agent, *, public: bool) -> None:
        self._agent = agent
        paths = agent.paths
        product = Product(version=__version__)
        # Two lists, which the loop serves in turn: whoever asks on the public socket, root is not behind them.
        forks, forks_for_root = (ForkList(loop, paths, newest=lambda: agent.ledger.event) for _ in range(2))
        self._forks = forks
        for_everybody: dict[str, Handler] = {
            "GetStatus": lambda call: self._get_status(call, with_ids=False),
            "Subscribe": agent.subscribe,
            "Acknowledge": agent.acknowledge,
            "ListForks": lambda call: forks.answer(call, with_ids=False),
        }
        for_root: dict[str, Handler] = {
            **for_everybody,
            "GetStatus": lambda call: self._get_status(call, with_ids=self._may_see_ids(call)),
            "ListForks": lambda call: forks_for_root.answer(call, with_ids=self._may_see_ids(call)),
            "Trigger": self._trigger,
            "Reload": self._reload,
            "Prepare": agent.prepare,
            "Resume": agent.resume,
            **agent.reactor_methods(),
        }
        self._admin = self._serve(loop, paths.admin_socket, 0o600, for_root, product)
        self._public = self._serve(loop, paths.public_socket, 0o666, for_everybody, product) if public else None

    def _serve(self, loop: Loop, path: str, mode: int, methods: Mapping[str, Handler], product: Product) -> Server:
        return Server(
            loop,
            path,
            mode=mode,
            methods={f"{_INTERFACE}.{name}": handler for name, handler in methods.items()},
            product=product,
            needs_more=_STREAMS,
            beside_stream=_BESIDE_STREAM,
            queries=_QUERIES,
            unserved=f"{_INTERFACE}.PermissionDenied",
        )

    def close(self) -> None:
        """Stop listening on both."""
        self._admin.close()
        if self._public is not None:
            self._public.close()

    def _may_see_ids(self, call: Call) -> bool:
        return call.peer.uid == (os.geteuid() if self._agent.paths.is_fake else 0)

    def _get_status(self, call: Call, *, with_ids: bool) -> None:
        call.reply({"status": self._agent.status(with_ids=with_ids)})

    def _trigger(self, call: Call) -> None:
        asked = call.parameters.text_or_none("identity") or "auto"
        policy = None if asked == "auto" else call.parameters.choice("identity", IdentityPolicy)
        event = self._agent.trigger(call.parameters.text_or_none("reason") or "no reason given", policy)
        call.reply({"event": event.to_json(with_ids=self._may_see_ids(call))})

    def _reload(self, call: Call) -> None:
        call.reply({"problems": list(self._agent.reload())})
