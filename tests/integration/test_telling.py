# SPDX-License-Identifier: Apache-2.0
"""Everybody is told: subscribers, acknowledgements, snapshots, /dev/sysgenid, metrics, by a real vmforkd."""

from __future__ import annotations

import json
import mmap
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from support.fakeguest import FakeGuest
from support.runningdaemon import RunningDaemon, environment, eventually, vmforkctl, write_hook
from vmfork.page import STATE_REACTING, STATE_SETTLED, read_page
from vmfork.varlink.client import Client

FRESH = [bytes([number]) * 16 for number in range(1, 200)]


def configure(guest: FakeGuest, text: str) -> None:
    guest.put(guest.paths.config_etc + "/vmfork.conf", text.encode())


class Tracked:
    """A tracked subscriber on the public socket."""

    def __init__(self, guest: FakeGuest) -> None:
        self.client = Client.connect(guest.paths.public_socket)
        self.client.send("io.vmfork.Subscribe", {"track": True, "after": None}, more=True)
        self.replies = self.client.replies(timeout=20)
        assert next(self.replies)["notice"] == "hello"

    def notice(self) -> dict[str, object]:
        return dict(next(self.replies))

    def acknowledge(self, generation: int, snapshot: int | None = None) -> None:
        self.client.send("io.vmfork.Acknowledge", {"generation": generation, "snapshot": snapshot}, oneway=True)


def state_of(guest: FakeGuest) -> int:
    return read_page(guest.paths.generation_page).state


def test_settled_waits_for_a_tracked_subscriber(guest: FakeGuest) -> None:
    configure(guest, "[React]\nAckTimeoutSec=1h\n")
    with RunningDaemon(guest) as daemon:
        subscriber = Tracked(guest)
        guest.fork(FRESH[0])
        assert subscriber.notice()["notice"] == "fork"
        eventually(lambda: daemon.status()["stragglers"])
        assert state_of(guest) == STATE_REACTING
        subscriber.acknowledge(2)
        assert daemon.settled(2)["state"] == "settled"
        assert state_of(guest) == STATE_SETTLED
        assert daemon.status()["stragglers"] == []


def test_a_silent_tracked_subscriber_delays_settled_no_longer_than_the_admin_said(guest: FakeGuest) -> None:
    configure(guest, "[React]\nAckTimeoutSec=300ms\n")
    with RunningDaemon(guest) as daemon:
        subscriber = Tracked(guest)
        guest.fork(FRESH[0])
        assert daemon.settled(2)["state"] == "settled"
        (straggler,) = daemon.status()["stragglers"]
        assert straggler["overdue"] is True
        assert straggler["pid"] > 0
        assert f"(PID {straggler['pid']}) has not acknowledged in time" in daemon.ctl("status").stdout
        assert subscriber.notice()["notice"] == "fork"


def test_a_dead_tracked_subscriber_delays_nothing(guest: FakeGuest) -> None:
    configure(guest, "[React]\nAckTimeoutSec=1h\n")
    with RunningDaemon(guest) as daemon:
        subscriber = Tracked(guest)
        subscriber.client.close()
        guest.fork(FRESH[0])
        assert daemon.settled(2)["state"] == "settled"


