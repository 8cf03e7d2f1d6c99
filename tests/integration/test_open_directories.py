# SPDX-License-Identifier: Apache-2.0
"""Directories of vmfork that others could write to, by mistake or by an image's making, under a real vmforkd."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.tools import need, need_root
from torture.liveguest import LiveGuest

NOBODY = 65534
DIRECTORIES = ("/run/vmfork", "/run/vmforkd", "/var/lib/vmfork")
MODES = {"/run/vmfork": 0o755, "/run/vmforkd": 0o700, "/var/lib/vmfork": 0o700}
# What CapabilityBoundingSet= of the unit leaves.
SANDBOX = "--bounding-set=-all,+sys_admin,+syslog,+sys_rawio"


@pytest.fixture
def live() -> Iterator[LiveGuest]:
    need_root()
    hook = 'echo "$VMFORK_GENERATION $VMFORK_IDENTITY" >>"$VMFORK_ROOT/ran"'
    with LiveGuest("guest", hook=hook) as made:
        made.top.chmod(0o755)
        yield made


def confine(live: LiveGuest) -> None:
    """Run the detector with the capabilities of the unit's sandbox only."""
    live.words = [need("setpriv", package="util-linux"), SANDBOX, sys.executable, "-m", "vmfork.daemon"]


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_that_others_may_write_to_is_closed_and_named(live: LiveGuest, name: str) -> None:
    confine(live)
    directory = live.guest.root / name[1:]
    directory.chmod(0o777)
    live.start()
    value = live.fork()
    live.until(lambda: live.is_written(2, value), "the fork settled")
    assert stat.S_IMODE(directory.stat().st_mode) == MODES[name]
    assert live.problems() == [f"{directory} had mode 0777; it was made {MODES[name]:04o}"]


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_of_somebody_else_is_taken_back(live: LiveGuest, name: str) -> None:
    directory = live.guest.root / name[1:]
    os.chown(directory, NOBODY, NOBODY)
    live.start()
    value = live.fork()
    live.until(lambda: live.is_written(2, value), "the fork settled")
    assert (directory.stat().st_uid, stat.S_IMODE(directory.stat().st_mode)) == (0, MODES[name])
    assert live.problems() == [f"{directory} belonged to uid {NOBODY}; it was taken back"]


@pytest.mark.parametrize("name", DIRECTORIES)
def test_nothing_is_published_beside_somebody_who_could_replace_it(live: LiveGuest, name: str) -> None:
    confine(live)
    directory = live.guest.root / name[1:]
    os.chown(directory, NOBODY, NOBODY)
    directory.chmod(0o777)
    assert live.launch().wait(20) == 1
    words = live.log_text()
    assert f"{directory} belongs to uid {NOBODY}" in words
    assert f"chown root {directory}" in words
    assert not Path(live.guest.paths.generation_page).exists()


def test_what_others_put_there_is_neither_believed_nor_written_to(live: LiveGuest) -> None:
    paths = live.guest.paths
    for name in DIRECTORIES:
        (live.guest.root / name[1:]).chmod(0o777)
    planted = [paths.template_mark, paths.template_mark_run, paths.history, paths.detector_intent, paths.react_hooks]
    # A memory that says that this is already generation 77 would be believed if it were ours.
    live.guest.put(
        paths.detector_memory, b'{"version":1,"boot_id":"0d3f1b3c-9a52-4c0e-8f57-5d1f6a1e0b01","generation":77}'
    )
    for path in planted:
        Path(path).touch()
        Path(path).chmod(0o666)
    for path in (*planted, paths.detector_memory):
        os.chown(path, NOBODY, NOBODY)
    live.start()
    value = live.fork()
    live.until(lambda: live.is_written(2, value), "the fork settled as the first one")
    assert live.ran() == ["2", "keep"]
    for path in planted:
        kept = Path(f"{path}.broken")
        assert (kept.stat().st_uid, kept.read_bytes()) == (NOBODY, b"")
        assert not Path(path).exists() or Path(path).stat().st_uid == 0
        assert f"{path} belongs to uid {NOBODY}; kept as {kept}" in live.problems()
