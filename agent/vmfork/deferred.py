# SPDX-License-Identifier: Apache-2.0
"""A module of the standard library that another one imports and hardly ever uses: loaded when it is first used.

importlib.util.LazyLoader is made for this, but the import that is to be spared is what makes it load (it looks for the
module's `__spec__`, Python 3.11 to 3.13).
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


def defer(name: str) -> None:
    """Have `import name` load nothing until something of the module is asked for."""
    if name in sys.modules:
        return
    deferred = ModuleType(name)

    def load(attribute: str) -> object:
        del vars(deferred)["__getattr__"], sys.modules[name]
        loaded = importlib.import_module(name)
        vars(deferred).update(vars(loaded))
        return getattr(loaded, attribute)

    vars(deferred)["__getattr__"] = load
    sys.modules[name] = deferred
