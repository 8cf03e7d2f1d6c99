# SPDX-License-Identifier: Apache-2.0
"""Which guest the library looks at: the running one, or the directory that VMFORK_ROOT names.

As with glibc's secure_getenv(), the environment counts for nothing in a program that runs with somebody else's rights.
"""

from __future__ import annotations

import os

from vmfork.paths import Paths


def paths() -> Paths:
    """The paths to use in this process, now."""
    if len(set(os.getresuid())) > 1 or len(set(os.getresgid())) > 1:
        return Paths()
    return Paths.from_environment()
