# SPDX-License-Identifier: Apache-2.0
"""New keys for the kernel's random number generator, and a new random-seed file for the next boot.

Bytes of a hardware generator are credited; the fork token and the clocks are mixed in uncredited; then the kernel is
made to take a new key at once. The proof is the kernel's own counter of keys where it publishes one (Linux 6.11 and
later), else its answer to a call that never answers success without a new key; which of the two it was is said.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time

from vmfork import kernelrng
from vmfork.actions import files
from vmfork.actions.contract import Action, ActionContext
from vmfork.actions.vdso import kernel_version, random_generation
from vmfork.errors import AbsentError, ActionError
from vmfork.paths import Paths

_HARDWARE_BYTES = 64
_HARDWARE_WAIT_SEC = 0.3
# systemd's default (src/shared/random-util.h, RANDOM_POOL_SIZE_MIN), and what it accepts at most is far above ours.
_SEED_SIZE = 512
_SEED_SIZE_MAX = 64 * 1024
_CREDITABLE = "user.random-seed-creditable"
# From 5.18 RNDRESEEDCRNG either takes a new key or fails; before, it did nothing below this many bits of entropy.
_HONEST_SINCE = (5, 18)
_BITS_NEEDED = 128


def after_fork(context: ActionContext) -> None:
    if context.paths.is_fake:
        context.say("left the kernel's generator alone: it belongs to the machine around this root")
    else:
        _reseed(context)
    _renew_seed_file(context)


def _reseed(context: ActionContext) -> None:
    if context.would("mix the fork token, the clocks and hardware entropy into the kernel's generator and reseed it"):
        return
    try:
        hardware = _hardware(context.paths)
        if hardware:
            kernelrng.credit(context.paths, hardware)
        kernelrng.mix(context.paths, context.token + _clocks())
        _check_entropy(context.paths)
        before = random_generation()
        kernelrng.reseed(context.paths)
        after = random_generation()
    except AbsentError as error:
        raise ActionError(f"the kernel's generator was not reseeded: {error}", hint=error.hint) from error
    source = f"{8 * len(hardware)} credited bits of {context.paths.hwrng}" if hardware else "no hardware generator here"
    context.say(f"reseeded the kernel's generator ({source}; fork token and clocks mixed in)")
    context.say(f"verified: {proof(before, after)}")


def proof(before: int | None, after: int | None) -> str:
    """What shows that there is a new key; ActionError where the kernel's counter says that there is none."""
    if before is None or after is None:
        return "the kernel accepted RNDRESEEDCRNG, which takes a new key or fails; it publishes no counter of keys"
    if after == before:
        raise ActionError("the kernel accepted RNDRESEEDCRNG, but its counter of keys did not move")
    return f"the kernel's counter of keys went from {before} to {after}"


def _hardware(paths: Paths) -> bytes:
    """What the hardware generator has within a moment; a paravirtual one may first have to ask its host."""
    found = b""
    end = time.monotonic() + _HARDWARE_WAIT_SEC
    while len(found) < _HARDWARE_BYTES:
        more = kernelrng.hardware_bytes(paths, _HARDWARE_BYTES - len(found))
        found += more
        if not more:
            if time.monotonic() >= end or not _has_hardware(paths):
                break
            time.sleep(0.01)
    return found


def _has_hardware(paths: Paths) -> bool:
    """Whether a driver stands behind /dev/hwrng, so that waiting for it makes sense."""
    try:
        with open(paths.hwrng_current, encoding="ascii", errors="replace") as file:
            return file.read(256).strip() not in ("", "none")
    except OSError:
        return False


def _clocks() -> bytes:
    return struct.pack(
        "=QQQ",
        time.time_ns(),
        time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW),
    )


def _check_entropy(paths: Paths) -> None:
    """ActionError on an old kernel that would answer success and keep its key."""
    if kernel_version() >= _HONEST_SINCE:
        return
    with contextlib.suppress(OSError, ValueError), open(paths.entropy_available, encoding="ascii") as file:
        if int(file.read(32)) >= _BITS_NEEDED:
            return
    raise ActionError(
        f"kernels before 5.18 keep their key while they have less than {_BITS_NEEDED} bits of entropy",
        hint="give this machine a virtio-rng device",
    )


def _renew_seed_file(context: ActionContext) -> None:
    paths = context.paths
    path = files.resolve(paths, paths.random_seed)
    if not os.path.exists(path) and not os.path.exists(paths.random_seed_service):
        context.say("there is no saved random seed to renew")
        return
    if not os.path.isdir(os.path.dirname(path)):
        raise ActionError(f"{os.path.dirname(path)} is missing: the random seed cannot be saved")
    if context.would(f"write a new {path}"):
        return
    with files.reported(path):
        size, creditable = _present_seed(path)
        seed = os.getrandom(size) if size <= 256 else b"".join(os.getrandom(256) for _ in range(-(-size // 256)))[:size]
        files.replace_file(path, seed, mode=0o600)
        os.chmod(path, 0o600)
        if creditable:
            with contextlib.suppress(OSError):
                os.setxattr(path, _CREDITABLE, b"1")
        with open(path, "rb") as file:
            if file.read(size + 1) != seed:
                raise ActionError(f"{path}: holds something else than was written")
    context.say(f"wrote a new {path} ({size} bytes)")


def _present_seed(path: str) -> tuple[int, bool]:
    """Size to write, and whether systemd had marked the old seed as fit for being credited."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        return _SEED_SIZE, False
    try:
        creditable = os.getxattr(path, _CREDITABLE) == b"1"
    except OSError:
        creditable = False
    return (size if 32 <= size <= _SEED_SIZE_MAX else _SEED_SIZE), creditable


ACTION = Action(
    name="rng",
    hook="10-rng",
    summary="Give the kernel's random number generator new keys and the next boot a new random seed.",
    after_fork=after_fork,
)
