# SPDX-License-Identifier: Apache-2.0
"""vmfork as a set of systemd units, in a Debian 13 guest: sandbox, restarts, journal, target, the default reaction."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest
from lab import view
from lab.clones import Clones
from lab.guest import Guest, Saved

pytest_plugins = ("lab.plugin",)
pytestmark = pytest.mark.vm

Measure = Callable[[Guest, view.Event], view.Event]

# What the default reaction of a guest without a network has to say, hook by hook.
_KEEPS = "skipped: this guest keeps its identity"
_DEFAULT_REACTION = {
    "10-rng": ("ok", r"verified: the kernel's counter of keys went from \d+ to \d+"),
    "15-clock": ("ok", r"stepped the clock by .*; verified: |nothing to step: "),
    "20-machine-id": ("skipped", _KEEPS),
    "25-ssh-host-keys": ("skipped", _KEEPS),
    "30-hostname": ("skipped", _KEEPS),
    "35-mac-address": ("skipped", _KEEPS),
    "40-leases": ("skipped", "skipped: no interface has its address from a DHCP client"),
    "45-neighbours": ("skipped", "skipped: no interface with neighbours is up and has an address"),
    "50-connections": ("skipped", "skipped: not configured"),
    "55-wireguard": ("skipped", _KEEPS),
    "60-session-keys": ("skipped", "skipped: none of these runs: nginx, "),
    "70-services": ("skipped", "skipped: no units are configured"),
}

# The journal's message IDs are a contract: what an administrator's filters and alerts are made of.
_FORK_NOTICED = "fe1e74ea5c15472da8bb5dbec434f395"
_REACTION_SETTLED = "731f5d7a191e4b5099c6533ff2ae70c7"
_HOOK_OUTPUT = "5e4fad4cebd740fdb142f49494c456a5"

_WANTED_UNIT = """[Unit]
Description=Something that an administrator wants after each fork

[Service]
Type=oneshot
ExecStart=/bin/sh -c 'echo forked >>/run/lab-forked'

[Install]
WantedBy=vmfork.target
"""

_CONFINEMENT = "grep -E '^(CapBnd|NoNewPrivs|Seccomp):' /proc/$1/status; readlink /proc/$1/ns/mnt; cat /proc/$1/cgroup"
_CONFINEMENT_HOOK = f"""#!/bin/sh
set -- $$
({_CONFINEMENT}) >/run/lab-confinement
touch /usr/lab-was-here
"""

# Follows the page's field `detection` from before the daemon is killed until somebody watches again.
_KILL = """
import json, mmap, os, signal, struct, sys, time
page = mmap.mmap(os.open("/run/vmfork/generation", os.O_RDONLY), 4096, prot=mmap.PROT_READ)
read = lambda: struct.unpack_from("<I", page, 56)[0]
seen = [(0.0, read())]
os.kill(int(sys.argv[1]), signal.SIGKILL)
start = time.monotonic()
while time.monotonic() - start < 100 and (len(seen) < 3 or not seen[-1][1]):
    if read() != seen[-1][1]:
        seen.append((time.monotonic() - start, read()))
    time.sleep(0.002)
print(json.dumps(seen))
"""

# A unit that its administrator does not want to come back, so that the page stays as the dead daemon left it.
_NO_RESTART = "[Service]\nRestart=no\n"

# What strict guards say before and after, and the milliseconds from the daemon's death to 0 in the page, all of it
# measured here with one clock: a pidfd tells when the process is dead.
_DEATH = """
import json, mmap, os, select, struct, subprocess, sys, time, vmfork
page = mmap.mmap(os.open("/run/vmfork/generation", os.O_RDONLY), 4096, prot=mmap.PROT_READ)
watched = lambda: struct.unpack_from("<I", page, 56)[0]
guard = vmfork.Guard("page", strict=True)
before = [watched(), guard.forked()]
dead = select.poll()
dead.register(os.pidfd_open(int(sys.argv[1])), select.POLLIN)
subprocess.Popen(["systemctl", "kill", "--signal=KILL", "--kill-whom=" + sys.argv[2], "vmforkd.service"])
assert dead.poll(60_000)
start = time.monotonic()
while watched() and time.monotonic() - start < 30:
    time.sleep(0.002)
took = time.monotonic() - start
try:
    after = guard.forked()
except vmfork.Unavailable:
    after = "Unavailable"
