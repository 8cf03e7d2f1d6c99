# SPDX-License-Identifier: Apache-2.0
"""Which guests the demo forks, and what may tell each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lab.guest import Spec
from lab.guests import Guests
from scenes import forked, undriven
from scenes.findings import Findings
from scenes.forked import Expected
from scenes.stage import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One kind of guest."""

    name: str
    title: str
    play: Callable[[Stage, Spec, Expected, Findings], None]
    spec: Callable[[Guests], Spec]
    expected: Expected


def _interrupted_by(*names: str) -> tuple[str, ...]:
    """A command that succeeds when the kernel has counted an interrupt of each of these devices."""
    script = 'for name; do awk -v name="$name" "\\$NF == name && \\$2 > 0 { seen = 1 } END { exit !seen }" '
    return ("sh", "-c", f"{script} /proc/interrupts || exit 1; done", "interrupted-by", *names)


SCENES = (
    Scene(
        name="debian13",
        title="Debian 13, Linux 6.12, x86: ACPI generation ID",
        play=forked.play,
        spec=lambda guests: guests.trixie(),
        expected=Expected(
            edges=frozenset({"kmsg"}),
            notified=("grep", "-q", "^ *[1-9]", "/sys/firmware/acpi/interrupts/gpe05"),
        ),
    ),
    Scene(
        name="debian12",
        title="Debian 12, cloud kernel 6.1, x86: a generation ID, but no driver for it",
        play=undriven.play,
        spec=lambda guests: guests.bookworm(),
        expected=Expected(edges=frozenset({"timer"})),
    ),
    Scene(
        name="arm64-vmgenid",
        title="Debian 13, Linux 6.12, arm64: generation ID in the devicetree",
        play=forked.play,
        spec=lambda guests: guests.arm64(),
        expected=Expected(edges=frozenset({"kmsg"}), notified=_interrupted_by("vmgenid")),
    ),
    Scene(
        name="arm64-both",
        title="Debian 13, Linux of backports, arm64: generation ID and vmclock, two edges of one fork",
        play=forked.play,
        spec=lambda guests: guests.arm64(backports=True, vmclock=True),
        expected=Expected(
            edges=frozenset({"kmsg", "vmclock"}), notified=_interrupted_by("vmgenid", "vmclock"), clones=2
        ),
    ),
    Scene(
        name="arm64-vmclock",
        title="Debian 13, Linux of backports, arm64: a vmclock with a generation counter, nothing else",
        play=forked.play,
        spec=lambda guests: guests.arm64(backports=True, vmgenid=False, vmclock=True),
        expected=Expected(edges=frozenset({"vmclock"}), notified=_interrupted_by("vmclock"), clones=2),
    ),
)
