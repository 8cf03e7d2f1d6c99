# SPDX-License-Identifier: Apache-2.0
"""Faults by strace: a signal or an error at the n-th call of one system call, on purpose and not by luck.

strace runs as a grandchild (-D), so the program keeps its parent, its PID and its exit status. Only the program itself
is traced, not what it starts. A SIGKILL is delivered when the call is entered and the call is then not made: what the
matrix kills before is every change, which is the same as after the change before it.
"""

from __future__ import annotations

import re
import signal
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

# Whatever changes something that outlives the process or that another process can see. pread64 is not among these by
# nature: the page is written by plain stores, and a pread stands before and after them as a barrier, so killing there
# leaves the page with its sequence number odd and nothing written, and odd with everything written.
CHANGES = (
    "bind",
    "chmod",
    "clone",
    "clone3",
    "execve",
    "fchmod",
    "fdatasync",
    "flock",
    "fsync",
    "ftruncate",
    "kill",
    "link",
    "listen",
    "memfd_create",
    "mkdir",
    "pidfd_send_signal",
    "pread64",
    "pwrite64",
    "rename",
    "sendmsg",
    "sendto",
    "symlink",
    "unlink",
    "vfork",
    "wait4",
    "write",
)
# strace's own word in its log for a program that did not survive.
KILLED = "+++ killed by SIGKILL +++"
# And for a call that it answered for the kernel.
INJECTED = "(INJECTED)"
_CALL = re.compile(r"([a-z_0-9]+)\(")


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """`fault` is strace's own word: `signal=KILL` or `error=ENOSPC`. `when` is a number or a range such as `3+`."""

    call: str
    when: str
    fault: str
    path: str | None = None

    def __str__(self) -> str:
        where = f" of {Path(self.path).name}" if self.path else ""
        return f"{self.fault} at {self.call}{where} no. {self.when}"


def strace(*, injections: Sequence[Injection] = (), log: Path | None = None, trace: Sequence[str] = ()) -> list[str]:
    """The words to put before a command. With `log` the calls of `trace` are written there."""
    calls = [*trace, *(one.call for one in injections)]
    command = ["strace", "-D", "-q", "-o", str(log) if log is not None else "/dev/null"]
    command += ["-e", "trace=" + ",".join(f"?{call}" for call in sorted(set(calls)))]
    for one in injections:
        command += ["-e", f"inject={one.call}:{one.fault}:when={one.when}"]
    # -P restricts what is traced, and so what is injected, to calls that name one of these files.
    for path in sorted({one.path for one in injections if one.path is not None}):
        command += ["-P", path]
    return command


def counted(log: str) -> Counter[str]:
    """How often each call stands in a log of strace."""
    found: Counter[str] = Counter()
    for line in log.splitlines():
        match = _CALL.match(line)
        if match is not None:
            found[match[1]] += 1
    return found


def strace_of(
    pid: int, calls: Sequence[str], fault: str, paths: Sequence[str], *, log: Path | None = None
) -> list[str]:
    """The command that does this to all `calls` of a process that runs already; with `paths` to those alone."""
    names = ",".join(f"?{call}" for call in calls)
    command = ["strace", "-o", str(log) if log is not None else "/dev/null", "-p", str(pid)]
    command += ["-e", f"trace={names}", "-e", f"inject={names}:{fault}"]
    for path in paths:
        command += ["-P", path]
    return command


class Attached:
    """strace on a running process for as long as the block lasts."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> None:
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        # strace says so when it has hold of the process; what it says about paths comes first.
        for line in self._process.stderr:
            if "attached" in line:
                return
        raise RuntimeError("strace could not be attached")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        # Asked to end, it lets go of the process, which goes on.
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)
        self._process.stderr.close()
