# SPDX-License-Identifier: Apache-2.0
"""What systemd-networkd's state files and configuration say: the interfaces that it runs DHCP on, and their leases."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from vmfork.actions.files import resolve
from vmfork.paths import Paths

UNIT = "systemd-networkd.service"
_DHCP_LINE = re.compile(r"^\s*DHCP\s*=\s*(\S*)", re.MULTILINE)
_ON = frozenset(("yes", "true", "on", "1", "y", "t", "ipv4", "ipv6", "v4", "v6", "both"))
_MAX_FILE = 256 * 1024
_RFC4361 = b"\xff"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What networkd keeps of a DHCPv4 lease: which file it is (another one after each answer), and the client ID."""

    inode: int
    changed_ns: int
    client_id: str

    @property
    def duid(self) -> bytes:
        """The DUID within the client ID (RFC 4361), empty where that is something else."""
        try:
            raw = bytes.fromhex(self.client_id)
        except ValueError:
            return b""
        return raw[5:] if raw[:1] == _RFC4361 else b""


def managed(paths: Paths) -> tuple[int, ...]:
    """The indexes of the interfaces that networkd runs DHCP on, by its state files and its configuration."""
    try:
        names = sorted(os.listdir(paths.networkd_links))
    except OSError:
        return ()
    return tuple(int(name) for name in names if name.isdigit() and _wants_dhcp(paths, int(name)))


def lease(paths: Paths, index: int) -> Lease | None:
    """The DHCPv4 lease of an interface, None if it has none."""
    path = os.path.join(paths.networkd_leases, str(index))
    try:
        status = os.stat(path)
    except OSError:
        return None
    identity = _values(path).get("CLIENTID", "")
    return Lease(inode=status.st_ino, changed_ns=status.st_mtime_ns, client_id=identity)


def _wants_dhcp(paths: Paths, index: int) -> bool:
    if os.path.exists(os.path.join(paths.networkd_leases, str(index))):
        return True
    state = _values(os.path.join(paths.networkd_links, str(index)))
    if "DHCP6_CLIENT_DUID" in state:
        return True
    places = [state.get("NETWORK_FILE", ""), *state.get("NETWORK_FILE_DROPINS", "").replace('"', "").split()]
    asked = ""
    for place in places:
        if place.startswith("/"):
            for value in _DHCP_LINE.findall(_read(resolve(paths, paths.at(place)))):
                asked = value
    return asked.lower() in _ON


def _values(path: str) -> Mapping[str, str]:
    """The KEY=value lines of a state file."""
    return dict(line.partition("=")[::2] for line in _read(path).splitlines() if not line.startswith("#"))


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_MAX_FILE)
    except OSError:
        return ""
