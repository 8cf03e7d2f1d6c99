# SPDX-License-Identifier: Apache-2.0
"""The clock that stamps the kernel's log, read by writing a record of our own and looking at its stamp.

It is the scheduler's clock, not CLOCK_MONOTONIC: nobody slews it, and the two were seen milliseconds apart on x86 and
600 ms on an emulated arm64. So how old a record is can only be told by that clock itself.
"""

from __future__ import annotations

import os
import time

from vmfork.edges.kmsg import parse
from vmfork.errors import InputError
from vmfork.paths import Paths

_DAEMON_NOTICE = 3 << 3 | 5
_RECORD_BYTES = 16384
# Other records may fall between the end of the log and ours.
_RECORDS = 64


def read_log_clock(paths: Paths, message: str) -> tuple[int, int] | None:
    """CLOCK_MONOTONIC in ns and the log's clock in us, of one moment; `message` is what the record says.

    None where the log takes no record of ours (no right to write, printk_devkmsg=off). Below a root prefix the log is
    a FIFO of the tester, stamped by CLOCK_MONOTONIC and never written to.
    """
    now = time.monotonic_ns()
    if paths.is_fake:
        return now, now // 1000
    try:
        descriptor = os.open(paths.kmsg, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        os.lseek(descriptor, 0, os.SEEK_END)
        before = time.monotonic_ns()
        os.write(descriptor, f"<{_DAEMON_NOTICE}>{message}\n".encode())
        moment = (before + time.monotonic_ns()) // 2
        for _ in range(_RECORDS):
            record = parse(os.read(descriptor, _RECORD_BYTES))
            if record.text == message.encode():
                return moment, record.microseconds
    except (OSError, InputError):
        return None
    finally:
        os.close(descriptor)
    return None


def record_age_us(paths: Paths, record_us: int | None, *, at_ns: int, message: str) -> int | None:
    """How old, in microseconds, a record with the stamp `record_us` was at `at_ns` of CLOCK_MONOTONIC.

    None where there is no record, where the log's clock cannot be read, or where the clocks contradict each other.
    """
    reading = None if record_us is None else read_log_clock(paths, message)
    if record_us is None or reading is None:
        return None
    now_ns, log_us = reading
    age = log_us - record_us - (now_ns - at_ns) // 1000
    return age if age >= 0 else None
