# SPDX-License-Identifier: Apache-2.0
"""The command lines of the units, of the packaged programs and of the shipped hooks, word by word, where they would be
installed, with modules of somebody else's planted in every place that an ordinary Python would look at.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fakeguest import FakeGuest
from support.runningdaemon import write_hook
from support.tools import need_root
from support.unpacked import Unpacked
from vmfork.page import DETECTION_EVENT, DETECTION_OFFSET, PAGE_SIZE, PageWriter, read_page

TOP = Path(__file__).resolve().parents[2]
PYTHON = "/usr/bin/python3"
# What vmfork or the interpreter imports early, and what the interpreter looks for by itself.
PLANTED = ("sitecustomize", "usercustomize", "vmfork", "json", "logging", "signal", "struct", "apport_python_hook")
# Until a reaction settled, then as its service manager ends it.
UNTIL_IT_REACTED = """{command} & daemon=$!
until [ -S "$VMFORK_ROOT/run/vmfork/io.vmfork" ]; do kill -0 $daemon; sleep 0.05; done
vmforkctl trigger; vmforkctl wait --settled --after=1 --timeout=60
kill $daemon; wait $daemon"""


def unit_commands() -> list[tuple[str, str]]:
    """Unit and command line of everything that the units run, without the prefixes of systemd.service(5)."""
    found = []
    for unit in sorted((TOP / "units").glob("*.service")):
        for line in re.findall(r"^Exec\w+=(.*)$", unit.read_text(), re.MULTILINE):
            found.append((unit.name, line.lstrip("-+@!:")))
    return found


PYTHON_COMMANDS = sorted({line for _, line in unit_commands() if "python" in line or "vmforkctl" in line})
PAGE_COMMANDS = sorted({line for _, line in unit_commands() if line.startswith("/bin/dd ")})
HOOKS = sorted(path.name for path in (TOP / "hooks.d").glob("[0-9]*"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unpacked]:
    """This tree, installed as debian/rules and debian/*.install do it."""
    need_root()
    place = tmp_path_factory.mktemp("installed")
    tree = place / "tree"
    for source, target in (
        ("debian/bin/vmforkctl", "usr/bin/vmforkctl"),
        ("debian/bin/vmforkd", "usr/sbin/vmforkd"),
        *((f"hooks.d/{name}", f"usr/lib/vmfork/hooks.d/{name}") for name in HOOKS),
    ):
        (tree / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TOP / source, tree / target)
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(TOP / "agent/vmfork", tree / "usr/lib/python3/dist-packages/vmfork", ignore=unwanted)
    more = ["mount -t tmpfs tmpfs /run", "mkdir -m 0755 /run/vmfork"]
    with Unpacked(tree, place / "scratch", (), more=more) as made:
        yield made


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    with FakeGuest(tmp_path / "guest") as made:
        yield made


class Trap:
    """A user's directory full of modules, each of which leaves its name when it is imported."""

    def __init__(self, place: Path) -> None:
        self.home = place / "home"
        self.home.mkdir()
        self.sprung = place / "sprung"
        ask = [PYTHON, "-I", "-c", "import site; print(site.getusersitepackages())"]
        site = Path(subprocess.check_output(ask, env={"HOME": os.fspath(self.home)}, text=True).strip())
        site.mkdir(parents=True)
        for directory in (self.home, site):
            for name in PLANTED:
                (directory / f"{name}.py").write_text(f"open({os.fspath(self.sprung)!r}, 'a').write({name!r} + ' ')\n")
            (directory / "planted.pth").write_text(f"import os; open({os.fspath(self.sprung)!r}, 'a').write('pth ')\n")

    def environment(self) -> dict[str, str]:
        """What a caller may have in his, by accident or not."""
        return {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": os.fspath(self.home),
            "PYTHONPATH": os.fspath(self.home),
            "PYTHONSTARTUP": os.fspath(self.home / "sitecustomize.py"),
            "PYTHONUSERBASE": os.fspath(self.home / ".local"),
            "PYTHONINSPECT": "1",
            "PYTHONWARNINGS": "error",
            "PYTHONBREAKPOINT": "sitecustomize.x",
        }

    def run(self, installed: Unpacked, guest: FakeGuest, script: str, *, ok: bool = True, **more: str) -> str:
        """What a shell script says that is run there, in the user's directory."""
        settings = {**self.environment(), "VMFORK_ROOT": os.fspath(guest.root), **more}
        words = ["env", "-i", *(f"{name}={value}" for name, value in settings.items()), "sh", "-ec"]
        done = installed.run(*words, f"cd {shlex.quote(os.fspath(self.home))}\n{script}", check=False)
        assert done.returncode == 0 or not ok, f"{script}: {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def caught(self) -> set[str]:
        return set(self.sprung.read_text().split()) if self.sprung.exists() else set()


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    return Trap(tmp_path)


def test_the_trap_catches_a_python_that_is_not_isolated(installed: Unpacked, guest: FakeGuest, trap: Trap) -> None:
    trap.run(installed, guest, f"{PYTHON} -m vmfork.daemon --version", ok=False)
    assert {"sitecustomize", "vmfork"} <= trap.caught()


@pytest.mark.parametrize("command", PYTHON_COMMANDS)
def test_the_command_line_of_a_unit_runs_no_module_of_somebody_else(
    installed: Unpacked, guest: FakeGuest, trap: Trap, command: str
) -> None:
    assert "-I" in command.split() or command.startswith("/usr/bin/vmforkctl ")
    with PageWriter(guest.paths.generation_page) as page:
        page.set_detection(DETECTION_EVENT)
    if command.endswith("vmfork.daemon"):
        write_hook(guest, "10-hook", "env | sed 's/=.*//' | sort >$VMFORK_ROOT/names")
        trap.run(installed, guest, UNTIL_IT_REACTED.format(command=command))
        assert not any(name.startswith("PYTHON") for name in (guest.root / "names").read_text().split())
    else:
        # `react` finds no daemon to report to: it has begun by then.
        trap.run(installed, guest, command, ok="react" not in command)
    assert trap.caught() == set()


