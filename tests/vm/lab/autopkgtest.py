# SPDX-License-Identifier: Apache-2.0
"""The tests of debian/tests, run by autopkgtest itself in a guest of the lab or below a directory.

autopkgtest speaks to a testbed through a program; for a guest that is `autopkgtest_testbed.py`, which asks this process
over a socket, because only one process can hold the guest's channel.
"""

from __future__ import annotations

import json
import os
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lab.guest import Guest
from lab.host import LabError
from support.artifacts import keep

TREE = Path(__file__).resolve().parents[3]
_TESTBED = Path(__file__).with_name("autopkgtest_testbed.py")
# The channel carries text; what autopkgtest sends and fetches are archives.
_BINARY = """
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
base64 -d >"$dir/in"
code=0
"$@" <"$dir/in" >"$dir/out" || code=$?
base64 "$dir/out"
exit "$code"
"""
_COMMAND_SECONDS = 900.0


class _Server(socketserver.UnixStreamServer):
    def __init__(self, path: Path, guest: Guest) -> None:
        super().__init__(os.fspath(path), _Request)
        self.guest = guest


class _Request(socketserver.StreamRequestHandler):
    """One command: a line with its argv and input, answered by a line with how it ended."""

    server: _Server

    def handle(self) -> None:
        request = json.loads(self.rfile.readline())
        command = ("sh", "-c", _BINARY, "sh", *request["argv"])
        try:
            done = self.server.guest.run(*command, stdin=request["stdin"], timeout=_COMMAND_SECONDS)
        except LabError as error:
            answer = {"exit_code": 255, "stdout": "", "stderr": f"{error}\n"}
        else:
            # 124 as of timeout(1).
            code = 124 if done.exit_code is None else done.exit_code
            answer = {"exit_code": code, "stdout": done.stdout, "stderr": done.stderr}
        self.wfile.write(json.dumps(answer).encode() + b"\n")


@contextmanager
def testbed(guest: Guest) -> Iterator[list[str]]:
    """The arguments that make autopkgtest use this guest; nobody else may speak to the guest meanwhile."""
    path = guest.directory / "autopkgtest"
    with _Server(path, guest) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
        thread.start()
        try:
            yield [os.fspath(_TESTBED), os.fspath(path)]
        finally:
            server.shutdown()
            thread.join()


def source(directory: Path) -> Path:
    """A copy of the source package, what git would not ignore; autopkgtest takes it for built."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=TREE,
        capture_output=True,
        check=True,
    )
    target = directory / "vmfork"
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = TREE / name
        if path.is_symlink() or path.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target / name, follow_symlinks=False)
    # Where this file is, nothing is built, and the testbed needs no dpkg-dev.
    (target / "debian/files").touch()
    return target


def verdicts(command: Sequence[str], output: Path, *, name: str, seconds: float) -> dict[str, str]:
    """Run autopkgtest, told to write to `output`; each test's verdict. Summary and log are kept among the artifacts."""
    done = subprocess.run(
        command,
        # What a testbed without a user of its own would inherit.
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
    )
    keep(f"autopkgtest-{name}.log", done.stdout)
    try:
        text = (output / "summary").read_text()
    except FileNotFoundError:
        raise LabError(f"autopkgtest ended with {done.returncode}:\n{done.stdout[-3000:]}") from None
    keep(f"autopkgtest-summary-{name}", text)
    lines = (line.split(maxsplit=1) for line in text.splitlines())
    return {words[0]: words[1] for words in lines}


def said(output: Path) -> str:
    """The last of what each test printed, for a person who must find out why it failed."""
    streams = sorted([*output.glob("*-stdout"), *output.glob("*-stderr")])
    return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')[-6000:]}" for path in streams)
