# SPDX-License-Identifier: Apache-2.0
"""The guests of a test: made ready, restored, and ended with it; those of a failed test leave a report."""

from __future__ import annotations

import shutil
from pathlib import Path

from lab import view
from lab.guest import Guest, Saved

ARTIFACTS = Path(__file__).resolve().parents[3] / "artifacts" / "vm" / "matrix"


class Clones:
    """The guests of one test: each ends with it, and each tells what it saw if the test failed."""

    def __init__(self) -> None:
        self._guests: list[Guest] = []

    def restore(self, saved: Saved, name: str, **how: object) -> Guest:
        """`saved.restore`, for the length of this test."""
        return self.keep(saved.restore(name, **how))  # type: ignore[arg-type]

    def keep(self, guest: Guest) -> Guest:
        """Take over a guest that was started otherwise."""
        self._guests.append(guest)
        return guest

    def end(self, report_to: Path | None) -> None:
        """End all of them."""
        for guest in self._guests:
            if report_to and guest.qemu.running:
                guest.report(report_to)
            guest.kill()
            shutil.rmtree(guest.directory, ignore_errors=True)


def ready(guest: Guest, *, probe: bool = True) -> Guest:
    """Wait for a booted guest, start what the tests need in it. If that fails, the guest leaves its report."""
    try:
        guest.wait_ready()
        view.configure(guest)
        if guest.spec.image.has_systemd:
            view.wait_watching(guest)
            guest.check("vmforkctl", "reload")
        else:
            view.start_daemon(guest)
        if probe:
            view.start_probe(guest)
    except BaseException:
        guest.report(ARTIFACTS / f"boot-{guest.name}")
        guest.kill()
        raise
    return guest
