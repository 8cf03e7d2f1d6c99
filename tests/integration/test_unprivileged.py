# SPDX-License-Identifier: Apache-2.0
"""What another user, and root of a container, can do with a real vmforkd of root's: follow forks, and nothing else."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from support.fakeguest import FIRST_GENERATION_ID, FakeGuest
from support.runningdaemon import PATIENCE_SEC, RunningDaemon, eventually, write_hook
from support.stranger import ContainerRoot, Stranger, public_directory, run, start
from support.tools import need_root

NEW_ID = bytes.fromhex("00112233445566778899aabbccddeefe")
PRIVILEGED = ("Trigger", "Reload", "Prepare", "Resume", "BeginReaction", "ReportHook", "EndReaction")


class Somebody(Protocol):
    """Who runs programs."""

    command: list[str]


@pytest.fixture
def guest() -> Iterator[FakeGuest]:
    need_root()
    with public_directory() as directory, FakeGuest(directory / "guest") as made:
        made.put(made.paths.config_etc + "/vmfork.conf", b"[Publish]\nSysGenId=yes\n[React]\nAckTimeoutSec=1h\n")
        yield made


@pytest.fixture(params=[Stranger, ContainerRoot], ids=["another user", "root of a container"])
def somebody(request: pytest.FixtureRequest, guest: FakeGuest, daemon: RunningDaemon) -> Somebody:
    made: Somebody = request.param(guest)
    return made


@pytest.fixture
def stranger(guest: FakeGuest, daemon: RunningDaemon) -> Stranger:
    return Stranger(guest)


def fork_and_settle(guest: FakeGuest, daemon: RunningDaemon) -> dict[str, Any]:
    guest.fork(NEW_ID)
    return daemon.settled(2)


def spellings(generation_id: bytes) -> set[str]:
    """The ways in which an ID might be written: memory order, as a UUID with its first fields swapped, raw."""
    swapped = generation_id[3::-1] + generation_id[5:3:-1] + generation_id[7:5:-1] + generation_id[8:]
    words = generation_id[7::-1] + generation_id[:7:-1]
    return {one.hex() for one in (generation_id, swapped, words, generation_id[::-1])}


def test_the_library_answers(guest: FakeGuest, daemon: RunningDaemon, somebody: Somebody) -> None:
    fork_and_settle(guest, daemon)
    program = "import json, vmfork; print(json.dumps([vmfork.generation(), vmfork.supported()]))"
    assert run(somebody.command, program) == [2, True]


def test_a_strict_guard_notices_a_fork(guest: FakeGuest, daemon: RunningDaemon, somebody: Somebody) -> None:
    program = """
import vmfork
guard = vmfork.Guard(strict=True)
print(guard.forked())
input()
print(guard.forked(), guard.forked())
"""
    with start(somebody.command, program) as process:
        assert line_of(process) == "False"
        fork_and_settle(guest, daemon)
        assert tell(process, "go") == "True False"


def line_of(process: Any) -> str:
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return str(line).strip()


def tell(process: Any, word: str) -> str:
    process.stdin.write(f"{word}\n")
    process.stdin.flush()
    return line_of(process)


def test_a_tracked_watcher_is_waited_for(guest: FakeGuest, daemon: RunningDaemon, somebody: Somebody) -> None:
    program = """
import vmfork
with vmfork.Watcher(track=True) as watcher:
    print("ready")
    event = next(watcher)
    print(event.generation, event.generation_id, event.previous_generation_id)
    input()
    watcher.ack(event)
    print("acknowledged")
    input()
"""
    with start(somebody.command, program) as process:
        assert line_of(process) == "ready"
        guest.fork(NEW_ID)
        assert line_of(process) == "2 None None"
        assert [one["overdue"] for one in eventually(lambda: daemon.status()["stragglers"])] == [False]
        assert daemon.status()["state"] == "reacting"
        tell(process, "go")
        assert daemon.settled(2)["state"] == "settled"
        process.communicate("end\n", timeout=PATIENCE_SEC)


def test_a_registered_function_is_called(guest: FakeGuest, daemon: RunningDaemon, somebody: Somebody) -> None:
    program = """
import vmfork
vmfork.register_after_fork(lambda: print("called", flush=True))
print("ready")
input()
"""
    with start(somebody.command, program) as process:
        assert line_of(process) == "ready"
        guest.fork(NEW_ID)
        assert line_of(process) == "called"
        process.communicate("end\n", timeout=PATIENCE_SEC)


def test_every_privileged_method_is_refused(daemon: RunningDaemon, somebody: Somebody) -> None:
    program = f"""
