# SPDX-License-Identifier: Apache-2.0
"""The same as reference.c in the fewest lines of Python: what the interpreter alone costs. Usage: bare.py KMSG PAGE"""

from __future__ import annotations

import mmap
import os
import select
import sys
import time

kmsg = os.open(sys.argv[1], os.O_RDWR | os.O_NONBLOCK)
page = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT)
os.ftruncate(page, 4096)
view = memoryview(mmap.mmap(page, 4096))
u32, u64 = view.cast("I"), view.cast("Q")
view[:8], u64[2] = b"VMFK\1\0\0\0", 1
poll = select.poll()
poll.register(kmsg, select.POLLIN)
while poll.poll():
    record = os.read(kmsg, 16384)
    if b";random: crng reseeded due to virtual machine fork\n" in record and int(record.split(b",", 1)[0]) >> 3 == 0:
        u32[2] += 1
        u64[2] += 1
        u64[3], u64[4] = time.time_ns(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        view[40:56] = os.getrandom(16)
        u32[2] += 1
