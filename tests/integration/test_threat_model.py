# SPDX-License-Identifier: Apache-2.0
"""The statements of docs/threat-model.md about whoever is not root of this guest, each against a real vmforkd."""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import multiprocessing
import os
import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from support.fakeguest import FIRST_GENERATION_ID, RESEED_LINE
from support.privilege import as_nobody
from support.runningdaemon import environment
from support.tools import need, need_root, unavailable
from torture.liveguest import LiveGuest
from vmfork.edges.kmsg import Kmsg
from vmfork.errors import VmforkError
from vmfork.page import read_page
from vmfork.paths import Paths
from vmfork.varlink.client import Client, RemoteError

NOBODY = 65534
TOP = Path(__file__).resolve().parents[2]
ADMIN_METHODS = ("Trigger", "Reload", "Prepare", "Resume", "BeginReaction", "ReportHook", "EndReaction")
PARAMETERS: dict[str, dict[str, object]] = {
    "ReportHook": {"token": "00" * 16, "name": "10-x", "path": "/x"},
    "EndReaction": {"token": "00" * 16, "state": "settled"},
}


def forked(live: LiveGuest) -> tuple[bytes, bytes]:
    """A guest that was forked once; the ID before and after."""
    live.start()
    value = live.fork()
    live.until(lambda: live.is_written(2, value), "the fork settled")
    return FIRST_GENERATION_ID, value


def forms(value: bytes) -> list[bytes]:
    """All the ways in which an ID is ever written."""
    texts = [value.hex(), str(uuid.UUID(bytes=value)), str(uuid.UUID(bytes_le=value)), uuid.UUID(bytes_le=value).hex]
    texts += [base64.b64encode(value).decode().rstrip("="), value.hex(" "), value.hex(":"), repr(value)]
    return [value, *(text.encode() for text in texts), *(text.upper().encode() for text in texts)]


def holds_id(data: bytes, ids: tuple[bytes, ...]) -> bool:
    return any(form in data for value in ids for form in forms(value))


def ask_public(path: str) -> str:
    """All that the public socket tells."""
    with Client.connect(path) as client:
        told = [client.call("io.vmfork.GetStatus"), client.call("io.vmfork.ListForks")]
    with Client.connect(path) as client:
        told.append(next(client.stream("io.vmfork.Subscribe", {"after": 1})))
    return json.dumps(told)


def refusals(path: str) -> dict[str, str]:
    """How each method for root is answered."""
    answers = {}
    for method in ADMIN_METHODS:
        with Client.connect(path) as client:
            try:
                client.call(f"io.vmfork.{method}", PARAMETERS.get(method, {}))  # type: ignore[arg-type]
                answers[method] = "granted"
            except RemoteError as error:
                answers[method] = error.name
    return answers


# --- who can read what


def test_an_unprivileged_user_is_told_no_generation_id(live: LiveGuest) -> None:
    ids = forked(live)
    told = as_nobody(lambda: ask_public(live.guest.paths.public_socket))
    assert '"generation": 2' in told
    assert not holds_id(told.encode(), ids)


def test_no_file_that_an_unprivileged_user_can_read_holds_a_generation_id(live: LiveGuest) -> None:
    ids = forked(live)
    root = live.guest.root

    def read_all() -> list[list[str]]:
        found = []
        for folder, _, names in os.walk(root):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(OSError):
                    if stat.S_ISREG(path.stat().st_mode):
                        found.append([str(path.relative_to(root)), path.read_bytes().hex()])
        return found

    readable = {name: bytes.fromhex(content) for name, content in as_nobody(read_all)}
    assert {"run/vmfork/generation", "run/vmfork/metrics.prom"} <= readable.keys()
    assert not any(name.startswith(("run/vmforkd", "var/lib/vmfork")) for name in readable)
    assert [name for name, content in readable.items() if holds_id(content, ids)] == []


def test_private_files_stay_private_in_directories_that_are_not(live: LiveGuest) -> None:
    for directory in (live.guest.paths.run_private, live.guest.paths.state_dir):
        Path(directory).chmod(0o755)
    forked(live)
    files = [
        Path(folder, name)
        for folder in (live.guest.paths.run_private, live.guest.paths.state_dir)
        for name in os.listdir(folder)
    ]
    assert len(files) >= 4
    assert [str(path) for path in files if stat.S_IMODE(path.stat().st_mode) & 0o077] == []