@pytest.mark.parametrize("command", ["vmforkctl --version", "vmforkctl hooks", "vmforkd --version", "vmforkd --boot"])
def test_a_packaged_program_runs_no_module_of_somebody_else(
    installed: Unpacked, guest: FakeGuest, trap: Trap, command: str
) -> None:
    trap.run(installed, guest, command)
    assert trap.caught() == set()


@pytest.mark.parametrize("name", HOOKS)
def test_a_shipped_hook_runs_no_module_of_somebody_else(
    installed: Unpacked, guest: FakeGuest, trap: Trap, name: str
) -> None:
    hook = f"/usr/lib/vmfork/hooks.d/{name}"
    said = trap.run(installed, guest, f"echo '{{}}' | {hook} after-fork", ok=False, VMFORK_DRY_RUN="1")
    assert "Traceback" not in said
    assert trap.caught() == set()


def test_no_caller_decides_where_the_interpreter_finds_its_own_library(
    installed: Unpacked, guest: FakeGuest, trap: Trap
) -> None:
    for command in ("vmforkctl --version", "vmforkd --version", f"{PYTHON} -I -m vmfork.daemon --version"):
        assert "vmfork" in trap.run(installed, guest, command, PYTHONHOME="/nonexistent")
    assert trap.caught() == set()


@pytest.mark.parametrize("command", PAGE_COMMANDS)
def test_the_quick_word_that_nobody_watches_changes_one_field_and_follows_no_link(
    installed: Unpacked, tmp_path: Path, command: str
) -> None:
    page, bait = tmp_path / "page", tmp_path / "bait"
    with PageWriter(str(page), initial_generation=7) as writer:
        writer.set_detection(DETECTION_EVENT)
    before = page.read_bytes()
    bait.write_bytes(b"precious" * (PAGE_SIZE // 8))
    place = "/run/vmfork/generation"
    installed.run("sh", "-ec", f"cp {page} {place}; {command}; cp {place} {page}; ln -sf {bait} {place}")
    after = page.read_bytes()
    assert struct.unpack_from("<I", before, DETECTION_OFFSET) == (DETECTION_EVENT,)
    assert after == before[:DETECTION_OFFSET] + bytes(4) + before[DETECTION_OFFSET + 4 :]
    assert read_page(str(page)).generation == 7
    refused = installed.run("sh", "-c", command, check=False)
    assert refused.returncode != 0
    assert bait.read_bytes() == b"precious" * (PAGE_SIZE // 8)
    installed.run("rm", place)
