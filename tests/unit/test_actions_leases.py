# SPDX-License-Identifier: Apache-2.0
"""Hook 40-leases: files that carry an identity, what clients say of themselves, and the two that need systemd."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.actions import Run, prepared
from vmfork.actions import dhcp_dhclient, dhcp_dhcpcd, dhcp_network_manager, dhcp_networkd, duid, leases, perform
from vmfork.actions.dhcp import Plan
from vmfork.actions.processes import Process
from vmfork.errors import ActionError
from vmfork.model import IdentityPolicy

DUID = bytes.fromhex("0004") + bytes(range(16))


def plan(*, rotate: bool, wait_sec: float = 0.3) -> Plan:
    return Plan(rotate=rotate, duid=DUID, wait_sec=wait_sec)


# --- DUIDs


def test_every_duid_is_a_random_uuid() -> None:
    duids = {duid.fresh() for _ in range(100)}
    assert len(duids) == 100
    assert all(len(one) == 18 and one[:2] == b"\0\x04" and one[8] >> 4 == 4 for one in duids)


def test_the_duids_of_a_machine_id_are_those_that_systemd_257_used() -> None:
    # By networkctl in a guest with this machine ID.
    vendor, random = duid.of_machine("1" * 32)
    assert vendor.hex() == "00020000ab1123373722aa2e3e55"
    assert len(random) == 18
    assert random[:2] == b"\0\x04"


def test_siphash_has_the_result_of_its_authors() -> None:
    assert duid.siphash24(bytes(range(16)), bytes(range(15))) == 0xA129CA6149BE45E5


@pytest.mark.parametrize("text", ["", "uninitialized", "11" * 15, "11" * 17])
def test_what_is_no_machine_id_has_no_duid(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        duid.of_machine(text)


# --- dhclient


def dhclient(*argv: str) -> dhcp_dhclient.Client:
    process = Process(pid=9, parent=1, argv=("/sbin/dhclient", *argv), image=(9, 1, 1))
    return dhcp_dhclient.understood(process, "/var/lib/dhcp")


def test_debians_arguments_of_dhclient_are_understood() -> None:
    line = "-4 -v -i -pf /run/a.pid -lf /var/lib/dhcp/a.leases -I -df /var/lib/dhcp/6.leases eth0"
    client = dhclient(*line.split())
    assert (client.version, client.interfaces, client.lease_file) == (4, ("eth0",), "/var/lib/dhcp/a.leases")
    assert client.by_duid
    assert not client.foreground


def test_a_bare_dhclient_is_known_by_its_mac_address() -> None:
    client = dhclient("-d", "-e", "A=eth9", "eth0", "eth1")
    assert client.interfaces == ("eth0", "eth1")
    assert client.lease_file == "/var/lib/dhcp/dhclient.leases"
    assert not client.by_duid
    assert client.foreground


def test_dhclient_for_ipv6_always_has_a_duid() -> None:
    client = dhclient("-6", "-S", "eth0")
    assert client.by_duid
    assert client.lease_file == "/var/lib/dhcp/dhclient6.leases"


# --- dhcpcd


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("dhcpcd: c0 [ip4]", ("c0", 4)),
        ("dhcpcd: eth0.5 [ip4] [ip6]", ("eth0.5", None)),
        ("dhcpcd: [manager] [ip4] [ip6]", (None, None)),
        ("dhcpcd: [master] [ip6]", (None, 6)),
        ("dhcpcd: [privileged proxy] c0 [ip4]", ("c0", 4)),
        ("dhcpcd: [privileged proxy] [ip4] [ip6]", (None, None)),
        ("dhcpcd: [control proxy] c0 [ip4]", None),
        ("dhcpcd: [network proxy] 192.0.2.1", None),
        ("dhcpcd: [BPF BOOTP] c0", None),
        ("dhcpcd: c0 -x --script /tmp/evil", None),
        ("dhcpcd -4 c0", None),
    ],
)
def test_only_a_daemons_own_title_is_understood(title: str, expected: tuple[str | None, int | None] | None) -> None:
    assert dhcp_dhcpcd.understood(title) == expected


# --- files, in the early boot or below a root


def fill(root: Path) -> None:
    for path, text in {
        "var/lib/dhcp/dhclient.eth0.leases": 'default-duid "old";\nlease {\n}\n',
        "var/lib/dhcp/dhclient.empty.leases": "",
        "var/lib/dhcpcd/duid": "00:01:02\n",
        "var/lib/dhcpcd/secret": "old",
        "var/lib/dhcpcd/eth0.lease": "old",
        "var/lib/NetworkManager/secret_key": "old",
        "var/lib/NetworkManager/internal-x-eth0.lease": "old",
        "var/lib/NetworkManager/timestamps": "kept",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_in_the_early_boot_every_client_loses_its_old_identity(tmp_path: Path) -> None:
    fill(tmp_path)
    run = prepared(tmp_path, early=True)
    assert perform(leases.ACTION, run.context) == 0
    now = snapshot(tmp_path)
    assert b"old" not in b"".join(now.values())
    assert now["var/lib/dhcp/dhclient.eth0.leases"].startswith(b'default-duid "\\000\\004\\')
    duid = bytes.fromhex(now["var/lib/dhcpcd/duid"].decode().strip().replace(":", ""))
    assert duid[:2] == b"\0\x04"
    assert dhcp_dhclient.lease_file_with(duid) == now["var/lib/dhcp/dhclient.eth0.leases"]
    assert sorted(now) == [
        "var/lib/NetworkManager/timestamps",
        "var/lib/dhcp/dhclient.empty.leases",
        "var/lib/dhcp/dhclient.eth0.leases",
        "var/lib/dhcpcd/duid",
    ]


def test_a_kept_identity_keeps_every_file(tmp_path: Path) -> None:
    fill(tmp_path)
    before = snapshot(tmp_path)
    run = prepared(tmp_path, early=True, identity=IdentityPolicy.KEEP)
    assert perform(leases.ACTION, run.context) == 77
    assert snapshot(tmp_path) == before


def test_a_dry_run_names_every_file_and_changes_none(tmp_path: Path) -> None:
    fill(tmp_path)
    before = snapshot(tmp_path)
    run = prepared(tmp_path, dry_run=True)
    assert perform(leases.ACTION, run.context) == 0
    assert snapshot(tmp_path) == before
    assert len(run.lines) == 6
    assert all(line.startswith("would ") for line in run.lines)


def test_without_any_client_it_is_skipped(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    assert perform(leases.ACTION, run.context) == 77


# --- systemd-networkd, with a manager that is a script

OLD_ID, NEW_ID = "1" * 32, "2" * 32
OLD_CLIENT, NEW_CLIENT = (f"ff5cbbeb5e{duid.of_machine(of)[0].hex()}" for of in (OLD_ID, NEW_ID))

NETWORKD = """#!/bin/sh
echo "$(basename "$0") $@" >> {root}/calls
lease={root}/run/systemd/netif/leases/1
answer() {{ printf 'ADDRESS=192.0.2.5\\nCLIENTID=%s\\n' "$1" > $lease.new; mv $lease.new $lease; }}
case "$*" in
*try-restart*) touch {root}/restarted ;;
*MainPID*) if [ -e {root}/restarted ]; then echo 20; else echo 10; fi ;;
renew*) [ -e {root}/dead ] || answer $(sed -n s/^CLIENTID=//p $lease) ;;
reconfigure*) if [ -e {root}/restarted ] && [ ! -e {root}/deaf ]; then answer {new}; else answer {old}; fi ;;
esac
"""


def networkd(
    root: Path, network: str = "[Network]\nDHCP=yes\n", *, lease: str = OLD_CLIENT, dry_run: bool = False
) -> Run:
    """One interface, the loopback of the machine that the test runs on: networkctl is a script, so nothing happens."""
    for place in ("run/systemd/netif/links", "run/systemd/netif/leases", "etc/systemd/network", "bin"):
        (root / place).mkdir(parents=True)
    (root / "run/systemd/netif/links/1").write_text("# state\nNETWORK_FILE=/etc/systemd/network/a.network\n")
    (root / "etc/systemd/network/a.network").write_text(network)
    if lease:
        (root / "run/systemd/netif/leases/1").write_text(f"ADDRESS=192.0.2.5\nCLIENTID={lease}\n")
    for name in ("systemctl", "networkctl"):
        (root / "bin" / name).write_text(NETWORKD.format(root=root, old=lease, new=NEW_CLIENT))
        (root / "bin" / name).chmod(0o755)
    (root / "calls").touch()
    (root / "etc/machine-id").write_text(f"{NEW_ID}\n")
    return prepared(root, systemd=True, programs=root / "bin", dry_run=dry_run)


def asked(root: Path) -> list[str]:
    calls = (root / "calls").read_text().splitlines()
    return [call for call in calls if "show" not in call and "is-active" not in call]


def test_networkd_renews_when_the_identity_is_kept(tmp_path: Path) -> None:
    run = networkd(tmp_path)
    assert dhcp_networkd.care(run.context, plan(rotate=False)) == ("lo",)
    assert asked(tmp_path) == ["networkctl renew -- lo"]
    assert "verified" in run.said


def test_networkd_is_restarted_before_it_configures_anew(tmp_path: Path) -> None:
    run = networkd(tmp_path)
    assert dhcp_networkd.care(run.context, plan(rotate=True)) == ("lo",)
    assert asked(tmp_path) == [
        "systemctl --no-block try-restart -- systemd-networkd.service",
        "networkctl reconfigure -- lo",
    ]
    assert "under the new machine ID's client ID; verified" in run.said


def test_networkd_that_is_already_under_the_new_machine_id_only_renews(tmp_path: Path) -> None:
    run = networkd(tmp_path, lease=NEW_CLIENT)
    assert dhcp_networkd.care(run.context, plan(rotate=True)) == ("lo",)
    assert asked(tmp_path) == ["networkctl renew -- lo"]
    assert "under the new machine ID's client ID; verified" in run.said


def test_a_client_id_of_another_machine_that_changes_is_a_new_one(tmp_path: Path) -> None:
    run = networkd(tmp_path)
    (tmp_path / "etc/machine-id").write_text("3" * 32 + "\n")
    assert dhcp_networkd.care(run.context, plan(rotate=True)) == ("lo",)
    assert "under a new client ID; verified" in run.said


def test_networkd_that_uses_the_mac_address_has_no_other_client_id(tmp_path: Path) -> None:
    (tmp_path / "deaf").touch()
    run = networkd(tmp_path, lease="01525400710001")
    assert dhcp_networkd.care(run.context, plan(rotate=True)) == ("lo",)
    assert "does not come from the machine ID" in run.said


def test_networkd_that_keeps_the_old_client_id_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "deaf").touch()
    run = networkd(tmp_path)
    with pytest.raises(ActionError, match="still the old one"):
        dhcp_networkd.care(run.context, plan(rotate=True))


def test_networkd_without_an_answer_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "dead").touch()
    run = networkd(tmp_path)
    with pytest.raises(ActionError, match="no lease was given in time"):
        dhcp_networkd.care(run.context, plan(rotate=False))


def test_networkd_leaves_static_interfaces_alone(tmp_path: Path) -> None:
    run = networkd(tmp_path, "[Network]\nAddress=192.0.2.5/24\n#DHCP=yes\n", lease="")
    assert dhcp_networkd.care(run.context, plan(rotate=True)) == ()
    assert asked(tmp_path) == []


def test_networkd_is_asked_nothing_in_a_dry_run(tmp_path: Path) -> None:
    run = networkd(tmp_path, dry_run=True)
    assert dhcp_networkd.care(run.context, plan(rotate=True)) == ("lo",)
    assert asked(tmp_path) == []
    assert run.said.startswith("would restart systemd-networkd.service")


# --- NetworkManager, likewise

NMCLI = """#!/bin/sh
echo "$(basename "$0") $@" >> {root}/calls
uuid=11111111-2222-3333-4444-555555555555
case "$*" in
*try-restart*) touch {root}/restarted ;;
*MainPID*) if [ -e {root}/restarted ]; then echo 20; else echo 10; fi ;;
*DEVICE,STATE*) printf 'eth0:connected:%s\\nlo:unmanaged:\\n' $uuid ;;
*ipv4.method*) cat {root}/methods ;;
*"device reapply"*) [ -e {root}/lazy ] || echo 2000 > {root}/expiry ;;
*"connection up"*) echo 3000 > {root}/expiry ;;
*"device show"*)
    printf 'DHCP4.OPTION[1]:expiry = %s\\n' $(cat {root}/expiry)
    if [ -e {root}/restarted ]; then id=new; else id=old; fi
    printf 'DHCP4.OPTION[2]:dhcp_client_identifier = %s\\n' $id ;;