def test_no_log_environment_or_command_line_holds_a_generation_id() -> None:
    need_root()
    spy = (
        "for pid in $PPID $(ps -o ppid= $PPID); do "
        'cat /proc/$pid/environ /proc/$pid/cmdline >>"$VMFORK_ROOT/spied"; done; '
        'env >>"$VMFORK_ROOT/spied"; echo "$@" >>"$VMFORK_ROOT/spied"; echo 2 >>"$VMFORK_ROOT/ran"'
    )
    need("ps", package="procps")
    with LiveGuest("guest", hook=spy) as live:
        live.words.append("--verbose")
        ids = forked(live)
        spied = (live.guest.root / "spied").read_bytes()
        assert b"vmfork.daemon" in spied
        assert b"react" in spied
        assert not holds_id(spied, ids)
        words = live.log_text()
        assert "fork noticed" in words
        assert not holds_id(words.encode(), ids)


def test_no_unit_leaves_a_core_dump() -> None:
    services = sorted((TOP / "units").glob("*.service"))
    assert services
    for service in services:
        assert "LimitCORE=1" in service.read_text().splitlines(), service.name


# --- who can cause a reaction


def test_an_unprivileged_user_is_granted_nothing_on_the_public_socket(live: LiveGuest) -> None:
    live.start()
    answers = as_nobody(lambda: refusals(live.guest.paths.public_socket))
    assert answers == dict.fromkeys(ADMIN_METHODS, "io.vmfork.PermissionDenied")
    assert live.shows(1)


def test_an_unprivileged_user_cannot_reach_the_admin_socket(live: LiveGuest) -> None:
    live.start()
    # Both have to be wrong before somebody gets through: the directory and the socket.
    for mode in (0o700, 0o755):
        Path(live.guest.paths.run_private).chmod(mode)
        with pytest.raises(AssertionError, match=r"DaemonUnreachable.*Permission denied"):
            as_nobody(lambda: Client.connect(live.guest.paths.admin_socket).close())


def test_an_unprivileged_user_cannot_change_the_page(live: LiveGuest) -> None:
    live.start()
    page = live.guest.paths.generation_page

    def refused(attempt: Callable[[], object]) -> bool:
        try:
            attempt()
        except PermissionError:
            return True
        return False

    attempts: list[Callable[[], object]] = [
        lambda: os.open(page, os.O_RDWR),
        lambda: os.truncate(page, 0),
        lambda: os.chmod(page, 0o666),
        lambda: os.unlink(page),
        lambda: os.rename(page, f"{page}.old"),
        lambda: os.open(f"{page}.new", os.O_CREAT | os.O_WRONLY),
        lambda: os.unlink(live.guest.paths.public_socket),
    ]
    assert as_nobody(lambda: [refused(attempt) for attempt in attempts]) == [True] * len(attempts)


def test_root_of_a_container_is_granted_nothing_and_cannot_change_a_read_only_mount(live: LiveGuest) -> None:
    need("unshare", package="util-linux")
    ids = forked(live)
    mounted = live.top / "mounted"
    mounted.mkdir()
    # uid 0, as in a container without a user namespace of its own.
    program = f"""
import errno, json, os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r}); sys.path.insert(0, {str(TOP / "tests")!r})
from test_threat_model import ask_public, refusals
page, socket = {str(mounted / "generation")!r}, {str(mounted / "io.vmfork")!r}
def error_of(attempt):
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno]
errors = [error_of(lambda: os.open(page, os.O_RDWR)), error_of(lambda: os.unlink(page)),
          error_of(lambda: os.open({str(mounted / "vmfork.conf")!r}, os.O_CREAT | os.O_WRONLY))]
print(json.dumps({{"errors": errors, "told": ask_public(socket), "refusals": refusals(socket)}}))
"""
    mount = f"mount --bind {live.guest.paths.run_public} {mounted} && mount -o remount,ro,bind {mounted}"
    run = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", f'{mount}; exec "$0" -c "$1"', sys.executable, program],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert seen["errors"] == ["EROFS"] * 3
    assert seen["refusals"] == dict.fromkeys(ADMIN_METHODS, "io.vmfork.PermissionDenied")
    assert not holds_id(seen["told"].encode(), ids)
    assert live.shows(2)


