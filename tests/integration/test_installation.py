# SPDX-License-Identifier: Apache-2.0
"""Other ways in: pip into a virtual environment, `python -m`, a guest whose init is a shell script, a container."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmfork
from support.fakeguest import FakeGuest
from support.runningdaemon import PATIENCE_SEC, RunningDaemon, environment, eventually, write_hook
from support.tools import need, need_root, unavailable

TOP = Path(vmfork.__file__).parents[2]
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input", "--no-cache-dir", "-q")


def run(*command: str | Path, **more: str) -> str:
    """What a program prints; it knows nothing of the checkout."""
    done = subprocess.run(
        command,
        env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": "/nonexistent", **more},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, offline, with the setuptools that is installed here."""
    have = subprocess.run([sys.executable, "-c", "import setuptools, wheel, pip"], capture_output=True, check=False)
    if have.returncode != 0:
        unavailable("pip, setuptools or wheel is not in this environment (make setup)")
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TOP / name, source)
    shutil.copytree(TOP / "agent", source / "agent", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--use-pep517", "-w", directory)
    run(sys.executable, *PIP, "wheel", *options, source)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The programs of a fresh virtual environment that holds nothing but vmfork."""
    place = tmp_path_factory.mktemp("environment") / "venv"
    run(Path(sys.executable).resolve(), "-m", "venv", place)
    run(place / "bin/python", *PIP, "install", "--no-deps", "--no-index", wheel)
    return place / "bin"


def test_the_wheel_holds_every_module_the_interfaces_and_the_marker_of_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = TOP / "agent"
    assert {name for name in names if name.endswith(".py")} == {
        str(path.relative_to(package)) for path in (package / "vmfork").rglob("*.py")
    }
    assert {"vmfork/py.typed", "vmfork/varlink/io.vmfork.varlink", "vmfork/varlink/org.varlink.service.varlink"} < names
    assert {name.split("/")[0] for name in names} == {"vmfork", f"vmfork-{vmfork.__version__}.dist-info"}


def test_both_programs_tell_their_version(venv: Path) -> None:
    for command, name in (
        ((venv / "python", "-m", "vmfork"), "vmforkctl"),
        ((venv / "vmforkctl",), "vmforkctl"),
        ((venv / "python", "-m", "vmfork.daemon"), "vmforkd"),
        ((venv / "vmforkd",), "vmforkd"),
    ):
        assert run(*command, "--version") == f"{name} {vmfork.__version__}\n"


def test_the_library_needs_nothing_else(venv: Path, tmp_path: Path) -> None:
    program = "import vmfork; print(vmfork.supported(), vmfork.Guard().forked())"
    assert run(venv / "python", "-c", program, VMFORK_ROOT=str(tmp_path)) == "False False\n"


# PID 1 of its own PID and mount namespaces: no service manager, no bus, no journal; it starts vmforkd whenever it ends.
INIT = r"""
mount -t proc proc /proc
mkdir -p "$1/run/vmforkd" "$1/var/lib/vmfork"
chmod 0700 "$1/run/vmforkd" "$1/var/lib/vmfork"
while true; do
    "$2/vmforkd" --root "$1"
    "$2/vmforkd" --root "$1" --nobody-watches
    sleep 0.1
done
"""


@pytest.fixture
def plain_guest(tmp_path: Path, venv: Path) -> Iterator[FakeGuest]:
    """A guest whose init is a shell script."""
    need_root()
    unshare = need("unshare", package="util-linux")
    with FakeGuest(tmp_path / "guest") as guest:
        write_hook(guest, "10-mine", 'echo "$1 $VMFORK_GENERATION" >> "$VMFORK_ROOT/ran"')
        namespaces = [unshare, "--pid", "--mount", "--fork", "--kill-child"]
        init = subprocess.Popen(
            [*namespaces, "sh", "-c", INIT, "init", str(guest.root), str(venv)], env={"PATH": os.environ["PATH"]}
        )
        try:
            eventually(lambda: is_up(venv, guest))
            yield guest
        finally:
            init.kill()
            init.wait(PATIENCE_SEC)


def is_up(venv: Path, guest: FakeGuest) -> bool:
    command = (venv / "vmforkctl", "--root", guest.root, "status", "-q")
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


def settled(venv: Path, guest: FakeGuest) -> str:
    """Wait for generation 2."""
    waiting = ("wait", "--settled", "--after", "1", "--timeout", str(PATIENCE_SEC))
    return run(venv / "vmforkctl", "--root", guest.root, *waiting)


def test_a_guest_without_a_service_manager_runs_its_hooks(plain_guest: FakeGuest, venv: Path) -> None:
    plain_guest.fork(os.urandom(16))
    assert settled(venv, plain_guest) == "generation 2: live, settled\n"
    assert (plain_guest.root / "ran").read_text() == "after-fork 2\n"


def test_a_fork_while_a_plain_init_starts_the_daemon_again_is_not_lost(plain_guest: FakeGuest, venv: Path) -> None:
    os.kill(daemon_of(plain_guest), signal.SIGKILL)
    plain_guest.fork(os.urandom(16))
    eventually(lambda: is_up(venv, plain_guest))
    assert settled(venv, plain_guest) == "generation 2: live, settled\n"
    assert (plain_guest.root / "ran").read_text() == "after-fork 2\n"


def test_a_container_with_the_public_directory_follows_forks(tmp_path: Path) -> None:
    need_root()
    unshare = need("unshare", package="util-linux")
    container = tmp_path / "container"
    (container / "run/vmfork").mkdir(parents=True)
    program = """
import vmfork
guard, before = vmfork.Guard(strict=True), vmfork.generation()
with vmfork.Watcher() as watcher:
    print(vmfork.supported(), guard.forked(), flush=True)
    event = watcher.read() or next(iter(watcher))
    print(event.generation - before, guard.forked(), vmfork.settled(before, 20) is not None)
"""
    with FakeGuest(tmp_path / "guest") as guest, RunningDaemon(guest):
        mount = 'mount --bind "$1" "$2" && mount -o remount,ro,bind "$2"; exec "$0" -c "$3"'
        inside = ("sh", "-ec", mount, sys.executable, guest.paths.run_public, container / "run/vmfork", program)
        with subprocess.Popen(
            [unshare, "--mount", "--pid", "--fork", "--kill-child", *inside],
            env=environment() | {"VMFORK_ROOT": str(container)},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout
            assert process.stdout.readline() == "True False\n"
            guest.fork(os.urandom(16))
            assert process.communicate(timeout=PATIENCE_SEC)[0] == "1 True True\n"


def daemon_of(guest: FakeGuest) -> int:
    """The PID, in our namespace, of the vmforkd of this guest."""
    ours = f"/vmforkd\0--root\0{guest.root}\0".encode()
    (pid,) = (
        int(one.name) for one in Path("/proc").iterdir() if one.name.isdigit() and commandline(one).endswith(ours)
    )
    return pid


def commandline(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
