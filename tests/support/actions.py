# SPDX-License-Identifier: Apache-2.0
"""What tests of actions share: a context over a fake root, programs that record their calls, kills at every step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmfork.actions import ActionContext, Commands
from vmfork.actions.commands import FIXED_PATH
from vmfork.model import IdentityPolicy
from vmfork.paths import Paths

TOKEN = bytes(range(16))
AGENT = str(Path(__file__).parents[2] / "agent")

# Everything that changes a file or starts a program announces itself to Python's audit hooks before it happens.
_STEPS = frozenset({"open", "os.rename", "os.remove", "os.symlink", "os.chmod", "os.chown", "subprocess.Popen"})


@dataclass(frozen=True)
class Run:
    """One context and the lines that the action said."""

    context: ActionContext
    lines: list[str] = field(default_factory=list)

    @property
    def said(self) -> str:
        return "\n".join(self.lines)


def prepared(
    root: Path | str,
    *,
    settings: Mapping[str, str] | None = None,
    dry_run: bool = False,
    identity: IdentityPolicy = IdentityPolicy.ROTATE,
    early: bool = False,
    systemd: bool | None = None,
    programs: Path | None = None,
    deadline_sec: float = 60,
) -> Run:
    """A context below a root; `programs` is a directory of stubs that are found before the system's programs."""
    lines: list[str] = []
    paths = Paths(str(root))
    search = FIXED_PATH if programs is None else (str(programs), *FIXED_PATH)
    context = ActionContext(
        paths=paths,
        run=Commands(paths, deadline_sec=deadline_sec, early=early, search=search, systemd=systemd),
        settings=settings or {},
        identity=identity,
        dry_run=dry_run,
        early=early,
        token=TOKEN,
        say=lines.append,
    )
    return Run(context=context, lines=lines)


def write(path: Path, content: str, *, mode: int = 0o644) -> Path:
    """A file with its directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(mode)
    return path


def recorder(directory: Path, name: str, *, script: str = "exit 0") -> Path:
    """A program that appends its command line to `calls` beside it, then runs a piece of shell."""
    write(directory / name, f'#!/bin/sh\necho "{name} $*" >> "{directory}/calls"\n{script}\n', mode=0o755)
    return directory / "calls"


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a directory with its content: to show that nothing has changed."""
    return {
        str(path.relative_to(root)): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def killed_at_step(step: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that is killed with SIGKILL just before its n-th step; False when it ended before that."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            if event in _STEPS:
                seen += 1
                if seen == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def in_namespaces(flags: Sequence[str], shell: str, *, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a shell script in new namespaces (flags of unshare(1)); `action NAME ...` runs one of our actions."""
    action = (
        f"{sys.executable} -c 'import sys; from vmfork.actions import main; sys.exit(main(sys.argv[1], sys.argv[2:]))'"
    )
    script = f'set -e\naction() {{ {action} "$@"; }}\n{shell}\n'
    # Under nohup(1) the signal is ignored, and a shell that finds it ignored cannot trap it, nor does sshd act on it.
    hears_hangups = ["env", "--default-signal=HUP"]
    return subprocess.run(
        ["unshare", *flags, "--kill-child", "--fork", *hears_hangups, "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": AGENT, "PYTHON": sys.executable},
        check=False,
    )
