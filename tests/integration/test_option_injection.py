# SPDX-License-Identifier: Apache-2.0
"""Words from configuration, network and sshd that look like options: no tool may get them as such.

Programs that write down their arguments stand in the place of all tools. What counts is what they were given, not
whether somebody complained.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.actions import in_namespaces, prepared, write
from support.tools import need, need_root
from vmfork import settings
from vmfork.actions import Commands, all_actions, dhcp_network_manager, perform
from vmfork.actions.contract import Action
from vmfork.errors import ActionError
from vmfork.paths import Paths
from vmfork.settings import Setting

TOOLS = (
    "systemctl networkctl nmcli chronyc journalctl wg ip dhclient dhcpcd ssh-keygen ssh-keyscan systemd-run resolvectl"
)
SERVERS = "nginx haproxy apache2ctl postconf exim4 doveconf"
HOSTILE = (
    "-x",
    "--root=/",
    "-Hroot@elsewhere",
    "--help -x",
    "eth0 -x",
    "a.service --root=/",
    "; touch {mark}",
    "$(touch {mark})",
    "`touch {mark}`",
    "touch {mark}\n-x",
    "-x\ntouch {mark}",
    "\u2028-x",
)
# One record for each call: its words, each with a NUL behind it, then a record separator.
_RECORDER = """#!/bin/sh
{{ printf '%s\\0' "${{0##*/}}" "$@"; printf '\\036'; }} >>{calls}
{more}"""


class Recorders:
    """A directory of programs that write down their arguments."""

    def __init__(self, place: Path) -> None:
        self.place, self._calls = place / "bin", place / "calls"
        for name in f"{TOOLS} {SERVERS}".split():
            self.add(name)

    def add(self, name: str, more: str = "exit 0") -> None:
        write(self.place / name, _RECORDER.format(calls=self._calls, more=more), mode=0o755)

    def calls(self) -> list[list[str]]:
        if not self._calls.exists():
            return []
        return [call.split("\0")[:-1] for call in self._calls.read_text().split("\036")[:-1]]


def options(call: list[str]) -> list[str]:
    """The words of a call that its program may take for options."""
    words = call[1:]
    return [word for word in words[: words.index("--") if "--" in words else None] if word.startswith("-")]


def action_of(row: Setting[object]) -> Action:
    (found,) = [action for action in all_actions() if row in action.keys]
    return found


def guest_with(root: Path) -> None:
    """Enough of a machine for the actions to come to their tools."""
    write(root / "etc/machine-id", "0123456789abcdef0123456789abcdef\n")
    write(root / "etc/hostname", "template\n")
    write(root / "etc/ssh/sshd_config", "")
    write(root / "run/chrony/chronyd.sock", "")


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("row", settings.HOOK_OWN, ids=lambda row: f"{row.section.split()[1]}.{row.key}")
def test_no_value_of_a_hooks_own_key_becomes_an_option_or_a_command(
    tmp_path: Path, row: Setting[object], value: str
) -> None:
    root, mark = tmp_path / "root", tmp_path / "mark"
    guest_with(root)
    recorders = Recorders(tmp_path)
    value = value.format(mark=mark)
    run = prepared(root, settings={row.key: value}, systemd=True, programs=recorders.place)
    perform(action_of(row), run.context)
    taken = {word for call in recorders.calls() for word in options(call)}
    assert taken & {value, *value.split()} == set()
    assert not mark.exists()


def test_a_unit_reaches_the_service_manager_as_an_operand(tmp_path: Path) -> None:
    recorders = Recorders(tmp_path)
    run = Commands(Paths(""), search=(str(recorders.place), "/usr/bin", "/bin"), systemd=True)
    assert run.is_active("-Hroot@elsewhere")
    run.systemctl("try-restart", "--root=/", no_block=True)
    assert [options(call) for call in recorders.calls()] == [["--quiet"], ["--no-block"]]


def test_units_that_remember_the_machine_id_are_names_of_units() -> None:
    assert settings.MACHINE_ID_RESTART.parse("cron") == ("cron.service",)
    with pytest.raises(ValueError, match="names of systemd units"):
        settings.MACHINE_ID_RESTART.parse("a.service -Hroot@elsewhere")


def test_network_manager_is_not_told_of_a_device_that_looks_like_an_option(tmp_path: Path) -> None:
    recorders = Recorders(tmp_path)
    device = "--help:connected:11111111-2222-3333-4444-555555555555"
    recorders.add("nmcli", f'case "$*" in *device) echo {device} ;; *) echo auto ;; esac')
    run = prepared(tmp_path / "root", systemd=True, programs=recorders.place)
    with pytest.raises(ActionError, match="'--help' would be taken for an option"):
        dhcp_network_manager.devices(run.context)
    assert not any("--help" in call for call in recorders.calls())


# An Ethernet interface whose name is an option, and recorders that are found before all tools.
_NETWORK = """
mount -t tmpfs none /run
mkdir -p /run/etc /run/systemd/system /run/systemd/netif/links /run/systemd/netif/leases
cp -a /etc/. /run/etc
mount --bind /run/etc /etc
mount --bind {bin} /usr/local/sbin
mkdir -p /etc/vmfork /etc/systemd/network
/usr/sbin/ip link add name -x type veth peer name other
index=$(/usr/sbin/ip -o link show dev -x | cut -d: -f1)
printf 'NETWORK_FILE=/etc/systemd/network/a.network\\n' >/run/systemd/netif/links/$index
printf '[Network]\\nDHCP=yes\\n' >/etc/systemd/network/a.network
printf '%s\\n' {configuration} >/etc/vmfork/vmfork.conf
export VMFORK_FORK_TOKEN=000102030405060708090a0b0c0d0e0f
action {action} </dev/null || echo "exit status $?" >&2
"""


@pytest.mark.parametrize(
    ("action", "configuration", "told"),
    [
        ("leases --identity=keep", "'[Hook 40-leases]' 'WaitSec=500ms'", ["networkctl", "renew", "--", "-x"]),
        ("mac-address", "'[Hook 35-mac-address]' 'Interfaces=-x' 'Command=/usr/local/sbin/command'", None),
        ("wireguard", "'[Hook 55-wireguard]' 'Interfaces=-x' 'PublishCommand=/usr/local/sbin/command'", None),
        ("wireguard", "'[Hook 55-wireguard]' 'Interfaces=-*'", None),
    ],
)
def test_an_interface_whose_name_is_an_option_is_an_operand_or_is_refused(
    tmp_path: Path, action: str, configuration: str, told: list[str] | None
) -> None:
    need_root()
    need("ip", package="iproute2")
    recorders = Recorders(tmp_path)
    recorders.add("command", "echo 02:00:00:00:00:01")
    script = _NETWORK.format(bin=recorders.place, configuration=configuration, action=action)
    done = in_namespaces(["--net", "--mount"], script)
    assert done.returncode == 0, done.stderr
    calls = recorders.calls()
    assert not any("-x" in options(call) for call in calls), calls
    if told is None:
        assert "'-x' would be taken for an option" in done.stderr
        assert not any("-x" in call for call in calls)
    else:
        assert told in calls, done.stdout + done.stderr
