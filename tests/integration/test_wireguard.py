# SPDX-License-Identifier: Apache-2.0
"""Hook 55-wireguard on real interfaces: the kernel's where it has them, else a program in user space."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.netns import Network
from support.tools import need, need_root

OLD_KEY = "mH0Y2NVWK3zpdPBWnFHmYbIV0ApMZ1bdrhbQkXUNzWE="


class Tunnel:
    """One WireGuard interface `wg0` with a known private key, and a command that records what it is told."""

    def __init__(self, network: Network, top: Path) -> None:
        self.network, self.top = network, top
        self.publish = top / "publish"
        self.publish.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {top}/told\ncat > {top}/stdin\nenv > {top}/env\n')
        self.publish.chmod(0o755)

    def wg(self, *argv: str, stdin: str = "") -> str:
        done = subprocess.run(
            self.network.command(self.network.client, "wg", *argv),
            input=stdin,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    @property
    def private(self) -> str:
        return self.wg("show", "wg0", "private-key")

    @property
    def public(self) -> str:
        return self.wg("show", "wg0", "public-key")

    def act(self, *argv: str, **more: str) -> subprocess.CompletedProcess[str]:
        settings = {"Interfaces": "wg*", "PublishCommand": f"{self.publish} --tell", "Persist": "no"} | more
        return self.network.action("wireguard", *argv, settings=settings)


@pytest.fixture(params=["kernel", "user space"])
def tunnel(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tunnel]:
    need_root()
    need("wg", package="wireguard-tools")
    with Network() as network:
        made = Tunnel(network, tmp_path)
        if request.param == "kernel":
            added = network.run(network.client, "ip", "link", "add", "wg0", "type", "wireguard")
            if added.returncode != 0:
                pytest.skip(f"this kernel has no WireGuard: {added.stderr.strip()}")
        else:
            go = need("wireguard-go", package="wireguard-go")
            if not Path("/dev/net/tun").exists():
                pytest.skip("this kernel has no TUN device")
            network.start(network.client, go, "-f", "wg0")
            network.wait_for(Path("/var/run/wireguard/wg0.sock").exists, what="wireguard-go")
        made.wg("set", "wg0", "private-key", "/dev/stdin", stdin=OLD_KEY)
        yield made
    Path("/var/run/wireguard/wg0.sock").unlink(missing_ok=True)


def test_the_key_is_new_and_the_command_is_told(tunnel: Tunnel) -> None:
    old = tunnel.public
    done = tunnel.act()
    assert done.returncode == 0, done.stderr
    assert tunnel.private != OLD_KEY
    assert tunnel.public != old
    assert (tunnel.top / "told").read_text().split() == ["--tell", "wg0", old, tunnel.public]
    assert (tunnel.top / "stdin").read_text().split() == [tunnel.public]


def test_the_private_key_is_in_no_message_argument_or_environment(tunnel: Tunnel) -> None:
    done = tunnel.act()
    seen = done.stdout + done.stderr + "".join((tunnel.top / name).read_text() for name in ("told", "stdin", "env"))
    assert tunnel.private not in seen
    assert OLD_KEY not in seen


def test_each_run_makes_another_key(tunnel: Tunnel) -> None:
    keys = set()
    for _ in range(3):
        assert tunnel.act().returncode == 0
        keys.add(tunnel.private)
    assert len(keys) == 3


def test_a_dry_run_changes_nothing(tunnel: Tunnel) -> None:
    done = tunnel.act("--dry-run")
    assert done.returncode == 0, done.stderr
    assert "would give wg0 a new private key" in done.stdout
    assert tunnel.private == OLD_KEY
    assert not (tunnel.top / "told").exists()


def test_without_the_command_to_tell_peers_the_key_stays(tunnel: Tunnel) -> None:
    tunnel.publish.unlink()
    done = tunnel.act()
    assert done.returncode == 1
    assert "the key is left as it is" in done.stderr
    assert tunnel.private == OLD_KEY


def test_a_command_that_fails_is_a_failure(tunnel: Tunnel) -> None:
    tunnel.publish.write_text("#!/bin/sh\necho no route >&2\nexit 3\n")
    done = tunnel.act()
    assert done.returncode == 1
    assert "no route" in done.stderr


def test_a_guest_that_keeps_its_identity_keeps_its_key(tunnel: Tunnel) -> None:
    done = tunnel.act("--identity=keep")
    assert done.returncode == 77
    assert tunnel.private == OLD_KEY
    assert stat.S_ISREG((tunnel.publish).stat().st_mode)
