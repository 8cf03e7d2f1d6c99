# SPDX-License-Identifier: Apache-2.0
"""From `apt install ./*.deb` to `apt purge`, in guests of both releases that never saw vmfork and have no network.

Each guest is booted once, installed into once and saved; the tests restore it.
"""

from __future__ import annotations

import base64
import re
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lab import autopkgtest, view
from lab.clones import ARTIFACTS, Clones
from lab.guest import Guest, Saved, Spec
from lab.guests import Guests
from lab.payload import payload

from support.tools import need

pytest_plugins = ("lab.plugin",)
pytestmark = pytest.mark.vm

RELEASES = ("bookworm", "trixie")
# Debian 12's cloud kernel has no driver for the VM Generation ID.
DETECTION = {"bookworm": "timer", "trixie": "event"}
PACKAGES = ("libvmfork-dev", "python3-vmfork", "vmfork")
# Emulated, a package's maintainer scripts take their time.
SECONDS = 400.0
# Written meanwhile by whoever else lives in a Debian system, and by apt about itself.
OTHERS = re.compile(
    r"/(?:root/|tmp/|dev/|proc/|sys/|run/|var/(?:cache|log|tmp)/|var/lib/(?:apt|dpkg|systemd)/"
    r"|etc/(?:\.updated|ld\.so\.cache)|.*/__pycache__)"
)
APT = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet", "--yes")

Measure = Callable[[Guest, view.Event], view.Event]


def files(guest: Guest) -> set[str]:
    """Every path of the guest's disk that is nobody else's own business."""
    found = guest.check("find", "/", "-xdev", timeout=SECONDS).splitlines()
    return {path for path in found if not OTHERS.match(path)}


def accounts(guest: Guest) -> str:
    """Users and groups."""
    return guest.check("cat", "/etc/passwd", "/etc/group")


def install(guest: Guest) -> str:
    """Bring the packages of this checkout into the guest and install them as its administrator would."""
    for path in payload().packages[0].parent.glob("*.deb"):
        encoded = base64.b64encode(path.read_bytes()).decode()
        guest.check("sh", "-c", 'base64 -d >"$1"', "put", f"/root/{path.name}", stdin=encoded)
    guest.check(*APT, "update", timeout=SECONDS)
    return guest.check("sh", "-c", f"cd /root && {' '.join(APT)} install ./*.deb", timeout=SECONDS)


class Fresh:
    """A guest with vmfork just installed, and what it was before."""

    def __init__(self, guest: Guest) -> None:
        self.files = files(guest)
        self.accounts = accounts(guest)
        self.output = install(guest)
        view.wait_watching(guest)
        self.saved: Saved = guest.save()


def fresh_guest(name: str, spec: Spec, lab: Path) -> Fresh:
    guest = Guest(spec, name, lab, guid=uuid.uuid4(), smbios_uuid=uuid.uuid4())
    try:
        return Fresh(guest.wait_ready())
    except BaseException:
        guest.report(ARTIFACTS / name)
        raise
    finally:
        guest.kill()


@pytest.fixture(scope="module")
def fresh_guests(lab: Path) -> dict[str, Fresh]:
    """One of each release, made side by side: an emulated processor keeps one of the host's busy."""
    payload()
    specs = {release: Guests(None).fresh(release) for release in RELEASES}
    with ThreadPoolExecutor() as pool:
        made = {name: pool.submit(fresh_guest, f"fresh-{name}", spec, lab) for name, spec in specs.items()}
        return {release: future.result() for release, future in made.items()}


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def fresh(release: str, fresh_guests: dict[str, Fresh]) -> Fresh:
    return fresh_guests[release]


