# SPDX-License-Identifier: Apache-2.0
"""The metrics of a real vmforkd, judged by Prometheus' own checker and collected by its node exporter."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.artifacts import keep
from support.fakeguest import FakeGuest
from support.runningdaemon import PATIENCE_SEC, RunningDaemon, eventually, vmforkd, write_hook
from support.tools import need


def text_of(guest: FakeGuest) -> str:
    return Path(guest.paths.metrics).read_text()


def check(text: str) -> str:
    """What promtool has to say; nothing where all is well."""
    promtool = need("promtool", package="prometheus")
    run = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    return run.stdout + run.stderr + ("" if run.returncode == 0 else f"exit {run.returncode}")


def eventful(guest: FakeGuest, daemon: RunningDaemon) -> None:
    """Forks of several kinds, and hooks that end in several ways."""
    write_hook(guest, "10-good", "exit 0")
    write_hook(guest, "20-bad", "exit 1")
    write_hook(guest, "30-nothing-to-do", "exit 77")
    write_hook(guest, "40-killed", "kill -9 $$")
    guest.fork(os.urandom(16))
    daemon.settled(2)
    daemon.ctl("trigger")
    daemon.settled(3)
    eventually(lambda: "vmfork_state 2" in text_of(guest))


def test_promtool_finds_nothing_wrong(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        assert check(text_of(guest)) == ""
        eventful(guest, daemon)
        said = check(text_of(guest))
        keep("promtool.txt", text_of(guest) + f"# promtool check metrics: {said or 'nothing to complain about'}\n")
        assert said == ""
    assert check(text_of(guest)) == ""


def test_promtool_would_find_something_wrong() -> None:
    assert check('# HELP a b\n# TYPE a counter\na{x="1"} 1\n') != ""


def test_everything_of_interest_is_there(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        eventful(guest, daemon)
        text = text_of(guest)
    for line in (
        "vmfork_generation 3",
        "vmfork_detection 2",
        'vmfork_forks_total{kind="live",edge="kmsg"} 1',
        'vmfork_forks_total{kind="manual",edge="manual"} 1',
        'vmfork_hook_results_total{hook="20-bad",result="failed"} 2',
        'vmfork_hook_results_total{hook="30-nothing-to-do",result="skipped"} 2',
        'vmfork_source_live{source="kmsg",role="edge"} 1',
        "vmfork_last_hook_failures 2",
    ):
        assert f"\n{line}\n" in text
    for name in ("vmfork_last_fork_timestamp_seconds", 'vmfork_last_hook_duration_seconds{hook="10-good"}'):
        assert re.search(rf"^{re.escape(name)} [0-9.e+-]+$", text, re.MULTILINE)


def test_the_first_fork_is_a_step_from_zero(guest: FakeGuest) -> None:
    with RunningDaemon(guest):
        assert 'vmfork_forks_total{kind="live",edge="kmsg"} 0\n' in text_of(guest)


def test_a_fork_is_on_display_while_its_hooks_run(guest: FakeGuest) -> None:
    write_hook(guest, "10-slow", 'until [ -e "$VMFORK_ROOT/go" ]; do sleep 0.05; done')
    with RunningDaemon(guest) as daemon:
        guest.fork(os.urandom(16))
        eventually(lambda: "vmfork_state 1\n" in text_of(guest))
        assert "vmfork_generation 2\n" in text_of(guest)
        (guest.root / "go").touch()
        daemon.settled(2)
        eventually(lambda: "vmfork_state 0\n" in text_of(guest))


def test_a_superseded_fork_is_counted_too(guest: FakeGuest) -> None:
    write_hook(guest, "10-slow", 'until [ -e "$VMFORK_ROOT/go" ]; do sleep 0.05; done')
    with RunningDaemon(guest) as daemon:
        guest.fork(os.urandom(16))
        eventually(lambda: "vmfork_generation 2\n" in text_of(guest))
        guest.fork(os.urandom(16))
        (guest.root / "go").touch()
        daemon.settled(3)
        eventually(lambda: 'vmfork_forks_total{kind="live",edge="kmsg"} 2\n' in text_of(guest))


def test_counters_begin_at_the_start_of_the_daemon(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        guest.fork(os.urandom(16))
        daemon.settled(2)
        daemon.stop()
        daemon.start()
        assert 'vmfork_forks_total{kind="live",edge="kmsg"} 0\n' in text_of(guest)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_daemon_that_ended_leaves_nobody_watches(guest: FakeGuest, end: str) -> None:
    with RunningDaemon(guest) as daemon:
        if end == "stop":
            daemon.stop()
        else:
            daemon.kill()
            assert vmforkd(guest, "--nobody-watches").returncode == 0
        assert [line for line in text_of(guest).splitlines() if line[0] != "#"] == ["vmfork_detection 0"]


def test_metrics_that_are_turned_off_are_taken_away(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        guest.put(guest.paths.config_etc + "/vmfork.conf", b"[Publish]\nMetrics=no\n")
        assert daemon.ctl("reload").returncode == 0
        assert not Path(guest.paths.metrics).exists()
        daemon.stop()
        assert not Path(guest.paths.metrics).exists()


def test_metrics_that_are_not_taken_are_a_problem_until_they_are_written(guest: FakeGuest) -> None:
    # In their place something that no file can be renamed over.
    Path(guest.paths.metrics).mkdir()
    with RunningDaemon(guest) as daemon:
        assert any("metrics.prom: Is a directory" in problem for problem in daemon.status()["problems"])
        Path(guest.paths.metrics).rmdir()
        eventually(lambda: Path(guest.paths.metrics).exists())
        assert "vmfork_detection 2\n" in text_of(guest)
        assert daemon.status()["problems"] == []


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_metrics_that_cannot_say_that_nobody_watches_are_taken_away(guest: FakeGuest, end: str) -> None:
    with RunningDaemon(guest) as daemon:
        # In the place of the new file something that cannot be taken away.
        Path(guest.paths.metrics + ".new").mkdir()
        if end == "stop":
            daemon.stop()
        else:
            daemon.kill()
            assert vmforkd(guest, "--nobody-watches").returncode == 0
        assert not Path(guest.paths.metrics).exists()


@contextmanager
def node_exporter(directory: Path) -> Iterator[str]:
    """The real one, with nothing but its textfile collector, on a port of the loopback; the address of its metrics."""
    program = need("prometheus-node-exporter", package="prometheus-node-exporter")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    process = subprocess.Popen(
        [
            *(program, "--collector.disable-defaults", "--collector.textfile"),
            *(f"--collector.textfile.directory={directory}", f"--web.listen-address=127.0.0.1:{port}"),
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}/metrics"
    finally:
        process.terminate()
        process.wait(PATIENCE_SEC)


def scraped(address: str) -> str:
    try:
        with urllib.request.urlopen(address, timeout=PATIENCE_SEC) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def test_node_exporter_collects_them_through_a_link(guest: FakeGuest, tmp_path: Path) -> None:
    collected = tmp_path / "collected"
    collected.mkdir()
    (collected / "vmfork.prom").symlink_to(guest.paths.metrics)
    with RunningDaemon(guest) as daemon, node_exporter(collected) as address:
        assert "vmfork_generation 1\n" in eventually(lambda: scraped(address))
        eventful(guest, daemon)
        text = scraped(address)
        assert "vmfork_generation 3\n" in text
        assert "node_textfile_scrape_error 0\n" in text
        assert 'vmfork_hook_results_total{hook="20-bad",result="failed"} 2\n' in text
        daemon.stop()
        assert "vmfork_detection 0\n" in scraped(address)
