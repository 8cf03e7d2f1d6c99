# SPDX-License-Identifier: Apache-2.0
"""The Debian packages in clean roots of both releases: they build there, lintian has nothing to say, and installing,
upgrading, removing and purging them leaves neither dirt nor damage. No virtual machine is needed, but minutes are.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.archive import Packages, tree
from lab.host import LabError

from support.artifacts import keep
from support.chroot import Chroot
from support.tools import need, need_root, unavailable

TOP = Path(__file__).resolve().parents[2]
RELEASES = ("bookworm", "trixie")

pytestmark = pytest.mark.vm

BUILD_TOOLS = (
    "build-essential",
    "debhelper",
    "dh-python",
    "lintian",
    "pybuild-plugin-pyproject",
    "python3-all",
    "python3-docutils",
    "python3-setuptools",
)
# What the packages depend on, and everything that has a place of its own in the order of the boot.
CROWD = (
    "chrony",
    "cloud-init",
    "dbus",
    "ifupdown",
    "isc-dhcp-client",
    "network-manager",
    "openssh-server",
    "python3-pyroute2",
    "python3-pyudev",
    "python3-systemd",
    "systemd-resolved",
    "systemd-sysv",
    "udev",
)


def chroot(name: str, release: str, include: tuple[str, ...], scratch: Path) -> Chroot:
    need("mmdebstrap", package="mmdebstrap")
    need("unshare", package="util-linux")
    need_root()
    architecture = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True, check=True)
    wanted = Packages(
        name=f"{name}-{release}",
        suite=release,
        architecture=architecture.stdout.strip(),
        include=include,
        installed=True,
    )
    try:
        return Chroot(tree(wanted, estimate="a minute"), scratch)
    except LabError as error:
        unavailable(str(error))
        raise


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def built(release: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with the packages, made in a clean root of the release; the build's output is beside them."""
    scratch = tmp_path_factory.mktemp(f"build-{release}")
    box = chroot("packages-build", release, BUILD_TOOLS, scratch)
    source = box.upper / "root" / "vmfork"
    source.mkdir(parents=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=TOP,
        stdout=subprocess.PIPE,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = TOP / name
        if path.is_symlink() or path.is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, source / name, follow_symlinks=False)
    output = box.run("cd /root/vmfork && dpkg-buildpackage -us -uc 2>&1")
    keep(f"build-{release}.log", output)
    # An override of what the environment lacks is no statement about the package: only errors and warnings count.
    said = box.run("cd /root && lintian --allow-root --fail-on error,warning --info vmfork_*.changes 2>&1", check=False)
    (scratch / "lintian.log").write_text(said)
    keep(f"lintian-{release}.log", said or "lintian has nothing to say\n")
    products = scratch / "products"
    products.mkdir()
    for deb in (box.upper / "root").glob("*.deb"):
        shutil.copy(deb, products)
    yield products
    shutil.rmtree(box.upper)


@pytest.fixture
def guest(release: str, built: Path, tmp_path: Path) -> Iterator[Chroot]:
    """An installed system without vmfork; the packages are in /root."""
    box = chroot("packages-install", release, CROWD, tmp_path)
    (box.upper / "root").mkdir(mode=0o700)
    for deb in built.glob("*.deb"):
        shutil.copy(deb, box.upper / "root")
    yield box
    shutil.rmtree(box.upper)


@pytest.fixture(scope="module")
def installed(release: str, built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chroot]:
    """An installed system with vmfork, for tests that only look."""
    box = chroot("packages-install", release, CROWD, tmp_path_factory.mktemp(f"installed-{release}"))
    (box.upper / "root").mkdir(mode=0o700)
    for deb in built.glob("*.deb"):
        shutil.copy(deb, box.upper / "root")
    box.run(INSTALL)
    yield box
    shutil.rmtree(box.upper)


INSTALL = "dpkg --install --force-confold /root/*.deb"
NAMES = "vmfork python3-vmfork libvmfork-dev"


def test_three_packages_are_built(built: Path) -> None:
    assert {path.name.partition("_")[0] for path in built.glob("*.deb")} == set(NAMES.split())


def test_lintian_finds_neither_errors_nor_warnings(built: Path) -> None:
    log = (built.parent / "lintian.log").read_text()
    assert re.findall(r"^[EW]: .*", log, re.MULTILINE) == []
    assert "internal error" not in log


def test_installed_program_answers(installed: Chroot) -> None:
    assert (
        installed.run("vmforkctl --version").split()[-1]
        == installed.run("dpkg-query -W -f '${Version}' vmfork").strip()
    )


