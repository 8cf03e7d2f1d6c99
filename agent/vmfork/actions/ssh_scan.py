# SPDX-License-Identifier: Apache-2.0
"""Asks the sshd of this machine which host keys it presents, as a client would see them.

Bounded and only on addresses of this machine. Nobody answering is said and is no failure; an old key is a failure.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from vmfork import settings
from vmfork.actions.contract import ActionContext
from vmfork.actions.sshd_config import SshdConfig
from vmfork.errors import ActionError

_PATIENCE_SEC = 10.0
_SILENCE_SEC = 1.0
_EXPECTED_SEC = 120.0
_SCAN_SEC = 5
_LOOPBACK = "127.0.0.1"


def verify_served(
    context: ActionContext, config: SshdConfig, renewed: Mapping[str, str], *, expected: bool = False
) -> None:
    """ActionError if sshd still presents a key that was renewed; `renewed` maps old public keys to new ones.

    `expected`: an sshd was just told to start anew, so it is waited for, for half of the time that the hook has left.
    """
    if context.early or context.paths.is_fake or not context.get(settings.SSH_VERIFY):
        return
    if context.run.find("ssh-keyscan") is None:
        context.say("not verified over the network: ssh-keyscan is not installed")
        return
    address, port = target(config)
    # A reload is a new start of sshd, so for a moment the old one still answers, or nobody.
    start = time.monotonic()
    end = start + (context.run.remaining(_EXPECTED_SEC) / 2 if expected else context.run.remaining(_PATIENCE_SEC))
    served: frozenset[str] = frozenset()
    while True:
        served = _scan(context, address, port) or served
        if served & frozenset(renewed.values()) and not served & frozenset(renewed):
            context.say(f"verified: sshd on {address} port {port} presents the new keys")
            return
        if time.monotonic() >= (end if served or expected else min(end, start + _SILENCE_SEC)):
            break
        time.sleep(0.1)
    if served & frozenset(renewed):
        raise ActionError(
            f"sshd on {address} port {port} still presents an old host key",
            hint="was it started with another configuration? restart it",
        )
    if served:
        context.say(f"not verified over the network: {address} port {port} is not the sshd of these keys")
    else:
        context.say(f"not verified over the network: no sshd answers on {address} port {port}")


def target(config: SshdConfig) -> tuple[str, int]:
    """Where to ask: the first address that sshd is bound to, else the loopback."""
    port = config.ports[0]
    for written in config.addresses:
        address, number = _split(written)
        if address not in ("0.0.0.0", "::", "*", ""):
            return address, number or port
    return _LOOPBACK, port


def _split(written: str) -> tuple[str, int]:
    """`host`, `host:port`, `[v6]:port` or a bare IPv6 address."""
    if written.startswith("["):
        address, _, rest = written[1:].partition("]")
        return address, int(rest[1:]) if rest[1:].isdecimal() else 0
    if written.count(":") == 1:
        address, _, port = written.partition(":")
        return address, int(port) if port.isdecimal() else 0
    return written, 0


def _scan(context: ActionContext, address: str, port: int) -> frozenset[str]:
    """The "type base64" lines that a server presents, empty if nobody answers."""
    try:
        finished = context.run.run(
            "ssh-keyscan", "-T", str(_SCAN_SEC), "-t", "rsa,ecdsa,ed25519", "-p", str(port), address, timeout=20
        )
    except ActionError as error:
        context.say(f"asking sshd for its keys: {error}")
        return frozenset()
    found = set()
    for line in finished.text.splitlines():
        words = line.split()
        if len(words) >= 3 and not line.startswith("#"):
            found.add(" ".join(words[1:3]))
    return frozenset(found)
