# SPDX-License-Identifier: Apache-2.0
"""The fake guest shows what a real one shows: other tests stand on it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from support.fakeguest import FIRST_GENERATION_ID, FakeGuest
from vmfork.truths.fwcfg import FwCfgGenerationId


def test_kernel_log_waits_for_a_reader_and_holds_records_as_the_kernel_writes_them(tmp_path: Path) -> None:
    with FakeGuest(tmp_path) as guest:
        first = guest.reseed_line()
        guest.kmsg_line("not the kernel", facility=1)
        reader = os.open(guest.paths.kmsg, os.O_RDWR | os.O_NONBLOCK)
        try:
            records = os.read(reader, 8192).decode().splitlines()
        finally:
            os.close(reader)
        assert re.fullmatch(rf"5,{first},\d+,-;random: crng reseeded due to virtual machine fork", records[0])
        assert re.fullmatch(rf"13,{first + 1},\d+,-;not the kernel", records[1])


def test_device_is_bound_to_the_driver_until_it_is_unbound(tmp_path: Path) -> None:
    with FakeGuest(tmp_path) as guest:
        bound = Path(guest.paths.platform_driver, "VMGENCTR:00")
        assert bound.is_dir()
        guest.unbind_driver()
        assert not bound.exists()
        assert sorted(os.listdir(guest.paths.platform_driver)) == ["bind", "uevent", "unbind"]


def test_fork_changes_the_generation_id_by_rename(tmp_path: Path) -> None:
    with FakeGuest(tmp_path) as guest:
        before = os.stat(guest.paths.fw_cfg_guid)
        assert FwCfgGenerationId(guest.paths).read() == FIRST_GENERATION_ID
        guest.fork(bytes(16))
        assert FwCfgGenerationId(guest.paths).read() == bytes(16)
        assert not os.path.samestat(before, os.stat(guest.paths.fw_cfg_guid))


def test_private_directories_are_private(tmp_path: Path) -> None:
    with FakeGuest(tmp_path) as guest:
        modes = [
            oct(os.stat(path).st_mode & 0o777)
            for path in (guest.paths.run_public, guest.paths.run_private, guest.paths.state_dir)
        ]
        assert modes == ["0o755", "0o700", "0o700"]
