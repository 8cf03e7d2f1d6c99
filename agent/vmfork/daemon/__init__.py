# SPDX-License-Identifier: Apache-2.0
"""vmforkd, the detector: one thread that waits, decides, publishes and starts the reaction."""

from __future__ import annotations

from vmfork.deferred import defer

# dataclasses imports it for the docstring of a class that has none: 1.1 MiB, with the compiler's modules behind it.
defer("inspect")
