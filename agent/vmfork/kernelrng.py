# SPDX-License-Identifier: Apache-2.0
"""The kernel's random number generator: mix bytes in, credit them, force it to take new keys.

Since Linux 5.18 the vmgenid driver reseeds the generator by itself at a fork; on kernels without that driver nobody
does, and three clones of one snapshot were measured to read the same bytes from getrandom(). Below a root prefix
nothing here touches the kernel: the fake guest shares it with its host.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from vmfork.errors import AbsentError
from vmfork.paths import Paths

# include/uapi/linux/random.h: _IOW('R', 0x03, int[2]) and _IO('R', 0x07). Same numbers on every architecture that
# Debian has with these ioctl direction bits (not on mips, powerpc and sparc, where no hypervisor has a vmgenid).
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207


def mix(paths: Paths, data: bytes) -> None:
    """Stir `data` into the pool without counting it as entropy; anybody may. OSError if the device is not there."""
    if paths.is_fake:
        return
    descriptor = os.open(paths.urandom, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def credit(paths: Paths, data: bytes) -> None:
    """Stir `data` in and count every bit of it as entropy: only for bytes of a hardware source.

    Raises AbsentError without CAP_SYS_ADMIN.
    """
    request = struct.pack("@ii", len(data) * 8, len(data)) + data
    _control(paths, RNDADDENTROPY, request)


def reseed(paths: Paths) -> None:
    """Make every later read come from a key that was derived just now.

    Before Linux 5.18 the call returned success without a new key while fewer than 128 bits had been credited since the
    last one, so credit first there. Raises AbsentError without CAP_SYS_ADMIN and while the generator is not ready yet.
    """
    _control(paths, RNDRESEEDCRNG, b"")


def _control(paths: Paths, request: int, argument: bytes) -> None:
    if paths.is_fake:
        return
    descriptor = os.open(paths.urandom, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, request, argument)
    except OSError as error:
        if error.errno == errno.ENODATA:
            raise AbsentError("the kernel's random number generator is not ready yet") from error
        if error.errno in (errno.EPERM, errno.EACCES):
            raise AbsentError(
                "the kernel does not let this process reseed its random number generator",
                hint="run as root with CAP_SYS_ADMIN",
            ) from error
        raise
    finally:
        os.close(descriptor)


def hardware_bytes(paths: Paths, size: int) -> bytes:
    """Up to `size` bytes of the hardware generator that are ready at once; empty where there is none."""
    # Asking first: most guests have none, and a fork that waits for its page need not pay for an exception.
    if paths.is_fake or not os.access(paths.hwrng, os.R_OK):
        return b""
    try:
        descriptor = os.open(paths.hwrng, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        return os.read(descriptor, size)
    except OSError:
        # ENODEV without a current generator, EAGAIN while virtio-rng still waits for the host.
        return b""
    finally:
        os.close(descriptor)
