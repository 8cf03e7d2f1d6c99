# SPDX-License-Identifier: Apache-2.0
"""Everything that reads what somebody else wrote, each as a function of bytes that raises where a promise is broken.

The promise is the same everywhere: a value that can be used, or one of our typed errors, in bounded time and memory.
Used by tests with a fixed budget and by `torture.fuzz` with any.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from torture.cpage import c_page
from torture.kobjects import uevent
from torture.leftovers import react_hooks
from vmfork import config, history, settings, state
from vmfork.daemon.agent import Vmforkd
from vmfork.daemon.ledger import Ledger
from vmfork.daemon.service import Service
from vmfork.detector import Memory
from vmfork.edges.interrupts import parse_gpe, parse_interrupts
from vmfork.edges.kmsg import FORK_LINE, Kmsg, parse
from vmfork.errors import AbsentError, InputError, Unavailable, VmforkError
from vmfork.jsonfields import Fields, parse_object
from vmfork.model import ForkEvent
from vmfork.page import PAGE_SIZE, PageWriter, read_page
from vmfork.paths import Paths
from vmfork.reactor.discovery import discover, runnable
from vmfork.truths.acpi import parse_table
from vmfork.truths.aml import generation_id_address
from vmfork.truths.aml_code import Code
from vmfork.truths.devicetree import VMGENID, DeviceRegion, locate
from vmfork.truths.fwcfg import parse_address, parse_generation_id
from vmfork.truths.vmclockabi import counter_bytes
from vmfork.truths.vmclockabi import parse as parse_vmclock
from vmfork.varlink import framing
from vmfork.varlink.client import Client

PLACE = "the/file"
T = TypeVar("T")


def _refused(work: Callable[[], T]) -> T | None:
    """What it returns; None for a refusal that is typed and says where."""
    with contextlib.suppress(InputError, AbsentError, Unavailable):
        return work()
    return None


class _Scratch:
    """One directory for all runs in this process: making a new one each time would be most of the time."""

    def __init__(self) -> None:
        self._path: Path | None = None

    @property
    def path(self) -> Path:
        if self._path is None:
            self._path = Path(tempfile.mkdtemp(prefix="vmfork-fuzz."))
        return self._path

    def paths(self, name: str) -> Paths:
        return Paths(str(self.path / name))

    def remove(self) -> None:
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)
            self._path = None


scratch = _Scratch()


def _write(path: str, data: bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data)


# --- what the hypervisor and the firmware show


def fw_cfg(data: bytes) -> None:
    blob = _refused(lambda: parse_generation_id(data, PLACE))
    assert blob is None or blob == data[40:56]
    address = _refused(lambda: parse_address(data, PLACE))
    assert address is None or 0 < address < 2**64


def vmclock(data: bytes) -> None:
    page = _refused(lambda: parse_vmclock(data, PLACE))
    if page is not None and page.generation_counter is not None:
        assert counter_bytes(page, PLACE) == data[0x68:0x70]


def acpi(data: bytes) -> None:
    """The bytes are a definition block behind its header, then a whole table."""
    with contextlib.suppress(InputError):
        assert data.startswith(parse_table(data, PLACE))
    addresses(data)


def addresses(data: bytes) -> list[int]:
    """What the block says of each device of the hypervisors; where it asks the memory, there is no zero."""
    devices = ("\\_SB_.VGEN", "\\_SB_.GENC", "\\_SB_.PCI0.ISA_.VGID")
    code = Code(place=PLACE, data=bytes(36) + data)
    asked = (
        _refused(
            lambda device=device: generation_id_address(  # type: ignore[misc]
                [code], device, lambda _, size: b"\x10" + bytes(size - 1)
            )
        )
        for device in devices
    )
    found = [address for address in asked if address is not None]
    assert all(0 < address < 2**52 for address in found)
    return found


def devicetree(data: bytes) -> None:
    """Lines of `depth name hex digits`; a tree of at most four levels."""
    paths = scratch.paths("devicetree")
    base = Path(paths.device_tree_sysfs)
    shutil.rmtree(base, ignore_errors=True)
    node = base
    for depth in range(5):
        node.mkdir(parents=True)
        node = node / f"n{depth}"
    for line in data.splitlines()[:40]:
        depth_text, _, rest = line.decode("latin-1").partition(" ")
        name, _, value = rest.partition(" ")
        if name in ("compatible", "reg", "ranges", "#address-cells", "#size-cells", "status", "interrupts"):
            level = min(len(depth_text), 4)
            with contextlib.suppress(ValueError):
                (base.joinpath(*(f"n{number}" for number in range(level))) / name).write_bytes(bytes.fromhex(value))
    region = _refused(lambda: locate(paths, VMGENID))
    if isinstance(region, DeviceRegion):
        assert 16 <= region.size <= 2**64 - region.address


# --- what the kernel says


def kmsg(data: bytes) -> None:
    """As records, and as a stream in two pieces: the same number of announcements."""
    lines = data.split(b"\n")
    announced = 0
    for line in lines[:-1]:
        record = _refused(lambda line=line: parse(line))  # type: ignore[misc]
        announced += record is not None and record.announces_fork
        assert record is None or not record.announces_fork or line.rstrip(b"\r").endswith(FORK_LINE)
    paths = scratch.paths("kmsg")
    if not os.path.exists(paths.kmsg):
        os.makedirs(os.path.dirname(paths.kmsg), exist_ok=True)
        os.mkfifo(paths.kmsg)
    edge = Kmsg(paths, after=None)
    heard = 0
    for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
        with open(edge.fileno(), "wb", buffering=0, closefd=False) as log:
            log.write(piece[:32768])
        heard += edge.drain().words
    edge.close()
    assert heard == announced or len(data) > 32768


def interrupts(data: bytes) -> None:
    text = data.decode("ascii", "replace")
    assert all(count >= 0 for count in parse_interrupts(text).values())
    gpe = parse_gpe(text)
    assert gpe is None or gpe >= 0


# --- what the admin wrote


def configuration(data: bytes) -> None:
    paths = scratch.paths("configuration")
    _write(f"{paths.config_etc}/vmfork.conf", data)
    loaded = config.load(paths)
    assert all(isinstance(problem, str) and paths.config_etc in problem for problem in loaded.problems)
    for general in settings.GENERAL:
        loaded.get(general)  # type: ignore[misc]
    for name in ("25-ssh-host-keys", "70-services", "10-x.sh"):
        loaded.hook(name)
    for row in settings.HOOK_OWN:
        loaded.get(row, section=row.section)


def hook_names(data: bytes) -> None:
    """Each line is the name of a file in one of the two directories."""
    paths = scratch.paths("hooks")
    for directory in (paths.hooks_etc, paths.hooks_lib):
        shutil.rmtree(directory, ignore_errors=True)
        os.makedirs(directory)
    folders = itertools.cycle((os.fsencode(paths.hooks_etc), os.fsencode(paths.hooks_lib)))
    for name in data.splitlines()[:20]:
        name = name.replace(b"\0", b"").replace(b"/", b"")[:255]
        if name not in (b"", b".", b".."):
            descriptor = os.open(os.path.join(next(folders), name), os.O_CREAT | os.O_WRONLY, 0o755)
            os.write(descriptor, b"#!/bin/sh\n")
            os.close(descriptor)
    hooks = discover(paths, config.Config().hook)
    for hook in hooks:
        assert hook.name.isprintable()
        assert json.loads(json.dumps(hook.to_json()))["name"] == hook.name
        assert not hook.enabled or (hook.name.isascii() and hook.name[:2].isdigit() and hook.name[2] == "-")
    names = [hook.name for hook in runnable(hooks)]
    assert len(names) == len(set(names))


# --- what an earlier or newer version of ours, a torn disk or a planter left


def state_file(data: bytes) -> None:
    saved = _refused(lambda: state.Saved.from_json(parse_object(data, PLACE)))
    if saved is not None:
        assert state.Saved.from_json(parse_object(json.dumps(saved.to_json()), PLACE)) == saved


def memory_file(data: bytes) -> None:
    """Whatever stands in detector.json, state.json and the note of a fork, the books open, and take the next fork."""
    paths = scratch.paths("memory")
    shutil.rmtree(paths.root, ignore_errors=True)
    first, _, rest = data.partition(b"\n")
    second, _, third = rest.partition(b"\n")
    _write(paths.boot_id, b"this-boot\n")
    _write(paths.detector_memory, first)
    _write(paths.state, second)
    _write(paths.detector_intent, third)
    ledger = Ledger(paths)
    json.dumps([ledger.tag(bytes(16)), [*ledger.problems.values()]])
    generation = ledger.generation
    event = ledger.event
    if event is not None:
        json.dumps(event.to_json())
    token = b"x" * 16
    fresh = _fork(max(generation, ledger.remembered.generation) + 1, token, state="reacting")
    memory = Memory(truths=ledger.remembered.truths, credits=ledger.remembered.credits)
    ledger.publish(fresh, memory, kmsg_sequence=None)
    ledger.remember(memory, kmsg_sequence=None, interrupts=ledger.remembered.interrupts, event=fresh)
    ledger.complete(250, interrupts=ledger.remembered.interrupts)
    ledger.save_progress()
    assert ledger.generation == ledger.remembered.generation == fresh.generation > generation
    ledger.close()
    again = Ledger(paths)
    assert again.event is not None
    assert (again.event.token, again.generation) == (token, fresh.generation)
    again.close()


def _fork(generation: int, token: bytes, *, state: str) -> ForkEvent:
    return ForkEvent.from_json(
        Fields(
            {
                "generation": generation,
                "token": token.hex(),
                "kind": "live",
                "edges": [],
                "detected_at": "2027-01-15T08:00:00.000000Z",
                "boottime_ns": 1_800_000_000_000_000_000,
                "identity": {"policy": "keep", "reason": "-"},
                "state": state,
                "hooks": [],
            },
            PLACE,
        )
    )


def history_file(data: bytes) -> None:
    paths = scratch.paths("history")
    _write(paths.history, data)
    found = history.load(paths)
    assert found.unreadable_lines + len(found.events) <= len(data.splitlines())
    for event in found.events:
        again = ForkEvent.from_json(parse_object(json.dumps(event.to_json(with_ids=True)), PLACE))
        assert again == event


def page(data: bytes) -> None:
    """A page with these bytes at its beginning: the reader refuses or reads it, the writer makes it sound."""
    paths = scratch.paths("page")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(paths.generation_page)
    _write(paths.generation_page, data[:128] if len(data) % 2 else data[:128].ljust(PAGE_SIZE, b"\0"))
    if not (len(data) > 8 and data[8] % 2):
        # A reader gives a writer that may still be there a quarter of a second.
        _refused(lambda: read_page(paths.generation_page))
    os.chmod(paths.generation_page, 0o444)
    with PageWriter(paths.generation_page, initial_generation=5) as writer:
        assert read_page(paths.generation_page) == writer.current
        assert writer.current.generation > 0
        writer.publish(generation=writer.current.generation + 1, token=bytes(16), detected_at_ns=1, boottime_ns=1)
        writer.set_state(0)
        assert read_page(paths.generation_page) == writer.current


# --- what a peer sends


def varlink_frames(data: bytes) -> None:
    """The same messages, or the same refusal, in whatever pieces the bytes come."""

    def messages(pieces: Iterator[bytes]) -> tuple[list[object], bool]:
        decoder, found = framing.Decoder(limit=4096, place=PLACE), list[object]()
        try:
            for piece in pieces:
                decoder.feed(piece)
                while (message := decoder.take()) is not None:
                    found.append(message)
                    assert framing.decode(framing.encode(message)[:-1], PLACE) == message
        except InputError:
            return found, True
        return found, False

    step = 1 + len(data) % 7
    assert messages(iter([data])) == messages(data[at : at + step] for at in range(0, len(data), step))


_MOST_SENT = 32768


class _Peer:
    """The daemon's public socket, without the daemon's loop running."""

    def __init__(self) -> None:
        paths = scratch.paths("varlink")
        self.agent = Vmforkd(paths)
        self.service = Service(self.agent.loop, self.agent, public=True)
        self.path = paths.public_socket
        # So many that a list of all stays unanswered for more rounds than its client stays connected.
        writer = history.HistoryWriter(paths)
        for generation in range(2, 202):
            writer.append(_fork(generation, generation.to_bytes(16, "big"), state="settled"))

    def turn(self, times: int) -> None:
        for _ in range(times):
            self.agent.loop.turn(0)

    def settle(self) -> None:
        """With all clients gone nothing is left of them: no connection, no byte, no answer to nobody."""
        server, forks = self.service._public, self.service._forks
        assert server is not None
        for _ in range(_MOST_SENT):
            if not server.connections:
                break
            self.turn(1)
        assert (server.connections, server.buffered, forks.unanswered) == (0, 0, 0)


_peers: list[_Peer] = []


def varlink_server(data: bytes) -> None:
    """One client sends these bytes; another one is still answered."""
    if not _peers:
        _peers.append(_Peer())
    peer = _peers[0]
    with socket.socket(socket.AF_UNIX) as hostile, socket.socket(socket.AF_UNIX) as polite:
        for client in (hostile, polite):
            client.connect(peer.path)
            client.settimeout(5)
        hostile.send(data[:_MOST_SENT])
        hostile.shutdown(socket.SHUT_WR)
        polite.send(framing.encode_call("org.varlink.service.GetInfo"))
        peer.turn(4)
        assert b"vmfork" in polite.recv(65536)
    peer.settle()


def varlink_client(data: bytes) -> None:
    """A server answers a call with these bytes."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.send(data[:65536])
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(VmforkError), Client(ours, PLACE, timeout=5) as client:
            for reply in client.stream("io.vmfork.Subscribe", {}):
                told = Fields(reply, PLACE).object_or_none("event")
                if told is not None:
                    ForkEvent.from_json(told)


TARGETS: dict[str, Callable[[bytes], object]] = {
    target.__name__: target
    for target in (
        acpi,
        c_page,
        configuration,
        devicetree,
        fw_cfg,
        history_file,
        hook_names,
        interrupts,
        kmsg,
        memory_file,
        page,
        react_hooks,
        state_file,
        uevent,
        varlink_client,
        varlink_frames,
        varlink_server,
        vmclock,
    )
}
