# SPDX-License-Identifier: Apache-2.0
"""The checks that need no running code: linters, types, spelling, units, and the architecture's own rules."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from support.tools import need, unavailable
from vmfork import __version__, ids

TOP = Path(__file__).resolve().parents[2]
PACKAGE = TOP / "agent" / "vmfork"
UNITS = TOP / "units"
UNIT_FILES = sorted(path.name for path in UNITS.glob("*") if path.suffix in {".service", ".target"})

# Arrows point down only: a room may import its own level and those below. Whoever is not named is at the bottom.
LEVELS = {"cli": 4, "__main__": 4, "daemon": 4, "detector": 3, "reactor": 3, "actions": 3, "library": 3}
LEVELS |= {"edges": 2, "truths": 2, "varlink": 2}

# What the units start, in the places where both releases of Debian may look for it.
PROGRAMS = (
    "usr/bin/python3",
    "usr/bin/vmforkctl",
    "usr/bin/sh",
    "bin/sh",
    "bin/dd",
    "usr/sbin/modprobe",
    "sbin/modprobe",
)

# Each third-party library has one door.
DOORS = {"pyudev": "vmfork.edges.uevent", "systemd": "vmfork.sysd", "pyroute2": "vmfork.actions.netlink"}


def run(*command: str | Path) -> None:
    """Run a checker at the top of the tree; what it prints is the failure."""
    done = subprocess.run(command, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout}", pytrace=False)


def need_module(name: str) -> str:
    """A Python tool of the development environment."""
    if importlib.util.find_spec(name) is None:
        unavailable(f"{name} is not installed (make setup)")
    return name


@cache
def source_files() -> tuple[Path, ...]:
    """Every file that belongs to the project, committed or about to be."""
    if not (TOP / ".git").exists() or shutil.which("git") is None:
        unavailable("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=TOP,
        stdout=subprocess.PIPE,
        check=True,
    )
    names = (name for name in listed.stdout.decode().split("\0") if name)
    return tuple(path for path in (TOP / name for name in names) if path.is_file() and not path.is_symlink())


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def first_line(path: Path) -> str:
    return text_of(path).partition("\n")[0]


def test_ruff_finds_nothing() -> None:
    run(sys.executable, "-m", need_module("ruff"), "check", "--quiet", ".")


def test_code_is_formatted() -> None:
    run(sys.executable, "-m", need_module("ruff"), "format", "--check", "--quiet", ".")


def test_types_are_strict() -> None:
    run(sys.executable, "-m", need_module("mypy"), "agent", "tests")


def test_words_are_spelled_right() -> None:
    need_module("codespell_lib")
    # ND: neighbour discovery.
    run(sys.executable, "-m", "codespell_lib", "--ignore-words-list=nd", *source_files())


def test_shell_scripts_are_sound() -> None:
    shellcheck = need("shellcheck", package="shellcheck")
    scripts = [path for path in source_files() if re.match(r"#!.*\b(ba)?sh\b", first_line(path))]
    assert len(scripts) >= 5
    run(shellcheck, "--external-sources", *scripts, TOP / "completion" / "vmforkctl.bash")


# --- architecture


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, ast.Module]:
    return {module_name(path): ast.parse(text_of(path), str(path)) for path in sorted(PACKAGE.rglob("*.py"))}


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node below, without what only the type checker runs."""
    if isinstance(tree, ast.If) and isinstance(tree.test, ast.Name) and tree.test.id == "TYPE_CHECKING":
        return
    yield tree
    for child in ast.iter_child_nodes(tree):
        yield from nodes(child)


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere below, in functions too."""
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules() else node.module


def level(module: str) -> int:
    parts = module.split(".")
    return LEVELS.get(parts[1], 1) if len(parts) > 1 else 1


def test_imports_point_down() -> None:
    upward = [
        f"{module} imports {target}"
        for module, tree in modules().items()
        if module != "vmfork"
        for target in imported(tree)
        if target.startswith("vmfork.") and level(target) > level(module)
    ]
    assert upward == []


def test_imports_have_no_cycle() -> None:
    graph = {
        module: {target for target in imported(tree) if target in modules()} - {module, "vmfork"}
        for module, tree in modules().items()
        if module != "vmfork"
    }
    while leaves := {module for module, targets in graph.items() if not targets & graph.keys()}:
        graph = {module: targets for module, targets in graph.items() if module not in leaves}
    assert {module: sorted(targets & graph.keys()) for module, targets in graph.items()} == {}


@pytest.mark.parametrize(("library", "door"), DOORS.items())
def test_third_party_library_has_one_importer(library: str, door: str) -> None:
    importers = {
        module
        for module, tree in modules().items()
        for target in imported(tree)
        if target == library or target.startswith(f"{library}.")
    }
    assert importers == {door}


def test_pyroute2_is_imported_only_when_it_is_needed() -> None:
    tree = modules()[DOORS["pyroute2"]]
    at_start = {name for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for name in imported(node)}
    assert not any(name.startswith("pyroute2") for name in at_start)


def test_library_needs_the_standard_library_only() -> None:
    waiting = {"vmfork", *(module for module in modules() if module.startswith("vmfork.library"))}
    reached: set[str] = set()
    while waiting:
        module = waiting.pop()
        reached.add(module)
        waiting |= {name for name in imported(modules()[module]) if name in modules()} - reached
    assert {
        module for module in reached for name in imported(modules()[module]) if name.split(".")[0] in DOORS
    } == set()


def test_no_module_has_outgrown_its_room() -> None:
    assert [path.name for path in PACKAGE.rglob("*.py") if len(text_of(path).splitlines()) > 300] == []


# --- what must not be in the tree


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        # Written so that this file does not match itself.
        (
            "host of a registry",
            r"deb[.]debian[.]org|py[p]i\.org|npmj[s]\.|security[.]debian[.]org|files[.]pythonhosted",
        ),
        ("path of a machine", r"(?<![\w.])/(?:wor[k]|far[m])/"),
        ("loose end", r"\b(?:TOD[O]|FIXM[E]|XX[X]|NotImplementedErro[r])\b"),
    ],
)
def test_tree_holds_none(what: str, pattern: str) -> None:
    found = [
        f"{path.relative_to(TOP)}:{number}: {line.strip()[:120]}"
        for path in source_files()
        if path.name != "LICENSE"
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert found == [], what


def test_tree_holds_no_binaries() -> None:
    assert [str(path.relative_to(TOP)) for path in source_files() if b"\0" in path.read_bytes()] == []


def test_every_program_names_its_licence() -> None:
    kinds = {".py", ".sh", ".h", ".c", ".service", ".target", ".rules", ".bash", ".zsh"}
    programs = [path for path in source_files() if path.suffix in kinds or first_line(path).startswith("#!")]
    hooks = TOP / "hooks.d"
    assert [
        str(path.relative_to(TOP))
        for path in programs
        if path.parent != hooks and "SPDX-License-Identifier: Apache-2.0" not in "".join(text_of(path).splitlines()[:3])
    ] == []


def test_tools_that_tests_need_are_in_the_package_lists() -> None:
    listed = {
        word
        for name in ("tests/packages.txt", "tests/vm/packages.txt")
        if (TOP / name).exists()
        for line in text_of(TOP / name).splitlines()
        for word in line.partition("#")[0].split()
    }
    wanted = {
        package: path.name
        for path in source_files()
        if path.suffix == ".py" and TOP / "tests" in path.parents
        for package in re.findall(r"""\bneed\(\s*[^,()]+,\s*package=["']([a-z0-9.+-]+)["']""", text_of(path))
    }
    assert {package: name for package, name in wanted.items() if package not in listed | {"some-package"}} == {}


# --- units


@pytest.fixture(scope="module")
def unit_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root directory with the system's own units, ours, and everything that ours start."""
    need("systemd-analyze", package="systemd")
    root = tmp_path_factory.mktemp("root")
    target = root / "usr/lib/systemd/system"
    system = next(path for path in (Path("/usr/lib/systemd/system"), Path("/lib/systemd/system")) if path.is_dir())
    shutil.copytree(system, target, symlinks=True, ignore=shutil.ignore_patterns("vmfork*"))
    for unit in UNIT_FILES:
        shutil.copy(UNITS / unit, target)
    for program in PROGRAMS:
        path = root / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/true\n")
        path.chmod(0o755)
    return root


@pytest.mark.parametrize(
    "unit", sorted(path.name for path in UNITS.iterdir() if path.suffix in (".service", ".target"))
)
def test_unit_is_understood_by_systemd(unit_root: Path, unit: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", f"--root={unit_root}", "--man=no", "--generators=no", unit],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    complaints = [line for line in done.stdout.splitlines() if "vmfork" in line or "ordering cycle" in line]
    assert complaints == []
    assert done.returncode == 0, done.stdout


def test_daemon_is_sandboxed() -> None:
    analyze = need("systemd-analyze", package="systemd")
    run(analyze, "security", "--offline=yes", "--threshold=25", "--no-pager", UNITS / "vmforkd.service")


def test_daemon_has_no_core_dumps_and_no_runtime_directory() -> None:
    lines = [line for line in text_of(UNITS / "vmforkd.service").splitlines() if not line.startswith("#")]
    assert "LimitCORE=1" in lines
    assert not any(line.startswith(("RuntimeDirectory", "WatchdogSec")) for line in lines)


def test_early_boot_is_bounded_and_nothing_requires_it() -> None:
    lines = text_of(UNITS / "vmfork-boot.service").splitlines()
    assert {"Type=oneshot", "TimeoutStartSec=60s", "TimeoutStopSec=5s", "WantedBy=sysinit.target"} <= set(lines)
    assert not any(line.startswith("RequiredBy=") for unit in UNIT_FILES for line in text_of(UNITS / unit).splitlines())
    after = [line for unit in UNIT_FILES for line in text_of(UNITS / unit).splitlines() if "vmfork-boot" in line]
    assert {line.partition("=")[0] for line in after} <= {"After", "SyslogIdentifier"}


# --- the journal's catalog


def catalog() -> dict[str, str]:
    """Message ID to the text below it."""
    parts = re.split(r"^-- ([0-9a-f]{32})$", text_of(UNITS / "vmfork.catalog"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_message_id_is_explained_and_none_is_invented() -> None:
    known = {value for name, value in vars(ids).items() if name.isupper() and isinstance(value, str)}
    assert catalog().keys() == known


def test_every_message_id_is_logged_somewhere() -> None:
    logged = {name for path in PACKAGE.rglob("*.py") for name in re.findall(r"\bids\.([A-Z_]+)\b", text_of(path))}
    assert {name for name in vars(ids) if name.isupper()} == logged


def test_every_explanation_has_a_subject_and_an_origin() -> None:
    for message, text in catalog().items():
        header, _, body = text.strip().partition("\n\n")
        assert re.search(r"^Subject: \S", header, re.MULTILINE), message
        assert "Defined-By: vmfork" in header, message
        assert body.strip(), message


def test_journalctl_takes_the_catalog(tmp_path: Path) -> None:
    journalctl = need("journalctl", package="systemd")
    target = tmp_path / "usr/lib/systemd/catalog"
    target.mkdir(parents=True)
    (tmp_path / "var/lib/systemd/catalog").mkdir(parents=True)
    shutil.copy(UNITS / "vmfork.catalog", target)
    run(journalctl, f"--root={tmp_path}", "--update-catalog")
    listed = subprocess.run(
        [journalctl, f"--root={tmp_path}", "--list-catalog"], stdout=subprocess.PIPE, text=True, check=True
    )
    assert all(message in listed.stdout for message in catalog())


# --- releases


def test_every_place_has_the_same_version() -> None:
    assert re.search(rf"^## {re.escape(__version__)}\b", text_of(TOP / "NEWS.md"), re.MULTILINE)
    assert first_line(TOP / "debian" / "changelog").startswith(f"vmfork ({__version__}) ")