import json
from vmfork.library.root import paths
from vmfork.varlink.client import Client, RemoteError
answers = []
for method in {PRIVILEGED}:
    with Client.connect(paths().public_socket) as client:
        try:
            client.call("io.vmfork." + method, {{}})
        except RemoteError as error:
            answers.append(error.name)
print(json.dumps(answers))
"""
    assert run(somebody.command, program) == ["io.vmfork.PermissionDenied"] * len(PRIVILEGED)
    assert daemon.status()["generation"] == 1


def test_the_admin_socket_is_out_of_reach(daemon: RunningDaemon, somebody: Somebody) -> None:
    program = """
import json
from vmfork.errors import DaemonUnreachable
from vmfork.library.root import paths
from vmfork.varlink.client import Client
try:
    Client.connect(paths().admin_socket)
except DaemonUnreachable as error:
    print(json.dumps(type(error.__cause__).__name__))
"""
    assert run(somebody.command, program) in ("PermissionError", "FileNotFoundError")


def test_no_answer_notice_or_file_tells_a_generation_id(
    guest: FakeGuest, daemon: RunningDaemon, somebody: Somebody
) -> None:
    program = """
import json, os, stat
from vmfork.library.root import paths
from vmfork.varlink.client import Client, RemoteError
told = []
watching = Client.connect(paths().public_socket)
for reply in watching.stream("io.vmfork.Subscribe", {"track": True, "after": 0}, timeout=20):
    told.append(reply)
    if reply["notice"] == "hello":
        print("ready", flush=True)
    if reply["notice"] == "fork":
        watching.send("io.vmfork.Acknowledge", {"generation": reply["generation"], "snapshot": None}, oneway=True)
    if reply["notice"] == "settled":
        break
for method, parameters in (("GetStatus", {}), ("ListForks", {"limit": None}), ("ListForks", {"limit": 1})):
    with Client.connect(paths().public_socket) as client:
        told.append(client.call("io.vmfork." + method, parameters))
with Client.connect(paths().public_socket) as client:
    told += client.stream("io.vmfork.Subscribe", {"track": False, "after": 0}, timeout=20).__next__(),
text = json.dumps(told)
raw = b""
for directory, _, names in os.walk(paths().run_public):
    for name in names:
        path = os.path.join(directory, name)
        if stat.S_ISREG(os.stat(path).st_mode):
            raw += open(path, "rb").read()
print(json.dumps([text, raw.hex(), raw.decode("latin-1")]))
"""
    with start(somebody.command, program) as process:
        assert line_of(process) == "ready"
        fork_and_settle(guest, daemon)
        text, in_hex, raw = json.loads(line_of(process))
    told = text.lower().replace("-", "") + in_hex + raw.lower().replace("-", "")
    assert "generation_tag" in text
    assert len(raw) >= 2 * 4096
    for generation_id in (FIRST_GENERATION_ID, NEW_ID):
        assert [one for one in spellings(generation_id) if one in told] == []


def test_nothing_of_what_is_published_can_be_changed(
    guest: FakeGuest, daemon: RunningDaemon, somebody: Somebody
) -> None:
    names = sorted(os.listdir(guest.paths.run_public))
    assert names == ["generation", "io.vmfork", "metrics.prom", "sysgenid"]
    before = {name: Path(guest.paths.run_public, name).stat() for name in names}
    program = """
import json, os
from vmfork.library.root import paths
where = paths().run_public
succeeded = []
def attempt(what, function, *arguments):
    try:
        function(*arguments)
    except OSError:
        return
    succeeded.append(what)
for name in os.listdir(where):
    path = os.path.join(where, name)
    if name != "io.vmfork":
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
            attempt(f"open {name}", os.open, path, flags)
        attempt(f"truncate {name}", os.truncate, path, 0)
    attempt(f"chmod {name}", os.chmod, path, 0o777)
    attempt(f"chown {name}", os.chown, path, 65534, 65534)
    attempt(f"utime {name}", os.utime, path, (1, 1))
    attempt(f"link {name}", os.link, path, path + ".linked")
    attempt(f"rename {name}", os.rename, path, path + ".moved")
    attempt(f"unlink {name}", os.unlink, path)
