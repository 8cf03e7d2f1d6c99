# SPDX-License-Identifier: Apache-2.0
"""Machine ID, host name and MAC address with real mounts, a real UTS and a real network namespace."""

from __future__ import annotations

import pytest

from support.actions import in_namespaces
from support.tools import need, need_root

OLD = "0123456789abcdef0123456789abcdef"
GUEST = "guest=$(mktemp -d)\nmount -t tmpfs none $guest\nmkdir -p $guest/etc $guest/run\n"


@pytest.fixture(autouse=True)
def _tools() -> None:
    need_root()
    need("unshare", package="util-linux")


def test_a_machine_id_that_is_a_mount_point_is_written_in_place_below_a_read_only_etc() -> None:
    script = f"""{GUEST}
mount -t tmpfs none $guest/etc
echo stale > $guest/etc/machine-id
echo {OLD} > $guest/run/machine-id
mount --bind $guest/run/machine-id $guest/etc/machine-id
mount -o remount,ro $guest/etc
action machine-id --root=$guest
cmp $guest/run/machine-id $guest/etc/machine-id
wc -c < $guest/etc/machine-id
grep -c {OLD} $guest/etc/machine-id || :
"""
    done = in_namespaces(["--mount"], script)
    assert done.returncode == 0, done.stderr
    assert "a mount point: written in place" in done.stdout
    assert done.stdout.splitlines()[-2:] == ["33", "0"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("mount -o remount,ro $guest/etc", "Read-only file system"),
        ("mount -o remount,size=4k $guest/etc; dd if=/dev/zero of=$guest/etc/filler 2>/dev/null || :", "No space left"),
    ],
)
def test_a_read_only_or_full_etc_is_a_failure_and_the_old_id_stays(fault: str, words: str) -> None:
    script = f"""{GUEST}
mount -t tmpfs none $guest/etc
echo {OLD} > $guest/etc/machine-id
{fault}
action machine-id --root=$guest && exit 9
ls -A $guest/etc
cat $guest/etc/machine-id
"""
    done = in_namespaces(["--mount"], script)
    assert done.returncode == 0, done.stderr
    assert words in done.stderr
    assert "hint:" in done.stderr
    assert done.stdout.splitlines()[-1] == OLD
    assert "vmfork-new" not in done.stdout


def test_the_kernels_host_name_follows_the_template() -> None:
    script = """
mount -t tmpfs none /etc/vmfork 2>/dev/null || { mkdir -p /run/etc; cp -a /etc/. /run/etc; mount --bind /run/etc /etc; }
mkdir -p /etc/vmfork
printf '[Hook 30-hostname]\\nTemplate=clone-%%8t\\n' > /etc/vmfork/vmfork.conf
hostname template
VMFORK_FORK_TOKEN=000102030405060708090a0b0c0d0e0f action hostname < /dev/null
hostname
cat /etc/hostname
"""
    done = in_namespaces(["--mount", "--uts"], "mount -t tmpfs none /run\n" + script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["clone-00010203", "clone-00010203"]


MAC = """
mount -t tmpfs none /run
mkdir -p /run/etc/vmfork
mkdir /run/upper /run/work
cp -a /etc/. /run/etc
mount --bind /run/etc /etc
printf '[Hook 35-mac-address]\\nInterfaces=eth*\\n' > /etc/vmfork/vmfork.conf
ip link add eth0 type veth peer name other
ip link set eth0 up
ip link set other up
ip -br link show other > /run/other
export VMFORK_FORK_TOKEN=000102030405060708090a0b0c0d0e0f
"""


def test_only_the_configured_interface_gets_a_new_mac_address_and_stays_up() -> None:
    need("ip", package="iproute2")
    script = (
        MAC + "action mac-address\nip -br link show other | cmp - /run/other\naction mac-address\nip -br link show eth0"
    )
    done = in_namespaces(["--mount", "--net"], script)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("gave eth0@other the MAC address ") or lines[0].startswith("gave eth0 the MAC address ")
    new = lines[0].split()[5]
    assert any(line == f"eth0 already has {new}" for line in lines)
    assert " UP " in lines[-1]
    assert new in lines[-1]


def test_a_dry_run_leaves_the_mac_address() -> None:
    need("ip", package="iproute2")
    script = MAC + "ip -br link show eth0 > /run/eth0\naction mac-address -n\nip -br link show eth0 | cmp - /run/eth0"
    done = in_namespaces(["--mount", "--net"], script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("would give eth0 the MAC address ")