def test_wait_settled_gives_no_all_clear_before_the_fork_was_noticed(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        early = subprocess.Popen(
            [sys.executable, "-m", "vmfork", "--root", str(guest.root), "wait", "--settled", "--after", "1", "-j"],
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert daemon.status()["state"] == "settled"
        with pytest.raises(subprocess.TimeoutExpired):
            early.wait(0.5)
        guest.fork(FRESH[0])
        output, _ = early.communicate(timeout=20)
        assert (early.returncode, json.loads(output)["state"]) == (0, "settled")


def test_a_failed_reaction_is_told_and_on_the_page(guest: FakeGuest) -> None:
    write_hook(guest, "10-bad", "exit 1")
    with RunningDaemon(guest) as daemon:
        subscriber = Tracked(guest)
        guest.fork(FRESH[0])
        assert [subscriber.notice()["notice"], subscriber.notice()["notice"]] == ["fork", "settled"]
        assert daemon.status()["state"] == "failed"
        assert daemon.ctl("wait", "--settled", "--after", "1", "--timeout", "5").returncode == 1


def test_prepare_waits_for_subscribers_then_runs_the_hooks_last_first(guest: FakeGuest) -> None:
    for name in ("10-a", "20-b"):
        write_hook(guest, name, 'echo "$1 $VMFORK_HOOK" >> "$VMFORK_ROOT/ran"')
    with RunningDaemon(guest) as daemon:
        subscriber = Tracked(guest)
        run = subprocess.Popen(
            [sys.executable, "-m", "vmfork", "--root", str(guest.root), "prepare"], env=environment()
        )
        notice = subscriber.notice()
        assert notice["notice"] == "before-snapshot"
        assert not (guest.root / "ran").exists()
        number = notice["snapshot"]
        assert isinstance(number, int)
        subscriber.acknowledge(1, number)
        assert run.wait(20) == 0
        assert daemon.ctl("resume").returncode == 0
        assert (guest.root / "ran").read_text().splitlines() == [
            "before-snapshot 20-b",
            "before-snapshot 10-a",
            "after-snapshot 10-a",
            "after-snapshot 20-b",
        ]
        assert subscriber.notice()["notice"] == "after-snapshot"


def test_prepare_names_who_is_not_ready(guest: FakeGuest) -> None:
    configure(guest, "[React]\nAckTimeoutSec=200ms\n")
    with RunningDaemon(guest) as daemon:
        subscriber = Tracked(guest)
        run = daemon.ctl("prepare")
        assert run.returncode == 1
        assert "is not ready" in run.stderr
        subscriber.client.close()


def test_a_preparation_is_undone_by_itself_after_its_deadline(guest: FakeGuest) -> None:
    write_hook(guest, "10-a", 'echo "$1" >> "$VMFORK_ROOT/ran"')
    with RunningDaemon(guest) as daemon:
        assert daemon.ctl("prepare", "--template", "--deadline", "1").returncode == 0
        assert Path(guest.paths.template_mark).exists()
        eventually(lambda: "after-snapshot" in (guest.root / "ran").read_text())
        assert not Path(guest.paths.template_mark).exists()


def test_the_clone_of_a_template_rotates_and_uses_the_mark_up(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        assert daemon.ctl("prepare", "--template").returncode == 0
        guest.fork(FRESH[0])
        first = daemon.settled(2)
        eventually(lambda: not Path(guest.paths.template_mark).exists())
        guest.fork(FRESH[1])
        second = daemon.settled(3)
        assert (first["identity"]["policy"], second["identity"]["policy"]) == ("rotate", "keep")


def test_resume_without_a_preparation_changes_nothing(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        assert daemon.ctl("resume").returncode == 0


def test_sysgenid_follows_the_generation_while_it_is_wanted(guest: FakeGuest) -> None:
    configure(guest, "[Publish]\nSysGenId=yes\n")
    with RunningDaemon(guest) as daemon:
        # As AWS-LC does: opened through the link, mapped, read again and again.
        with open(guest.paths.dev_sysgenid, "rb") as file:
            page = mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ)
        assert struct.unpack_from("<I", page) == (1,)
        guest.fork(FRESH[0])
        daemon.settled(2)
        assert struct.unpack_from("<I", page) == (2,)
        daemon.stop()
        assert not Path(guest.paths.dev_sysgenid).is_symlink()


def test_sysgenid_is_off_by_default(guest: FakeGuest) -> None:
    with RunningDaemon(guest):
        assert not Path(guest.paths.dev_sysgenid).is_symlink()


def test_sysgenid_is_not_offered_without_a_live_edge(guest: FakeGuest) -> None:
    guest.unbind_driver()
    configure(guest, "[Publish]\nSysGenId=yes\n")
    with RunningDaemon(guest):
        assert not Path(guest.paths.dev_sysgenid).is_symlink()


def test_sysgenid_never_takes_the_place_of_something_real(guest: FakeGuest) -> None:
    configure(guest, "[Publish]\nSysGenId=yes\n")
    guest.put(guest.paths.dev_sysgenid, b"a device")
    with RunningDaemon(guest):
        assert Path(guest.paths.dev_sysgenid).read_bytes() == b"a device"


def test_metrics_tell_the_generation_and_how_hooks_went(guest: FakeGuest) -> None:
    write_hook(guest, "10-a", "exit 0")
    with RunningDaemon(guest) as daemon:
        guest.fork(FRESH[0])
        daemon.settled(2)
        text = eventually(lambda: _metrics_with(guest, "vmfork_forks_total"))
    assert 'vmfork_forks_total{kind="live",edge="kmsg"} 1' in text
    assert 'vmfork_hook_results_total{hook="10-a",result="ok"} 1' in text
    assert "vmfork_generation 2" in text
    assert FRESH[0].hex() not in text


def _metrics_with(guest: FakeGuest, word: str) -> str:
    text = Path(guest.paths.metrics).read_text()
    return text if word in text else ""


def test_metrics_can_be_turned_off(guest: FakeGuest) -> None:
    configure(guest, "[Publish]\nMetrics=no\n")
    with RunningDaemon(guest):
        assert not Path(guest.paths.metrics).exists()


def test_reload_applies_a_new_configuration_and_reports_what_is_wrong_with_it(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        configure(guest, "[React]\nTemplate=yes\nIdentity=maybe\n")
        run = daemon.ctl("reload")
        assert run.returncode == 1
        assert "vmfork.conf:3:" in run.stderr
        guest.fork(FRESH[0])
        assert daemon.settled(2)["identity"]["policy"] == "rotate"


def test_status_without_a_daemon_shows_the_last_fork_to_root(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        guest.fork(FRESH[0])
        daemon.settled(2)
    run = vmforkctl(guest, "status", "--json=short")
    assert json.loads(run.stdout)["last_fork"]["generation"] == 2


def test_a_reaction_that_goes_on_after_a_kill_waits_for_nobody_longer_than_the_admin_said(guest: FakeGuest) -> None:
    configure(guest, "[React]\nAckTimeoutSec=300ms\n")
    write_hook(guest, "10-slow", 'until [ -e "$VMFORK_ROOT/go" ]; do sleep 0.05; done')
    with RunningDaemon(guest) as daemon:
        guest.fork(FRESH[0])
        eventually(lambda: daemon.status()["state"] == "reacting")
        daemon.kill()
        daemon.start()
        late = Client.connect(guest.paths.public_socket)
        late.send("io.vmfork.Subscribe", {"track": True, "after": 1}, more=True)
        assert next(late.replies(timeout=20))["generation"] == 2
        (guest.root / "go").touch()
        assert daemon.settled(2)["state"] == "settled"
        assert [one["overdue"] for one in daemon.status()["stragglers"]] == [True]
        late.close()
