# SPDX-License-Identifier: Apache-2.0
"""The environment of a hook: exactly the variables of the contract, and nothing of the reactor's own."""

from __future__ import annotations

from vmfork.reactor.phases import Occasion

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HOOK = "VMFORK_HOOK"
FORK_TOKEN = "VMFORK_FORK_TOKEN"
ROOT = "VMFORK_ROOT"


def environment_of(occasion: Occasion, hook: str, *, deadline_sec: float) -> dict[str, str]:
    """All variables of the hook with this name; what is absent on this occasion is unset.

    `deadline_sec` is how long the hook may run. VMFORK_EDGES holds the names separated by spaces, VMFORK_DRY_RUN is
    1 or 0.
    """
    event = occasion.event
    values: dict[str, str | None] = {
        "PATH": PATH,
        "LANG": "C.UTF-8",
        "VMFORK_GENERATION": str(occasion.generation),
        "VMFORK_KIND": event.kind.value if event else None,
        FORK_TOKEN: event.token.hex() if event else None,
        "VMFORK_EDGES": " ".join(event.edges) if event else None,
        "VMFORK_IDENTITY": occasion.identity.value if occasion.identity else None,
        "VMFORK_DRY_RUN": "1" if occasion.dry_run else "0",
        HOOK: hook,
        "VMFORK_DEADLINE_SEC": f"{deadline_sec:g}",
        ROOT: occasion.root or None,
    }
    return {name: value for name, value in values.items() if value is not None}
