# SPDX-License-Identifier: Apache-2.0
"""SpreadSec= in a configuration of its own: who waits for this clone's share, and what is left to a later hook."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from support.actions import in_namespaces
from support.tools import need, need_root

HALF = "00" * 7 + "80" + "00" * 8  # the fork token whose share is half of the window
TESTS = Path(__file__).parents[1]
# networkd has a lease on interface 2, and systemctl says of every unit that it runs.
MACHINE = f"""
mount -t tmpfs none /run
cp -a /etc /run/etc
mount --bind /run/etc /etc
rm -rf /etc/vmfork
mkdir -p /etc/vmfork/hooks.d /run/systemd/netif/links /run/systemd/netif/leases /run/programs
touch /run/systemd/netif/links/2 /run/systemd/netif/leases/2
printf '#!/bin/sh\\n' > /run/programs/systemctl
chmod 755 /run/programs/systemctl
export VMFORK_FORK_TOKEN={HALF} PYTHONPATH=$PYTHONPATH:{TESTS}
"""
PROGRAM = """
import sys
from dataclasses import replace
from pathlib import Path
from support.actions import TOKEN, prepared
from vmfork.actions import machine_id, spread
from vmfork.model import ForkEvent, Identity, IdentityPolicy, Kind
event = ForkEvent(
    generation=2, token=TOKEN, kind=Kind.LIVE, edges=("kmsg",), detected_at_ns=1, boottime_ns=1,
    identity=Identity(policy=IdentityPolicy.ROTATE, reason="test"),
)
by_hand = prepared("", systemd=True, programs=Path("/run/programs")).context
forked, early = replace(by_hand, event=event), replace(by_hand, early=True)
print(eval(sys.argv[1]))
"""


@pytest.fixture(autouse=True)
def _tools() -> None:
    need_root()
    need("unshare", package="util-linux")


def run(script: str, *, configuration: str = "[React]\nSpreadSec=1\n") -> subprocess.CompletedProcess[str]:
    """A piece of shell on such a machine."""
    written = f"cat > /etc/vmfork/vmfork.conf <<'end'\n{configuration}end\n"
    return in_namespaces(["--mount", "--uts", "--net"], MACHINE + written + script)


def asked(expression: str, *, script: str = "", configuration: str = "[React]\nSpreadSec=1\n") -> str:
    """The value of a Python expression there, as it prints."""
    done = run(f"{script}\n\"$PYTHON\" -c '{PROGRAM}' '{expression}'", configuration=configuration)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_in_the_early_boot_nobody_waits() -> None:
    assert asked("spread.window(forked), spread.window(early)") == "(1.0, 0.0)"


def test_the_leases_hook_follows_where_clones_are_spread() -> None:
    assert asked("spread.leases_will_follow(forked)") == "True"


def test_no_leases_hook_follows_an_action_that_is_run_by_hand() -> None:
    assert asked("spread.leases_will_follow(by_hand)") == "False"


def test_the_leases_hook_is_not_waited_for_where_clones_are_not_spread() -> None:
    assert asked("spread.leases_will_follow(forked)", configuration="") == "False"


@pytest.mark.parametrize("how", ["ln -s /dev/null", "cp /bin/true"])
def test_a_leases_hook_that_is_masked_or_the_admins_own_does_not_follow(how: str) -> None:
    assert asked("spread.leases_will_follow(forked)", script=f"{how} /etc/vmfork/hooks.d/40-leases") == "False"


def test_a_leases_hook_that_is_switched_off_does_not_follow() -> None:
    off = "[React]\nSpreadSec=1\n[Hook 40-leases]\nEnable=no\n"
    assert asked("spread.leases_will_follow(forked)", configuration=off) == "False"


def test_networkd_is_restarted_with_the_machine_id_where_clones_are_not_spread() -> None:
    assert "systemd-networkd.service" in asked("machine_id._to_restart(forked)", configuration="")


def test_networkd_is_left_to_the_leases_hook_where_clones_are_spread() -> None:
    units = asked("machine_id._to_restart(forked)")
    assert "systemd-networkd.service" not in units
    assert "systemd-journald.service" in units


def test_a_networkd_that_has_no_dhcp_is_restarted_with_the_machine_id() -> None:
    units = asked("machine_id._to_restart(forked)", script="rm /run/systemd/netif/leases/2")
    assert "systemd-networkd.service" in units


def test_the_command_that_gives_a_host_name_is_asked_when_the_share_is_over() -> None:
    command = "[React]\nSpreadSec=1\n[Hook 30-hostname]\nCommand=/run/programs/name\n"
    script = "printf '#!/bin/sh\\necho clone\\n' > /run/programs/name; chmod 755 /run/programs/name\n"
    done = run(script + "action hostname < /dev/null; hostname", configuration=command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("waiting 0.5 s")
    assert done.stdout.splitlines()[-1] == "clone"


@pytest.mark.parametrize(("key", "waits"), [("PublishCommand=/bin/true", True), ("Persist=yes", False)])
def test_a_new_key_waits_for_the_share_where_it_is_published(key: str, *, waits: bool) -> None:
    need("ip", package="iproute2")
    configuration = f"[React]\nSpreadSec=1\n[Hook 55-wireguard]\nInterfaces=wg*\n{key}\n"
    script = "ip link add wg0 type veth peer name other\naction wireguard --dry-run < /dev/null"
    done = run(script, configuration=configuration)
    assert done.returncode == 0, done.stderr
    assert ("would wait 0.5 s" in done.stdout) is waits
    assert "would give wg0 a new private key" in done.stdout
