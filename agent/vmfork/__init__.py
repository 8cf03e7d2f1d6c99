# SPDX-License-Identifier: Apache-2.0
"""vmfork: know that the virtual machine you run in was forked.

Importing this costs next to nothing and needs no daemon: each name is loaded when it is first used. The guarantees of
each function are in its own documentation, the whole picture is in docs/library.md.
"""

from __future__ import annotations

__version__ = "0.1.0"

# By hand, because `typing` alone would cost more than everything else here together.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmfork.errors import Forked, Unavailable, VmforkError
    from vmfork.library.callbacks import (
        register_after_fork,
        register_before_snapshot,
        unregister_after_fork,
        unregister_before_snapshot,
    )
    from vmfork.library.guard import Guard, generation, supported, unforked
    from vmfork.library.reseeding import reseed, reseed_on_fork
    from vmfork.library.waiting import settled, wait
    from vmfork.library.watcher import Watcher
    from vmfork.model import ForkEvent

__all__ = [
    "ForkEvent",
    "Forked",
    "Guard",
    "Unavailable",
    "VmforkError",
    "Watcher",
    "generation",
    "register_after_fork",
    "register_before_snapshot",
    "reseed",
    "reseed_on_fork",
    "settled",
    "supported",
    "unforked",
    "unregister_after_fork",
    "unregister_before_snapshot",
    "wait",
]

_HOMES = {
    "ForkEvent": "model",
    "Forked": "errors",
    "Guard": "library.guard",
    "Unavailable": "errors",
    "VmforkError": "errors",
    "Watcher": "library.watcher",
    "generation": "library.guard",
    "register_after_fork": "library.callbacks",
    "register_before_snapshot": "library.callbacks",
    "reseed": "library.reseeding",
    "reseed_on_fork": "library.reseeding",
    "settled": "library.waiting",
    "supported": "library.guard",
    "unforked": "library.guard",
    "unregister_after_fork": "library.callbacks",
    "unregister_before_snapshot": "library.callbacks",
    "wait": "library.waiting",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Not importlib.import_module(): that module would be one more to load.
    module = __import__(f"{__name__}.{home}", fromlist=(name,))
    value: object = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
