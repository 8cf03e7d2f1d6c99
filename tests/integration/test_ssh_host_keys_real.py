# SPDX-License-Identifier: Apache-2.0
"""A real sshd, on the loopback of a network namespace and with an /etc/ssh of its own, presents the new keys."""

from __future__ import annotations

import subprocess

import pytest

from support.actions import in_namespaces
from support.tools import need, need_root

# /etc/ssh and /run are empty file systems of the namespace's own: this machine's keys are out of reach.
SETUP = """
mount -t tmpfs none /etc/ssh
mount -t tmpfs none /run
mkdir -p /run/sshd
ip link set lo up
ssh-keygen -q -t ed25519 -N '' -C root@template -f /etc/ssh/ssh_host_ed25519_key
ssh-keygen -q -t ecdsa -N '' -C root@template -f /etc/ssh/ssh_host_ecdsa_key
printf 'Port 2222\\nUsePAM no\\n' > /etc/ssh/sshd_config
scan() { ssh-keyscan -T 2 -t ecdsa,ed25519 -p 2222 127.0.0.1 2>/dev/null | sort; }
await() { for i in $(seq 100); do test "$(scan | wc -l)" = 2 && return; sleep 0.1; done; echo no sshd; exit 9; }
"""
# -r: without it sshd of OpenSSH before 9.8 reads its keys anew for each connection, and a missing reload goes unseen.
START = "/usr/sbin/sshd -r -f /etc/ssh/sshd_config\nawait\nscan > /run/before\n"


@pytest.fixture(autouse=True)
def _tools() -> None:
    need_root()
    need("sshd", package="openssh-server")
    need("ssh-keyscan", package="openssh-client")
    need("unshare", package="util-linux")
    need("ip", package="iproute2")


def guest(script: str) -> subprocess.CompletedProcess[str]:
    return in_namespaces(["--mount", "--net", "--pid", "--mount-proc"], SETUP + script)


def test_sshd_presents_other_keys_after_the_action_and_the_action_has_seen_it() -> None:
    done = guest(START + "action ssh-host-keys\nscan > /run/after\ncat /run/before /run/after | sort | uniq | wc -l")
    assert done.returncode == 0, done.stderr
    assert "told sshd" in done.stdout
    assert "verified: sshd on 127.0.0.1 port 2222 presents the new keys" in done.stdout
    assert done.stdout.splitlines()[-1] == "4"


def test_an_sshd_that_stays_with_the_old_keys_is_a_failure() -> None:
    done = guest(START + "rm /run/sshd.pid\naction ssh-host-keys")
    assert done.returncode == 1
    assert "still presents an old host key" in done.stderr


def test_an_sshd_that_takes_seconds_to_come_back_is_waited_for() -> None:
    # A process of that name which is told to start anew, and has not begun to listen when it is asked first.
    slow = "#!/bin/sh\ntrap 'sleep 2; exec /usr/sbin/sshd -r -D -f /etc/ssh/sshd_config' HUP\n"
    slow += "touch /run/ready\nwhile :; do sleep 0.1; done\n"
    begin = f"printf '%s' \"{slow}\" > /run/sshd/sshd\nchmod 755 /run/sshd/sshd\n/run/sshd/sshd &\n"
    begin += "echo $! > /run/sshd.pid\nuntil [ -e /run/ready ]; do sleep 0.05; done\n"
    done = guest(begin + "action ssh-host-keys")
    assert done.returncode == 0, done.stderr
    assert "verified: sshd on 127.0.0.1 port 2222 presents the new keys" in done.stdout, done.stdout


def test_where_no_sshd_listens_that_is_said_and_is_no_failure() -> None:
    done = guest("action ssh-host-keys")
    assert done.returncode == 0, done.stderr
    assert "no sshd answers on 127.0.0.1 port 2222" in done.stdout


def test_a_dry_run_leaves_sshd_with_its_keys() -> None:
    done = guest(START + "action ssh-host-keys --dry-run\nscan | cmp - /run/before && echo same")
    assert done.stdout.splitlines()[-1] == "same"


KEYS = "for key in /etc/ssh/*_key; do test -s $key.pub; ssh-keygen -y -f $key > /dev/null; done\necho whole"


def test_on_a_full_disk_every_old_key_stays_whole() -> None:
    fill = "mount -o remount,size=64k /etc/ssh\ndd if=/dev/zero of=/etc/ssh/filler bs=4k 2>/dev/null || :\n"
    done = guest(f"{fill}action ssh-host-keys && exit 9\nls -A /etc/ssh\n{KEYS}")
    assert done.returncode == 0, done.stderr
    assert "No space left" in done.stderr
    assert "vmfork-new" not in done.stdout
    assert done.stdout.splitlines()[-1] == "whole"


def test_on_a_read_only_etc_every_old_key_stays_whole() -> None:
    done = guest(f"mount -o remount,ro /etc/ssh\naction ssh-host-keys && exit 9\n{KEYS}")
    assert done.returncode == 0, done.stderr
    assert "Read-only file system" in done.stderr
    assert done.stdout.splitlines()[-1] == "whole"


def test_a_key_that_is_a_mount_point_stays_and_the_others_are_new() -> None:
    script = """
cp /etc/ssh/ssh_host_ecdsa_key /run/key
mount --bind /run/key /etc/ssh/ssh_host_ecdsa_key
cp /etc/ssh/*.pub /run
action ssh-host-keys && exit 9
cmp /run/ssh_host_ecdsa_key.pub /etc/ssh/ssh_host_ecdsa_key.pub
cmp -s /run/ssh_host_ed25519_key.pub /etc/ssh/ssh_host_ed25519_key.pub && exit 9
"""
    done = guest(script + KEYS)
    assert done.returncode == 0, done.stderr
    assert "busy" in done.stderr
    assert done.stdout.splitlines()[-1] == "whole"