esac
"""


def network_manager(root: Path, methods: str = "auto\nauto\n") -> Run:
    (root / "bin").mkdir()
    for name in ("systemctl", "nmcli"):
        (root / "bin" / name).write_text(NMCLI.format(root=root))
        (root / "bin" / name).chmod(0o755)
    (root / "calls").touch()
    (root / "expiry").write_text("1000\n")
    (root / "methods").write_text(methods)
    return prepared(root, systemd=True, programs=root / "bin")


def test_network_manager_applies_the_connection_again(tmp_path: Path) -> None:
    run = network_manager(tmp_path)
    assert dhcp_network_manager.care(run.context, plan(rotate=False)) == ("eth0",)
    assert "nmcli --wait 5 device reapply eth0" in asked(tmp_path)
    assert not [call for call in asked(tmp_path) if "connection up" in call]
    assert "verified" in run.said


def test_network_manager_that_keeps_its_lease_brings_the_connection_up_again(tmp_path: Path) -> None:
    (tmp_path / "lazy").touch()
    run = network_manager(tmp_path)
    dhcp_network_manager.care(run.context, plan(rotate=False))
    assert [call for call in asked(tmp_path) if "connection up uuid 11111111" in call]
    assert "verified" in run.said


def test_network_manager_gets_a_new_secret_before_its_restart(tmp_path: Path) -> None:
    fill(tmp_path)
    run = network_manager(tmp_path)
    dhcp_network_manager.care(run.context, plan(rotate=True))
    assert not (tmp_path / "var/lib/NetworkManager/secret_key").exists()
    verbs = [call for call in asked(tmp_path) if "try-restart" in call or "connection up" in call]
    assert [("try-restart" in verb) for verb in verbs] == [True, False]
    assert "under a new client ID; verified" in run.said


def test_network_manager_leaves_static_connections_alone(tmp_path: Path) -> None:
    run = network_manager(tmp_path, "manual\ndisabled\n")
    assert dhcp_network_manager.care(run.context, plan(rotate=True)) == ()
    assert not [call for call in asked(tmp_path) if "restart" in call or "up" in call.split()]
