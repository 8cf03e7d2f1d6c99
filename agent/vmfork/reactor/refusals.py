# SPDX-License-Identifier: Apache-2.0
"""Which refusals of the kernel pass by themselves: what is lacking now may be there in a moment."""

from __future__ import annotations

import errno

# Processes (clone(2)), memory, descriptors of the system and of this process, epoll's watches (epoll_ctl(2)), and a
# program that is being written while it is to be run (execve(2)).
_PASSING = frozenset((errno.EAGAIN, errno.ENOMEM, errno.ENFILE, errno.EMFILE, errno.ENOSPC, errno.ETXTBSY))


def passes(error: OSError) -> bool:
    """Whether the same call may well succeed a little later."""
    return error.errno in _PASSING
