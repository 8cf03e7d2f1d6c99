# SPDX-License-Identifier: Apache-2.0
"""One target under libFuzzer, in this process: `python -m torture.guided NAME PROGRAM OPTION...`.

`PROGRAM` is what libFuzzer calls to run itself again. Nothing of vmfork may be imported before this: only what is
imported in the `with` counts the edges that it reaches.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any


def main() -> None:
    name, *words = sys.argv[1:]
    # No stubs, and not everywhere installed.
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["vmfork"]):
        from torture.targets import TARGETS

    atheris.Setup(words, TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