print(json.dumps({"before": before, "detection": watched(), "after": after, "ms": took * 1000}))
"""

# Runs until it is let go, and says that it began, with the token of its fork.
_SLOW_HOOK = """#!/bin/sh
echo "$VMFORK_FORK_TOKEN" >>/run/lab-slow
until [ -e /run/lab-go ]; do sleep 0.2; done
"""

# A core that is piped to this is kept; the kernel asks no limit but the one of exactly 1.
_KEEPER = """#!/bin/sh
exec cat >/run/lab-core."$1"
"""
_CRASH = 'exec python3 -c "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"'


def entries(guest: Guest) -> list[dict[str, str]]:
    """The whole journal of this boot."""
    lines = guest.check("journalctl", "--boot", "--no-pager", "--output=json", "--all", timeout=120).splitlines()
    return [json.loads(line) for line in lines]


def having(journal: list[dict[str, str]], **fields: str) -> list[dict[str, str]]:
    """The entries that have these fields."""
    return [entry for entry in journal if entry.items() >= fields.items()]


def one_of(journal: list[dict[str, str]], **fields: str) -> dict[str, str]:
    """The only entry that has these fields."""
    (entry,) = having(journal, **fields)
    return entry


def test_the_default_reaction_with_nothing_to_renew(trixie: Saved, clones: Clones, measured: Measure) -> None:
    named = replace(trixie, spec=replace(trixie.spec, name=f"{trixie.spec.name}, nothing to renew"))
    clone = clones.restore(named, "default", guid=uuid.uuid4())
    event = measured(clone, view.wait_event(clone, after=1))
    assert (event["state"], event["identity"]["policy"]) == ("settled", "keep")
    shipped = [one for one in event["hooks"] if "lab" not in one["name"]]
    assert [(one["name"], one["result"]) for one in shipped] == [
        (name, result) for name, (result, _) in _DEFAULT_REACTION.items()
    ]
    journal = entries(clone)
    noticed, settled = (one_of(journal, MESSAGE_ID=message) for message in (_FORK_NOTICED, _REACTION_SETTLED))
    assert noticed["_SYSTEMD_UNIT"] == "vmforkd.service"
    assert (noticed["VMFORK_GENERATION"], settled["VMFORK_GENERATION"]) == ("2", "2")
    for name, (_, reason) in _DEFAULT_REACTION.items():
        said = having(journal, MESSAGE_ID=_HOOK_OUTPUT, VMFORK_HOOK=name, VMFORK_GENERATION="2")
        messages = [one["MESSAGE"] for one in said]
        assert any(re.match(f"{name}: (?:{reason})", message) for message in messages), messages
        assert {one["_SYSTEMD_UNIT"] for one in said} == {"vmfork-react.service"}
    for secret in (event["generation_id"], event["previous_generation_id"]):
        assert secret not in json.dumps(journal)


def test_the_sandboxed_daemon_reads_what_it_must_and_the_hooks_are_free(trixie: Saved, clones: Clones) -> None:
    guest = clones.restore(trixie, "sandbox", guid=trixie.guid)
    assert guest.run("vmforkctl", "doctor").exit_code == 0
    assert view.status(guest)["detection"] == "event"
    for name, role in (("kmsg", "edge"), ("fwcfg", "truth"), ("smbios", "truth")):
        found = view.source(guest, name, role)
        assert found["live"], found
    view.put(guest, "/etc/vmfork/hooks.d/50-lab-confinement", _CONFINEMENT_HOOK, mode="0755")
    guest.check("vmforkctl", "trigger")
    assert not view.failed_hooks(view.wait_event(guest, after=1))
    hook = guest.check("cat", "/run/lab-confinement")
    free = guest.check("sh", "-c", _CONFINEMENT, "confinement", "1")
    assert hook.splitlines()[:4] == free.splitlines()[:4]
    assert "vmfork-react.service" in hook
    guest.check("test", "-e", "/usr/lab-was-here")
    daemon = guest.check("sh", "-c", _CONFINEMENT, "confinement", view.main_pid(guest, "vmforkd.service")).split()
    assert daemon[:6] == ["CapBnd:", "0000000400220000", "NoNewPrivs:", "1", "Seccomp:", "2"]
    assert daemon[6] not in hook


def test_a_killed_daemon_leaves_a_page_that_says_so_and_comes_back(trixie: Saved, clones: Clones) -> None:
    guest = clones.restore(trixie, "killed", guid=trixie.guid)
    before = view.main_pid(guest, "vmforkd.service")
    seen = guest.json("python3", "-c", _KILL, before, timeout=120)
    assert [detection for _, detection in seen] == [2, 0, 2], seen
    view.wait_watching(guest)
    assert view.main_pid(guest, "vmforkd.service") not in ("0", before)
    assert view.status(guest)["generation"] == 1
    assert [one["kind"] for one in view.fence(guest)] == ["manual"]


def test_detector_and_reactor_killed_while_a_hook_runs_handle_the_fork_once(trixie: Saved, clones: Clones) -> None:
    first = clones.restore(trixie, "slow", guid=trixie.guid)
    view.put(first, "/etc/vmfork/hooks.d/01-lab-slow", _SLOW_HOOK, mode="0755")
    guest = clones.restore(first.save(), "slow-fork", guid=uuid.uuid4())
    began = "test $(wc -l </run/lab-slow) -ge "
    guest.until("sh", "-c", f"{began}1", seconds=120, what="the slow hook runs")
    guest.check("kill", "-KILL", view.main_pid(guest, "vmfork-react.service"))
    guest.until("sh", "-c", f"{began}2", seconds=120, what="it runs again after the reactor's death")
    before = view.main_pid(guest, "vmforkd.service")
    guest.check("kill", "-KILL", before)
    guest.until("sh", "-c", f"{began}3", seconds=120, what="it runs again after the detector's death")
    assert view.main_pid(guest, "vmforkd.service") != before
    guest.check("touch", "/run/lab-go")
    event = view.wait_event(guest, after=1)
    assert (event["generation"], event["kind"], event["state"]) == (2, "live", "settled"), event
    assert not view.failed_hooks(event)
    assert [one["token"] for one in view.events(guest)] == [event["token"]]
    assert set(guest.check("cat", "/run/lab-slow").split()) == {event["token"]}


@pytest.mark.parametrize("whom", ["main", "all"])
def test_within_a_second_of_the_daemons_death_the_page_says_that_nobody_watches(
    trixie: Saved, clones: Clones, whom: str
) -> None:
    guest = clones.restore(trixie, f"dead-{whom}", guid=trixie.guid)
    view.put(guest, "/run/systemd/system/vmforkd.service.d/lab.conf", _NO_RESTART)
    guest.check("systemctl", "daemon-reload")
    seen = guest.json("python3", "-c", _DEATH, view.main_pid(guest, "vmforkd.service"), whom, timeout=120)
    print(f"nobody watches {seen['ms']:.0f} ms after the daemon's death")
    assert seen["before"] == [2, False]
    assert (seen["detection"], seen["after"]) == (0, "Unavailable")
    assert seen["ms"] < 1000
    assert guest.run("systemctl", "is-active", "vmforkd.service").stdout != "active\n"


def test_a_crash_leaves_nothing_in_a_pipe_of_core_pattern(trixie: Saved, clones: Clones) -> None:
    guest = clones.restore(trixie, "core", guid=trixie.guid)
    view.put(guest, "/run/lab-keep-core", _KEEPER, mode="0755")
    guest.check("sh", "-c", 'mount -o remount,exec /run; echo "|/run/lab-keep-core %p" >/proc/sys/kernel/core_pattern')
    # A limit of 0 does not hold for a pipe.
    guest.run("sh", "-c", f"ulimit -c 0; {_CRASH}")
    guest.until("sh", "-c", "test -s /run/lab-core.*", what="the core of a process with the limit 0")
    guest.check("sh", "-c", "rm /run/lab-core.*")
    guest.check("kill", "-SEGV", view.main_pid(guest, "vmforkd.service"))
    guest.until("sh", "-c", "dmesg | grep -q 'RLIMIT_CORE.*set to 1'", what="the kernel refused")
    guest.check("sh", "-c", "! ls /run/lab-core.*")
    view.wait_watching(guest)


def test_a_clock_that_is_behind_is_stepped_and_the_event_says_how_far(trixie: Saved, clones: Clones) -> None:
    guest = clones.restore(trixie, "behind", guid=trixie.guid)
    # The guest has none of its own; what counts is that a unit of this name is told.
    view.put(guest, "/run/systemd/system/systemd-timesyncd.service", "[Service]\nExecStart=sleep infinity\n")
    guest.check("systemctl", "start", "systemd-timesyncd.service")
    before = view.main_pid(guest, "systemd-timesyncd.service")
    guest.check("date", "--set=-1 hour")
    guest.check("vmforkctl", "trigger")
    event = view.wait_event(guest, after=1)
    assert not view.failed_hooks(event)
    # Beside that hour the guest lacks the time from its save to its restore.
    assert 3590e9 < event["clock_step_ns"] < 7200e9
    ahead = guest.check("sh", "-c", "echo $(($(cat /sys/class/rtc/rtc0/since_epoch) - $(date +%s)))")
    assert abs(int(ahead)) < 5
    assert view.main_pid(guest, "systemd-timesyncd.service") not in ("0", before)


def test_every_fork_starts_what_is_wanted_by_the_target(trixie: Saved, clones: Clones) -> None:
    guest = clones.restore(trixie, "target", guid=trixie.guid)
    view.put(guest, "/etc/systemd/system/lab-wanted.service", _WANTED_UNIT)
    guest.check("systemctl", "enable", "lab-wanted.service")
    for forks in (1, 2, 3):
        guest.check("vmforkctl", "trigger")
        view.wait_event(guest, after=forks)
        guest.until("sh", "-c", f"test $(wc -l </run/lab-forked) -eq {forks}", what=f"the unit ran {forks} times")
        guest.until(
            "sh", "-c", "! systemctl is-active vmfork.target lab-wanted.service", what="the target is free again"
        )
    states = guest.check("systemctl", "list-units", "--failed", "--plain", "--no-legend")
    assert "vmfork" not in states
    assert guest.check("cat", "/run/lab-forked").split() == ["forked"] * 3
