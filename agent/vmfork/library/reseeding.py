# SPDX-License-Identifier: Apache-2.0
"""New seeds for the random number generators of this process after a fork of the virtual machine.

Only what Python code can reach, and only what is already loaded. Out of reach are, among others: the hash seed of str
and bytes, ASLR and stack canaries, libuuid's clock sequence, rand() and other state in C, generators of one's own.
Every seed comes from the kernel's generator and always has the fork's token mixed in, which differs in every clone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from random import Random

from vmfork.errors import VmforkError
from vmfork.library.callbacks import register_after_fork
from vmfork.library.root import paths
from vmfork.page import read_page

log = logging.getLogger(__name__)

_is_registered = False


def reseed_on_fork() -> None:
    """Reseed this process after each fork: the functions of `random`, numpy's legacy functions, the names of
    `tempfile`, and OpenSSL's generator as `ssl` uses it; numpy and ssl where they are loaded at that time.

    It runs as a function of `register_after_fork`, in the place of this call, so what is drawn between the fork and
    its run is shared with the clones. A second call changes nothing. Generator objects of one's own: see `reseed`.
    """
    global _is_registered
    if not _is_registered:
        _is_registered = True
        register_after_fork(_reseed_process)


def reseed(generator: object) -> None:
    """Give a random.Random, numpy Generator, BitGenerator or RandomState a fresh state, by its own seeding.

    For a seeded, reproducible sequence this is the end of it. random.SystemRandom has no state and stays as it is.
    Raises TypeError for anything else.
    """
    if isinstance(generator, Random):
        generator.seed(int.from_bytes(_material(), "little"))
        return
    # numpy is not imported for this: who has such an object has it loaded.
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        if isinstance(generator, numpy_random.RandomState):
            generator.seed(_words())
            return
        bits = getattr(generator, "bit_generator", generator)
        if isinstance(bits, numpy_random.BitGenerator):
            with bits.lock:
                bits.state = type(bits)(_words()).state
            return
    raise TypeError(f"{type(generator).__name__} is no generator that vmfork can reseed")


def _reseed_process() -> None:
    for reseed_one in (_reseed_random, _reseed_tempfile, _reseed_numpy, _reseed_openssl):
        try:
            reseed_one()
        except Exception:
            log.exception("%s failed", reseed_one.__name__)


def _reseed_random() -> None:
    import random

    random.seed(int.from_bytes(_material(), "little"))


def _reseed_tempfile() -> None:
    tempfile = sys.modules.get("tempfile")
    names = getattr(tempfile, "_name_sequence", None)
    generator = getattr(names, "rng", None)
    if isinstance(generator, Random):
        reseed(generator)


def _reseed_numpy() -> None:
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed(_words())


def _reseed_openssl() -> None:
    ssl = sys.modules.get("ssl")
    if ssl is not None:
        # OpenSSL 3 reseeds its primary generator with this and fresh bytes of the kernel; those of all threads follow.
        ssl.RAND_add(_material(), 0.0)


def _material() -> bytes:
    """64 bytes that no other clone and no other call has."""
    try:
        token = read_page(paths().generation_page).token
    except VmforkError:
        token = b""
    parts = (os.urandom(64), token, time.time_ns(), time.monotonic_ns(), os.getpid())
    return hashlib.blake2b(repr(parts).encode(), person=b"vmfork reseed").digest()


def _words() -> list[int]:
    material = _material()
    return [int.from_bytes(material[at : at + 4], "little") for at in range(0, len(material), 4)]