attempt("create", os.open, os.path.join(where, "mine"), os.O_WRONLY | os.O_CREAT)
attempt("mkdir", os.mkdir, os.path.join(where, "mine"))
attempt("chmod", os.chmod, where, 0o777)
print(json.dumps(succeeded))
"""
    assert run(somebody.command, program) == []
    assert {name: Path(guest.paths.run_public, name).stat().st_ino for name in names} == {
        name: status.st_ino for name, status in before.items()
    }


def test_what_is_kept_private_cannot_be_read(guest: FakeGuest, daemon: RunningDaemon, stranger: Stranger) -> None:
    fork_and_settle(guest, daemon)
    program = """
import json, os
from vmfork.library.root import paths
seen = []
for path in (paths().run_private, paths().state_dir, paths().detector_memory, paths().state, paths().history):
    try:
        seen.append(os.listdir(path) if os.path.isdir(path) else open(path).read())
    except (PermissionError, FileNotFoundError):
        pass
print(json.dumps(seen))
"""
    assert run(stranger.command, program) == []


def test_vmforkctl_shows_the_state_and_refuses_to_steer(daemon: RunningDaemon, stranger: Stranger) -> None:
    program = """
import json, subprocess, sys
def vmforkctl(*arguments):
    run = subprocess.run([sys.executable, "-m", "vmfork", *arguments], capture_output=True, text=True)
    return [run.returncode, run.stdout, run.stderr]
steering = ("trigger", "rotate", "prepare", "resume", "reload")
print(json.dumps([vmforkctl("status", "--json=short"), *map(vmforkctl, steering)]))
"""
    (code, text, _), *steered = run(stranger.command, program)
    assert (code, json.loads(text)["generation_id"], json.loads(text)["generation"]) == (0, None, 1)
    for code, text, complaint in steered:
        assert code != 0
        assert text == ""
        assert "needs root" in complaint
        assert "Traceback" not in complaint
    assert daemon.status()["generation"] == 1


def test_an_acknowledgement_counts_only_for_who_subscribed(
    guest: FakeGuest, daemon: RunningDaemon, stranger: Stranger
) -> None:
    program = """
import json
from vmfork.library.root import paths
from vmfork.varlink.client import Client, RemoteError
with Client.connect(paths().public_socket) as client:
    try:
        client.call("io.vmfork.Acknowledge", {"generation": 2, "snapshot": None})
    except RemoteError as error:
        print(json.dumps(error.name))
"""
    assert run(stranger.command, program) == "io.vmfork.NotSubscribed"


def test_nobody_can_delay_settled_after_the_admins_deadline(
    guest: FakeGuest, daemon: RunningDaemon, stranger: Stranger
) -> None:
    guest.put(guest.paths.config_etc + "/vmfork.conf", b"[React]\nAckTimeoutSec=100ms\n")
    assert daemon.ctl("reload").returncode == 0
    write_hook(guest, "10-slow", 'until [ -e "$VMFORK_ROOT/go" ]; do sleep 0.05; done')
    guest.fork(NEW_ID)
    eventually(lambda: daemon.status()["state"] == "reacting")
    # The hook still runs when the time of all subscribers is up, and then somebody comes who never acknowledges.
    up = time.monotonic() + 0.5
    eventually(lambda: time.monotonic() > up)
    program = """
import time
from vmfork.library.root import paths
from vmfork.varlink.client import Client
client = Client.connect(paths().public_socket)
client.send("io.vmfork.Subscribe", {"track": True, "after": 0}, more=True)
next(client.replies(timeout=20))
print("ready")
input()
"""
    with start(stranger.command, program) as process:
        assert line_of(process) == "ready"
        (guest.root / "go").touch()
        assert daemon.settled(2)["state"] == "settled"
        process.communicate("end\n", timeout=PATIENCE_SEC)


def test_one_user_cannot_take_all_tracked_places(daemon: RunningDaemon, stranger: Stranger) -> None:
    program = """
import json
from vmfork.library.root import paths
from vmfork.varlink.client import Client, RemoteError
kept, refused = [], ""
for _ in range(300):
    client = Client.connect(paths().public_socket)
    client.send("io.vmfork.Subscribe", {"track": True, "after": None}, more=True)
    try:
        next(client.replies(timeout=20))
    except RemoteError as error:
        refused = error.name
        break
    kept.append(client)
print(json.dumps([len(kept), refused]))
"""
    assert run(stranger.command, program) == [256, "io.vmfork.Busy"]