def test_apt_alone_makes_a_guest_that_notices_forks(release: str, fresh: Fresh, clones: Clones) -> None:
    guest = clones.restore(fresh.saved, "installed", guid=fresh.saved.guid)
    assert not re.search(r"(?i)error|warning|failed", fresh.output), fresh.output
    assert guest.check("systemctl", "is-active", "vmforkd.service") == "active\n"
    assert guest.check("systemctl", "is-enabled", "vmforkd.service", "vmfork-boot.service").split() == ["enabled"] * 2
    doctor = guest.check("vmforkctl", "doctor")
    verdict = {"event": "Forks are noticed", "timer": "Forks are noticed, but only by the timer"}[DETECTION[release]]
    assert doctor.splitlines()[0].startswith(verdict), doctor
    assert view.status(guest)["detection"] == DETECTION[release]
    assert view.events(guest) == []
    # The unit's own figure, by the service manager that runs it.
    guest.check("systemd-analyze", "security", "--threshold=25", "--no-pager", "vmforkd.service", timeout=SECONDS)
    assert guest.check("systemctl", "list-units", "--failed", "--plain", "--no-legend") == ""


@pytest.mark.parametrize("release", ["trixie"], indirect=True)
def test_autopkgtests_of_the_running_system_pass(fresh: Fresh, clones: Clones, tmp_path: Path) -> None:
    program = need("autopkgtest", package="autopkgtest")
    guest = clones.restore(fresh.saved, "autopkgtest", guid=fresh.saved.guid)
    output, source = tmp_path / "output", autopkgtest.source(tmp_path)
    with autopkgtest.testbed(guest) as testbed:
        command = [program, f"--output-dir={output}", "--timeout-factor=5", "--no-built-binaries"]
        command += ["--test-name=daemon", "--test-name=fork", str(source), "--", *testbed]
        verdicts = autopkgtest.verdicts(command, output, name="guest", seconds=1200)
    assert verdicts == {"daemon": "PASS", "fork": "PASS"}, autopkgtest.said(output)


@pytest.mark.parametrize("release", ["trixie"], indirect=True)
def test_an_upgrade_over_the_running_daemon_is_no_fork_and_keeps_the_page(fresh: Fresh, clones: Clones) -> None:
    guest = clones.restore(fresh.saved, "upgraded", guid=fresh.saved.guid)
    page = ("stat", "--format=%i", "/run/vmfork/generation")
    before, inode = view.main_pid(guest), guest.check(*page)
    # The same packages once more: dpkg calls the maintainer scripts as for any other upgrade.
    guest.check("sh", "-c", f"cd /root && {' '.join(APT)} --reinstall install ./*.deb", timeout=SECONDS)
    view.wait_watching(guest)
    assert view.main_pid(guest) != before
    assert guest.check(*page) == inode
    assert view.status(guest)["generation"] == 1
    assert view.events(guest) == []


def test_a_fork_runs_the_default_hooks_and_purge_leaves_nothing(
    release: str, fresh: Fresh, clones: Clones, measured: Measure
) -> None:
    guest = clones.restore(fresh.saved, "forked", guid=uuid.uuid4())
    event = measured(guest, view.wait_event(guest, after=1, timeout=300))
    assert (event["generation"], event["kind"], event["state"]) == (2, "live", "settled"), event
    assert event["edges"] == [{"event": "kmsg", "timer": "timer"}[DETECTION[release]]]
    results = {one["name"]: one["result"] for one in event["hooks"]}
    assert results["10-rng"] == "ok"
    assert len(results) >= 10
    assert set(results.values()) == {"ok", "skipped"}, results

    guest.check(*APT, "purge", "--autoremove", *PACKAGES, timeout=SECONDS)
    now = files(guest)
    assert (now - fresh.files, fresh.files - now) == (set(), set())
    assert accounts(guest) == fresh.accounts
    # The lab's own port is named after vmfork, too.
    left = guest.check("find", "/run", "/dev", "-name", "*vmfork*", "-o", "-name", "sysgenid").splitlines()
    assert [path for path in left if "virtio-ports" not in path] == []
    for listing in (("list-unit-files",), ("list-units", "--all", "--plain")):
        assert guest.run("systemctl", *listing, "vmfork*", "--no-legend").stdout == ""
    assert guest.check("systemctl", "list-units", "--failed", "--plain", "--no-legend") == ""
    assert guest.run("dpkg-query", "--show", *PACKAGES).stdout == ""
