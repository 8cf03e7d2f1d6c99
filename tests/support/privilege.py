# SPDX-License-Identifier: Apache-2.0
"""Tests of what somebody without privilege gets to see, also where the test run itself is root's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

NOBODY = 65534


@contextmanager
def unprivileged() -> Iterator[None]:
    """Inside, files are opened as nobody; a process that is not root stays who it is."""
    if os.geteuid() != 0:
        yield
        return
    with acting_as(NOBODY):
        yield


@contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """Inside, this process, which has to be root's, is somebody else to files and to those that it connects to."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def as_nobody(work: Callable[[], T]) -> T:
    """What `work` returns, as JSON carries it, when a process of uid and gid nobody, without any privilege, does it."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            outcome: object = {"result": work()}
        except BaseException as error:
            outcome = {"error": f"{type(error).__name__}: {error}"}
        with os.fdopen(write_end, "w") as pipe:
            json.dump(outcome, pipe)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        outcome = json.load(pipe)
    os.waitpid(child, 0)
    assert isinstance(outcome, dict)
    assert "error" not in outcome, outcome["error"]
    result: T = outcome["result"]
    return result
