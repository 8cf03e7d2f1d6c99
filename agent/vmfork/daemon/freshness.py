# SPDX-License-Identifier: Apache-2.0
"""Makes this clone differ from its siblings before anybody hears of the fork.

Without the kernel's vmgenid driver, three restores of one guest were measured to give the same bytes from os.urandom.
A program that is told of a fork and asks for new randomness must get randomness that no sibling has.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from vmfork import kernelrng
from vmfork.blake2 import blake2b
from vmfork.daemon.clocks import Moment
from vmfork.errors import AbsentError
from vmfork.paths import Paths

log = logging.getLogger(__name__)

TOKEN_BYTES = 16


def _own_bytes(truths: Mapping[str, bytes], moment: Moment) -> bytes:
    """What no sibling has: the new truths (where the host gave each clone its own) and the clocks of this moment."""
    return b"".join([truths[name] for name in sorted(truths)]) + moment.to_bytes()


def reseed_kernel(paths: Paths, truths: Mapping[str, bytes], moment: Moment) -> str | None:
    """Mix what is unique here into the kernel's generator and force new keys; what went wrong, or None."""
    try:
        kernelrng.mix(paths, _own_bytes(truths, moment))
        kernelrng.reseed(paths)
    except AbsentError as error:
        return str(error)
    except OSError as error:
        return f"{paths.urandom}: {error.strerror}"
    return None


def new_token(paths: Paths, truths: Mapping[str, bytes], moment: Moment) -> bytes:
    """The fork token: BLAKE2b-128 over 32 bytes of getrandom, hardware randomness if any, all truths, the clocks.

    Even where the kernel's generator could not be reseeded, clones with different IDs or clocks get different tokens.
    """
    mixed = os.getrandom(32) + kernelrng.hardware_bytes(paths, 32) + _own_bytes(truths, moment)
    return blake2b(mixed, digest_size=TOKEN_BYTES, person=b"vmfork-token").digest()
