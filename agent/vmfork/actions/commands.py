# SPDX-License-Identifier: Apache-2.0
"""External programs and the service manager, as actions use them.

Programs are looked up in a fixed PATH, get a scrubbed environment, end by the hook's deadline, and their output is
kept up to a bound. Under a root prefix the service manager is never talked to: it is another machine's.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vmfork.errors import ActionError
from vmfork.paths import Paths

FIXED_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
MAX_OUTPUT = 256 * 1024
DEFAULT_TIMEOUT_SEC = 20.0
_GRACE_SEC = 0.5


def operand(word: str) -> str:
    """The word itself, for programs that know no `--`; ActionError where they would take it for an option."""
    if word.startswith("-"):
        raise ActionError(f"{word!r} would be taken for an option", hint="give it a name that begins with a letter")
    return word


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A program that ended by itself: exit code (negative: the signal), and at most MAX_OUTPUT bytes of each stream."""

    argv: tuple[str, ...]
    code: int
    stdout: bytes
    stderr: bytes

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def text(self) -> str:
        """Standard output as text."""
        return self.stdout.decode("utf-8", "replace")

    @property
    def complaint(self) -> str:
        """The last line that the program said, for an error message."""
        lines = (self.stderr or self.stdout).decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:300] if lines else f"exit code {self.code}"


class Commands:
    """Runs programs until a deadline.

    `deadline_sec` counts from now (None: no deadline). `early` forces --no-block on every request to the service
    manager, since waiting for it in the early boot is a dead-lock. `search` is where programs are looked up, and
    `systemd` overrides the check whether systemd runs.
    """

    __slots__ = ("_deadline", "_early", "_search", "systemd")

    def __init__(
        self,
        paths: Paths,
        *,
        deadline_sec: float | None = None,
        early: bool = False,
        search: Sequence[str] = FIXED_PATH,
        systemd: bool | None = None,
    ) -> None:
        self._deadline = None if deadline_sec is None else time.monotonic() + deadline_sec
        self._early = early
        self._search = tuple(search)
        self.systemd = (not paths.is_fake and os.path.isdir(paths.systemd_runs)) if systemd is None else systemd

    def remaining(self, wanted: float = DEFAULT_TIMEOUT_SEC) -> float:
        """Seconds that something may still take: `wanted`, or less if the deadline is nearer."""
        if self._deadline is None:
            return wanted
        return max(0.1, min(wanted, self._deadline - time.monotonic() - _GRACE_SEC))

    def find(self, tool: str) -> str | None:
        """The absolute path of a program (a name, or a path), None where it is not installed."""
        places = (tool,) if "/" in tool else tuple(os.path.join(place, tool) for place in self._search)
        for path in places:
            if os.path.isfile(path) and os.access(path, os.X_OK):
                return path
        return None

    def need(self, tool: str, *, package: str) -> str:
        """The absolute path of a program; ActionError with the Debian package to install where it is missing."""
        found = self.find(tool)
        if found is None:
            raise ActionError(f"{tool} is not installed", hint=f"apt-get install {package}")
        return found

    def run(
        self,
        *argv: str,
        timeout: float = DEFAULT_TIMEOUT_SEC,
        stdin: bytes = b"",
        environment: Mapping[str, str] | None = None,
    ) -> Finished:
        """Run a program to its end. ActionError if it is missing, cannot be started, or does not end in time."""
        program = self.find(argv[0])
        if program is None:
            raise ActionError(f"{argv[0]} is not installed")
        scrubbed = {"PATH": ":".join(self._search), "LANG": "C.UTF-8", **(environment or {})}
        end = time.monotonic() + self.remaining(timeout)
        try:
            child = subprocess.Popen(
                (program, *argv[1:]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=scrubbed,
                cwd="/",
            )
        except OSError as error:
            raise ActionError(f"cannot run {program}: {error.strerror}") from error
        with child:
            try:
                if not _converse(child, stdin, end, kept := _Output()):
                    raise ActionError(f"{program} did not end in time")
            finally:
                if child.poll() is None:
                    child.kill()
        return Finished(
            argv=(program, *argv[1:]), code=child.returncode, stdout=bytes(kept.out), stderr=bytes(kept.err)
        )

    def check(
        self,
        *argv: str,
        timeout: float = DEFAULT_TIMEOUT_SEC,
        stdin: bytes = b"",
        environment: Mapping[str, str] | None = None,
    ) -> Finished:
        """Like `run`, and ActionError with the program's last words unless it exits 0."""
        finished = self.run(*argv, timeout=timeout, stdin=stdin, environment=environment)
        if not finished.ok:
            raise ActionError(f"{os.path.basename(argv[0])} failed: {finished.complaint}")
        return finished

    def systemctl(self, verb: str, *units: str, no_block: bool = False, timeout: float = DEFAULT_TIMEOUT_SEC) -> None:
        """Ask the service manager; ActionError where it refuses. Without systemd, or under a root: ActionError."""
        if not self.systemd:
            raise ActionError(f"systemd does not run here: cannot {verb} {' '.join(units)}")
        options = ("--no-block",) if no_block or self._early else ()
        self.check("systemctl", *options, verb, "--", *units, timeout=timeout)

    def is_active(self, unit: str) -> bool:
        """Whether a unit runs now; False without systemd. Only asks, so it is allowed in the early boot."""
        return self.systemd and self.run("systemctl", "is-active", "--quiet", "--", unit, timeout=5).ok


@dataclass(slots=True)
class _Output:
    """What a child has said so far."""

    out: bytearray = field(default_factory=bytearray)
    err: bytearray = field(default_factory=bytearray)


def _converse(child: subprocess.Popen[bytes], stdin: bytes, end: float, output: _Output) -> bool:
    """Feed and read a child until it has ended; False if it has not by `end`.

    The child's own end counts, not end of file: a daemon that it left behind may hold the pipes open for ever.
    """
    if child.stdin is None or child.stdout is None or child.stderr is None:
        raise ActionError("the program was started without pipes")
    kept = {child.stdout.fileno(): output.out, child.stderr.fileno(): output.err}
    feed, rest = child.stdin.fileno(), memoryview(stdin)
    pidfd = os.pidfd_open(child.pid)
    with selectors.DefaultSelector() as selector:
        selector.register(pidfd, selectors.EVENT_READ)
        for fd in (*kept, feed):
            os.set_blocking(fd, False)
            selector.register(fd, selectors.EVENT_WRITE if fd == feed else selectors.EVENT_READ)
        ended = False
        while not ended and (left := end - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.fd == pidfd:
                    ended = True
                elif key.fd == feed:
                    rest = _feed(feed, rest)
                    if not rest:
                        selector.unregister(feed)
                        child.stdin.close()
                elif not _drain(key.fd, kept[key.fd]):
                    selector.unregister(key.fd)
    os.close(pidfd)
    for fd, buffer in kept.items():
        while len(buffer) < MAX_OUTPUT and _drain(fd, buffer) > 0:
            pass
    return ended


def _feed(fd: int, rest: memoryview) -> memoryview:
    """Write some; what is left. A child that closed its end gets nothing more."""
    try:
        return rest[os.write(fd, rest) :]
    except BlockingIOError:
        return rest
    except BrokenPipeError:
        return rest[:0]


def _drain(fd: int, buffer: bytearray) -> int:
    """Read once, keep up to MAX_OUTPUT; bytes read, 0 at the end of file, -1 when there is nothing now."""
    try:
        data = os.read(fd, 65536)
    except BlockingIOError:
        return -1
    buffer += data[: max(0, MAX_OUTPUT - len(buffer))]
    return len(data)
