# SPDX-License-Identifier: Apache-2.0
"""Where one scene's guests live: started, saved, restored and ended here; one that went wrong leaves a report."""

from __future__ import annotations

import logging
import shutil
import uuid
from pathlib import Path

from lab import view
from lab.clones import ready
from lab.guest import Guest, Saved, Spec

log = logging.getLogger(__name__)

REPORTS = Path(__file__).resolve().parents[3] / "artifacts" / "demo"
# An emulated guest on a busy host is slow; that alone is no failure of a hook.
_PATIENCE = "[React]\nTimeoutSec=180\n"


class Stage:
    """One scene's guests. Their names begin with the scene's, so that a line of progress tells whose it is."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.serial_logs: list[Path] = []
        self._directory = directory
        self._guests: list[Guest] = []

    def boot(self, spec: Spec) -> Guest:
        """A guest that has booted, with vmforkd and a process with random state running in it."""
        log.info("%s: boots", self.name)
        guest = self._keep(Guest(spec, self.name, self._directory, guid=uuid.uuid4()))
        ready(guest)
        view.put(guest, "/etc/vmfork/vmfork.conf.d/demo.conf", _PATIENCE)
        return guest

    def save(self, guest: Guest) -> Saved:
        """Save a guest; it ends with that."""
        saved = guest.save()
        self._guests.remove(guest)
        return saved

    def restore(self, saved: Saved, name: str, guid: uuid.UUID | None) -> Guest:
        """A clone that runs."""
        return self._keep(saved.restore(f"{self.name}-{name}", guid=guid))

    def end(self, guest: Guest, *, report: bool = False) -> None:
        """This guest is no longer needed; with `report` its console, its journal and vmfork's own view are kept."""
        if report:
            guest.report(REPORTS)
            self.serial_logs.append(REPORTS / guest.name / guest.qemu.serial_log.name)
        guest.kill()
        # When the demo is interrupted, another thread ends it too.
        if guest in self._guests:
            self._guests.remove(guest)

    def close(self, *, report: bool = False) -> None:
        """End every guest."""
        for guest in list(self._guests):
            self.end(guest, report=report)

    def _keep(self, guest: Guest) -> Guest:
        self._guests.append(guest)
        return guest


def forget_reports() -> None:
    """Remove what an earlier demo left."""
    shutil.rmtree(REPORTS, ignore_errors=True)
