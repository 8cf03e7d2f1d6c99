# SPDX-License-Identifier: Apache-2.0
"""Truths: values the hypervisor changes when this guest is forked, and the evidence that says who a clone is.

Each module reads one of them below a `Paths` root. Raw bytes leave this package and are compared for inequality only;
nothing here interprets a generation ID, orders counters or remembers what was seen before.
"""

from __future__ import annotations

from vmfork.annotations import Protocol


class Truth(Protocol):
    """Something whose change is a fork; `name` is its source name in status and doctor."""

    name: str

    def read(self) -> bytes:
        """The present value, in memory order.

        Raises AbsentError where it is not there or not readable this time, InputError where what is there cannot be
        understood. Either way there is no value this time: a caller compares nothing.
        """