def test_the_kernel_takes_no_line_of_its_own_facility_from_a_process() -> None:
    need_root()
    edge = Kmsg(Paths(""), after=None)
    try:
        log = os.open("/dev/kmsg", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        unavailable(f"/dev/kmsg: {error.strerror}")
    os.lseek(log, 0, os.SEEK_END)
    edge.drain()
    for prefix in ("", "<5>", "<0>", "<13>"):
        os.write(log, f"{prefix}{RESEED_LINE}".encode())
    records = []
    with contextlib.suppress(BlockingIOError):
        while True:
            records.append(os.read(log, 16384))
    os.close(log)
    # The kernel may hold back some of a process that says the same thing too often.
    assert any(RESEED_LINE.encode() in record for record in records)
    assert edge.drain().words == 0
    edge.close()


_UEVENTS = """
import os, select, socket, struct, subprocess, sys
from vmfork.edges.uevent import Uevent

edge = Uevent()
body = b"change@/devices/x\\0ACTION=change\\0DEVPATH=/devices/x\\0SUBSYSTEM=x\\0NEW_VMGENID=1\\0SEQNUM=9\\0"
ask_the_kernel = '''
import socket, struct
body = %r
with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 15) as sender:
    sender.bind((0, 0))
    sender.sendto(struct.pack("=IHHII", 16 + len(body), 16, 5, 0, 0) + body, (0, 0))
    print(struct.unpack_from("=i", sender.recv(4096), 16)[0])
''' % body

def heard():
    words = 0
    while select.select([edge.fileno()], [], [], 0.5)[0]:
        words += edge.drain().words
    return words

def asked(*command):
    run = subprocess.run([*command, sys.executable, "-c", ask_the_kernel], capture_output=True, check=True)
    return int(run.stdout), heard()

"""

# What is heard of two that a process sends by itself, one to all listeners and one to the edge; and of one that the
# kernel sends in another network namespace.
_FORGED = (
    _UEVENTS
    + """
with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 15) as sender:
    sender.bind((0, 0))
    sender.sendto(body, (0, 1))
    sender.sendto(body, (os.getpid(), 0))
print(heard(), *asked("unshare", "--net"))
"""
)
_ASKED = (
    _UEVENTS
    + """
print(*asked(), *asked("setpriv", "--bounding-set=-sys_admin"))
"""
)


def uevents(program: str) -> list[int]:
    """The numbers that the program prints, in a network namespace of its own."""
    need_root()
    need("unshare", package="util-linux")
    run = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [int(word) for word in run.stdout.split()]


def test_uevents_of_processes_and_of_other_network_namespaces_are_not_heard() -> None:
    assert uevents(_FORGED) == [0, 0, 0]


def test_the_kernel_sends_a_uevent_for_a_process_with_cap_sys_admin_only() -> None:
    need("setpriv", package="util-linux")
    # Its answer to who asks, and how many were heard.
    assert uevents(_ASKED) == [0, 1, -errno.EPERM, 0]


def test_a_crowd_of_an_unprivileged_user_neither_hides_a_fork_nor_locks_root_out(live: LiveGuest) -> None:
    live.start()
    path = live.guest.paths.public_socket

    inside, leave = multiprocessing.Semaphore(0), multiprocessing.Semaphore(0)

    def crowd() -> int:
        clients = []
        for _ in range(600):
            with contextlib.suppress(VmforkError):
                client = Client.connect(path)
                client.send("io.vmfork.Subscribe", {"track": False, "after": None}, more=True)
                clients.append(client)
        inside.release()
        leave.acquire()
        return len(clients)

    sizes: list[int] = []
    thread = threading.Thread(target=lambda: sizes.append(as_nobody(crowd)))
    thread.start()
    try:
        assert inside.acquire(timeout=60)
        value = live.fork()
        live.until(lambda: live.shows(2), "the page shows the fork")
        assert live.problems() == []
        with Client.connect(path) as client:
            assert client.call("io.vmfork.GetStatus")["status"]
        live.until(lambda: live.is_written(2, value), "the fork settled")
    finally:
        leave.release()
        thread.join(60)
    assert sizes > [100]


# --- what was planted


def _link(page: Path, bait: Path) -> None:
    page.symlink_to(bait)


def _hard_link(page: Path, bait: Path) -> None:
    os.link(bait, page)


def _fifo(page: Path, _bait: Path) -> None:
    os.mkfifo(page)


def _someone_elses(page: Path, bait: Path) -> None:
    page.write_bytes(bait.read_bytes())
    os.chown(page, NOBODY, NOBODY)


def _writable(page: Path, bait: Path) -> None:
    page.write_bytes(bait.read_bytes())
    page.chmod(0o666)


@pytest.mark.parametrize("plant", [_link, _hard_link, _fifo, _someone_elses, _writable])
def test_a_page_planted_before_the_first_start_is_replaced(
    live: LiveGuest, plant: Callable[[Path, Path], None]
) -> None:
    bait, page = live.top / "bait", Path(live.guest.paths.generation_page)
    # What an attacker would like readers to believe: generation 77.
    bait.write_bytes(b"VMFK" + bytes([1, 0, 0, 0]) + bytes(8) + (77).to_bytes(8, "little") + bytes(4072))
    before = bait.read_bytes()
    plant(page, bait)
    live.start()
    found = page.lstat()
    assert (stat.S_ISREG(found.st_mode), found.st_uid, stat.S_IMODE(found.st_mode)) == (True, 0, 0o444)
    assert (found.st_nlink, found.st_ino == bait.stat().st_ino) == (1, False)
    assert read_page(str(page)).generation == 1
    assert bait.read_bytes() == before


def test_links_in_the_place_of_files_are_never_written_through(live: LiveGuest) -> None:
    paths = live.guest.paths
    bait = live.top / "bait"
    bait.write_bytes(b"precious")
    bait.chmod(0o640)
    places = [paths.state, paths.detector_memory, paths.metrics, paths.generation_page]
    links = [f"{place}.new" for place in places] + [f"{paths.run_public}/.generation.new", paths.history]
    links += [paths.react_hooks, paths.metrics, paths.sysgenid]
    for link in links:
        os.symlink(bait, link)
    live.configure("[Publish]\nSysGenId=yes\n")
    live.start()
    live.fork()
    live.until(lambda: live.shows(2), "the page shows the fork")
    live.until(lambda: bool(live.problems()), "status names what it could not write")
    assert bait.read_bytes() == b"precious"
    assert stat.S_IMODE(bait.stat().st_mode) == 0o640


def test_a_device_in_the_place_of_sysgenid_is_left_alone(live: LiveGuest) -> None:
    bait, link = live.top / "bait", Path(live.guest.paths.dev_sysgenid)
    bait.write_bytes(b"precious")
    link.symlink_to(bait)
    live.configure("[Publish]\nSysGenId=yes\n")
    value = (live.start(), live.fork())[1]
    live.until(lambda: live.is_written(2, value), "the fork settled")
    live.stop()
    assert (os.readlink(link), bait.read_bytes()) == (str(bait), b"precious")


# --- what surrounds the programs


def turkish(place: Path) -> dict[str, str]:
    """A locale that is really there: no UTF-8, and its own idea of upper and lower case."""
    name = "tr_TR.ISO-8859-9"
    made = subprocess.run(
        [need("localedef", package="locales"), "-i", "tr_TR", "-f", "ISO-8859-9", place / name],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        unavailable(f"localedef: {made.stderr.strip()} (apt-get install locales)")
    return {"LOCPATH": str(place), "LC_ALL": name, "LANGUAGE": "tr"}


def test_a_hostile_environment_reaches_no_hook(tmp_path: Path) -> None:
    locale = turkish(tmp_path)
    spoken = subprocess.check_output([sys.executable, "-c", "import sys; print(sys.stdout.encoding)"], env=locale)
    assert spoken == b"iso8859-9\n"
    hook = 'env | sed "s/=.*//" | sort >"$VMFORK_ROOT/names"; echo 2 >>"$VMFORK_ROOT/ran"'
    with LiveGuest("guest", hook=hook) as live:
        live.environment.update(
            {
                **locale,
                "IFS": "x",
                "ENV": "/nonexistent",
                "BASH_ENV": "/nonexistent",
                "HOME": "/nonexistent",
                "TMPDIR": "/nonexistent",
                "PYTHONIOENCODING": "utf-16",
                "PYTHONHASHSEED": "0",
                "PYTHONWARNINGS": "error::DeprecationWarning",
                "VMFORK_IDENTITY": "rotate",
                "VMFORK_DRY_RUN": "1",
                "SECRET": "x",
            }
        )
        live.start()
        value = live.fork()
        live.until(lambda: live.is_written(2, value), "the fork settled")
        names = set((live.guest.root / "names").read_text().split()) - {"PWD", "OLDPWD", "SHLVL", "_"}
    documented = {"PATH", "LANG"}
    documented |= {f"VMFORK_{name}" for name in ("GENERATION", "KIND", "FORK_TOKEN", "EDGES", "IDENTITY", "DRY_RUN")}
    documented |= {f"VMFORK_{name}" for name in ("HOOK", "DEADLINE_SEC", "ROOT")}
    assert names == documented


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("Hook 70-services", "Restart=-Hroot@elsewhere"),
        ("Hook 70-services", "Reload=--root=/tmp x.service"),
        ("Hook 70-services", "Restart=a;b.service"),
        ("Hook 70-services", "Restart=$(id).service"),
    ],
)
def test_no_option_is_smuggled_to_a_tool_through_the_configuration(live: LiveGuest, section: str, line: str) -> None:
    live.configure(f"[{section}]\n{line}\n")
    live.start()
    assert any("vmfork.conf:2:" in problem for problem in live.problems())
