# SPDX-License-Identifier: Apache-2.0
"""The clock of the kernel's log, on the log of this machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from support.fakeguest import FakeGuest
from support.tools import need_root
from vmfork.edges.kmsg import parse
from vmfork.edges.logclock import read_log_clock
from vmfork.paths import Paths


@pytest.fixture
def log() -> int:
    """This machine's log, at its end; skipped where it takes no records."""
    need_root()
    try:
        descriptor = os.open("/dev/kmsg", os.O_RDWR | os.O_NONBLOCK)
    except OSError as error:
        pytest.skip(f"/dev/kmsg cannot be written here: {error.strerror}")
    if Path("/proc/sys/kernel/printk_devkmsg").read_text().strip() == "off":
        pytest.skip("printk.devkmsg=off")
    os.lseek(descriptor, 0, os.SEEK_END)
    return descriptor


def test_the_age_of_a_record_is_told_whatever_the_two_clocks_show(log: int) -> None:
    os.write(log, b"<29>vmfork test: a record\n")
    written = time.monotonic_ns()
    while (record := parse(os.read(log, 16384))).text != b"vmfork test: a record":
        continue  # somebody else's
    time.sleep(0.05)
    reading = read_log_clock(Paths(), "vmfork test: another record")
    os.close(log)
    assert reading is not None
    now_ns, log_us = reading
    age_us, true_age_us = log_us - record.microseconds, (now_ns - written) / 1000
    assert abs(age_us - true_age_us) < 5000


def test_below_a_root_the_log_is_not_written_to(tmp_path: Path) -> None:
    with FakeGuest(tmp_path) as guest:
        reader = os.open(guest.paths.kmsg, os.O_RDONLY | os.O_NONBLOCK)
        assert read_log_clock(guest.paths, "vmfork test") is not None
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        os.close(reader)


def test_without_a_log_there_is_no_answer() -> None:
    class Elsewhere(Paths):
        kmsg = "/nonexistent/kmsg"

    assert read_log_clock(Elsewhere(), "vmfork test") is None