def test_purge_leaves_nothing_behind(guest: Chroot) -> None:
    # Triggers of the packages rewrite these for anybody who is installed.
    own = re.compile(r"^(?!/var/(lib/dpkg|log|cache|lib/systemd/catalog)/|/dev/|/run/|/proc/).*")
    before = guest.files()
    guest.run(INSTALL)
    assert "/usr/bin/vmforkctl" in guest.files()
    guest.run("mkdir -p /var/lib/vmfork && touch /var/lib/vmfork/state.json && vmforkctl --version")
    guest.run(f"dpkg --purge {NAMES}")
    left = {path for path in guest.files() - before if own.match(path)}
    assert left == set()


def test_administrators_files_survive_upgrade_removal_and_purge(guest: Chroot) -> None:
    guest.run(INSTALL)
    guest.run("""
        printf '[React]\\nTemplate=yes\\n' >/etc/vmfork/vmfork.conf
        echo mine >>/etc/vmfork/hooks.d/README
        printf '#!/bin/sh\\n' >/etc/vmfork/hooks.d/50-mine
    """)
    guest.run(INSTALL)
    guest.run(f"dpkg --remove {NAMES}")
    guest.run(INSTALL)
    assert guest.run("tail -n 1 /etc/vmfork/hooks.d/README") == "mine\n"
    guest.run(f"dpkg --purge {NAMES}")
    assert guest.run("cat /etc/vmfork/vmfork.conf") == "[React]\nTemplate=yes\n"
    guest.run("test -e /etc/vmfork/hooks.d/50-mine")


def test_daemon_and_early_boot_are_enabled(installed: Chroot) -> None:
    assert installed.run("systemctl is-enabled vmforkd vmfork-boot").split() == ["enabled", "enabled"]


def test_disabled_daemon_stays_disabled_over_an_upgrade(guest: Chroot) -> None:
    guest.run(INSTALL)
    guest.run("systemctl disable vmforkd")
    guest.run(INSTALL)
    assert guest.run("systemctl is-enabled vmforkd", check=False).split() == ["disabled"]


def test_installation_starts_nothing_but_the_daemon(installed: Chroot) -> None:
    scripts = installed.run("cat /var/lib/dpkg/info/vmfork.*inst /var/lib/dpkg/info/vmfork.*rm")
    started = re.findall(r"deb-systemd-invoke \S+ (.*?) >", scripts)
    assert {unit.strip("'") for unit in started} == {"vmforkd.service"}
    assert "trigger --action=change" in scripts
    assert "vmforkctl" not in scripts


CYCLE = "systemd-analyze verify --man=no default.target 2>&1 | grep -i cycle || true"
# What cloud-init's generator does in a guest that has a data source.
CROWDED = """
systemctl enable systemd-networkd NetworkManager ssh networking chrony
ln -sf /lib/systemd/system/cloud-init.target /etc/systemd/system/multi-user.target.wants/
"""


def test_boot_has_no_ordering_cycle(installed: Chroot) -> None:
    installed.run(CROWDED)
    assert installed.run(CYCLE) == ""


def test_ordering_cycle_with_each_of_the_others_would_be_seen(guest: Chroot, release: str) -> None:
    guest.run(INSTALL + CROWDED)
    cloud_init = {"bookworm": "cloud-init", "trixie": "cloud-init-network"}[release]
    for other in ("ssh", "systemd-networkd", "NetworkManager", "networking", cloud_init):
        guest.run(f"""
            mkdir -p /etc/systemd/system/vmfork-boot.service.d
            printf '[Unit]\\nAfter={other}.service\\n' >/etc/systemd/system/vmfork-boot.service.d/wrong.conf
        """)
        # Which of the units of the cycle is named depends on where the service manager broke it.
        assert "Found ordering cycle" in guest.run(CYCLE), other


def test_units_are_understood_by_the_release(installed: Chroot, release: str) -> None:
    units = "vmforkd.service vmfork-boot.service vmfork-react.service vmfork-unwatched.service vmfork.target"
    said = installed.run(f"systemd-analyze verify --man=no {units} 2>&1 || true")
    keep(f"systemd-analyze-verify-{release}.txt", said or "systemd-analyze verify has nothing to say\n")
    assert [line for line in said.splitlines() if "vmfork" in line] == []


def test_daemon_is_sandboxed_by_the_rules_of_the_release(installed: Chroot, release: str) -> None:
    figure = installed.run("systemd-analyze security --offline=yes --threshold=25 --no-pager vmforkd.service")
    keep(f"systemd-analyze-security-{release}.txt", figure)
