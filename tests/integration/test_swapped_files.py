# SPDX-License-Identifier: Apache-2.0
"""Files that turn into links, FIFOs and directories and back, as fast as a process can do it, while a guest is forked.

Two processes swap. A user swaps whatever he likes in a directory of his own that links of root's lead to. Root's own
process swaps what lies in root's directories; it puts no program or configuration of the user's there, for root may
choose what runs.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from torture.liveguest import LiveGuest
from vmfork import history, state
from vmfork.errors import InputError
from vmfork.page import GENERATION_OFFSET, PAGE_SIZE, STATE_OFFSET, STATE_REACTING

NOBODY = 65534
FORKS = 25

# Each round puts every form into every place, by rename; half of them are the file. It ends with its input.
_SWAPPER = """
import contextlib, os, select, shutil, sys
uid, bait, *places = sys.argv[1:]
os.setgroups([]); os.setresgid(int(uid), int(uid), int(uid)); os.setresuid(int(uid), int(uid), int(uid))
kept = {place: open(place, "rb").read() for place in places if os.path.isfile(place)}
modes = {place: os.stat(place).st_mode & 0o777 for place in kept}
def make(form, new, place):
    if form == "file":
        with open(new, "wb") as file:
            file.write(kept.get(place, b""))
        os.chmod(new, modes.get(place, 0o600))
    elif form == "fifo":
        os.mkfifo(new)
    elif form == "directory":
        os.mkdir(new)
    else:
        os.symlink(bait if form == "link" else "/nonexistent", new)
rounds = 0
while not select.select([0], [], [], 0)[0]:
    for form in ("link", "file", "fifo", "file", "dangling", "file", "directory", "file"):
        for place in places:
            new = place + ".swap"
            with contextlib.suppress(OSError):
                os.rmdir(place)
            with contextlib.suppress(OSError):
                make(form, new, place)
                os.rename(new, place)
            with contextlib.suppress(OSError):
                os.rmdir(new) if form == "directory" else os.unlink(new)
    rounds += 1
for place in places:
    with contextlib.suppress(OSError):
        os.rmdir(place)
    make("file", place + ".swap", place)
    os.rename(place + ".swap", place)
print(rounds)
"""


@contextlib.contextmanager
def swapping(uid: int, bait: Path, *places: str) -> Iterator[None]:
    """Somebody swaps until the end of the block; he must have come to it several times for each fork."""
    swapper = subprocess.Popen(
        [sys.executable, "-c", _SWAPPER, str(uid), str(bait), *places],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield
    finally:
        said, complaints = swapper.communicate("end\n", timeout=60)
    assert swapper.returncode == 0, complaints
    assert int(said) > FORKS, "the swapper hardly ran"


def plant(live: LiveGuest) -> tuple[Path, list[str]]:
    """A user's directory with a hook and a configuration that root's links lead to, and a witness of their use."""
    theirs, witness = live.guest.root / "home/user", live.top / "witness"
    theirs.mkdir(parents=True)
    os.chown(theirs, NOBODY, NOBODY)
    hook, configuration = theirs / "hook", theirs / "vmfork.conf"
    hook.write_text(f"#!/bin/sh\ntouch {witness}\n")
    configuration.write_text(f"[Hook 30-hostname]\nCommand=/bin/touch {witness}\n[React]\nIdentity=rotate\n")
    for path in (hook, configuration):
        os.chown(path, NOBODY, NOBODY)
        path.chmod(0o755)
    Path(live.guest.paths.hooks_etc, "20-theirs").symlink_to("/home/user/hook")
    drop_ins = Path(live.guest.paths.config_etc, "vmfork.conf.d")
    drop_ins.mkdir()
    (drop_ins / "99-theirs.conf").symlink_to("/home/user/vmfork.conf")
    return witness, [str(hook), str(configuration)]


def test_files_that_are_swapped_while_forks_run_harm_nobody(live: LiveGuest) -> None:
    paths = live.guest.paths
    bait = live.top / "bait"
    bait.write_bytes(b"precious" * 512)
    bait.chmod(0o640)
    before = bait.stat()
    live.configure("[Publish]\nSysGenId=yes\n[React]\nTimeoutSec=5\n")
    witness, theirs = plant(live)
    live.start()
    ours = [paths.state, paths.history, paths.detector_memory, paths.detector_intent, paths.react_hooks]
    ours += [paths.generation_page, paths.metrics, paths.sysgenid]
    ours += [f"{paths.config_etc}/vmfork.conf", f"{paths.hooks_etc}/10-hook"]
    # What every program has that mapped the page before.
    with open(paths.generation_page, "rb") as file, mmap.mmap(file.fileno(), PAGE_SIZE, prot=mmap.PROT_READ) as page:

        def shown() -> int:
            return int(struct.unpack_from("<Q", page, GENERATION_OFFSET)[0])

        def is_over() -> bool:
            return int(struct.unpack_from("<I", page, STATE_OFFSET)[0]) != STATE_REACTING

        with swapping(NOBODY, bait, *theirs), swapping(0, bait, *ours):
            for generation in range(2, FORKS + 2):
                live.fork()
                live.until(lambda wanted=generation: shown() == wanted, f"the page shows {generation}")  # type: ignore[misc]
                live.reload()
                live.until(is_over, "its hooks ended")
        value = live.fork()
        live.until(lambda: shown() == FORKS + 2, "the page shows the last fork")
    assert bait.read_bytes() == b"precious" * 512
    assert (bait.stat().st_mode, bait.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert not witness.exists()
    live.until(lambda: is_saved(live, value), "the last fork is written")
    assert {one.identity.policy.value for one in history.load(paths).events} == {"keep"}
    live.stop()


def is_saved(live: LiveGuest, value: bytes) -> bool:
    try:
        saved = state.load_saved(live.guest.paths)
    except InputError:
        return False
    return saved is not None and (saved.generation, saved.generation_id) == (FORKS + 2, value)
