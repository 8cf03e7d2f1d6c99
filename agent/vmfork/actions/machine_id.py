# SPDX-License-Identifier: Apache-2.0
"""A new random /etc/machine-id, its D-Bus copy, and new starts for the daemons that remember the old one.

The ID is random, never derived: systemd-machine-id-setup would take the D-Bus copy or the hypervisor's UUID, which
clones share. An ID that the kernel command line or a credential dictates cannot be rotated here, and that is a
failure. What still holds the old ID afterwards is listed.
"""

from __future__ import annotations

import contextlib
import os
import re
import time

from vmfork import settings
from vmfork.actions import files, networkd, spread
from vmfork.actions.contract import Action, ActionContext
from vmfork.actions.machine_id_traces import holders
from vmfork.errors import ActionError, ActionSkipped
from vmfork.paths import Paths

_ID = re.compile(r"[0-9a-f]{32}")
_CREDENTIAL = "system.machine_id"
_JOURNAL_WAIT_SEC = 120.0


def after_fork(context: ActionContext) -> None:
    paths = context.paths
    refuse_dictated(paths)
    path = files.resolve(paths, paths.machine_id)
    old = current(path)
    if old is None:
        raise ActionSkipped(f"{path} is missing, empty or uninitialized: the next boot makes a new one")
    if context.would(f"write a new random machine ID to {path}"):
        _would_follow(context)
        return
    new = random_id()
    in_place = files.replace_file(path, f"{new}\n".encode(), mode=0o444)
    if current(path) != new:
        raise ActionError(f"{path}: holds something else than was written")
    context.say(f"wrote a new machine ID to {path}" + (" (a mount point: written in place)" if in_place else ""))
    _renew_run_copy(context, new)
    _renew_dbus_copy(context, new)
    _restart_daemons(context, old, new)
    if _ID.fullmatch(old):
        left = holders(paths, old)
        for line in left:
            context.say(f"still holds the old machine ID: {line}")
        if not left:
            context.say("nothing that was looked at holds the old machine ID")


def random_id() -> str:
    """32 hex digits in the form of a random (version 4) UUID, as systemd makes them."""
    raw = bytearray(os.urandom(16))
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    return raw.hex()


def current(path: str) -> str | None:
    """What the file holds, None if that makes the next boot write a new one; broken content is returned as it is."""
    with files.reported(path):
        try:
            with open(path, "rb") as file:
                text = file.read(64).decode("ascii", "replace").strip()
        except FileNotFoundError:
            return None
    return None if text in ("", "uninitialized") else text


def refuse_dictated(paths: Paths) -> None:
    """ActionError where something outranks /etc/machine-id at every boot, so that a new file would not last."""
    try:
        with open(paths.kernel_command_line, encoding="utf-8", errors="replace") as file:
            words = file.read(64 * 1024).split()
    except OSError:
        words = []
    if any(word.startswith("systemd.machine_id=") for word in words):
        raise ActionError(
            "the kernel command line dictates the machine ID (systemd.machine_id=), so every clone has the same one",
            hint="give each clone another command line, or take the option out",
        )
    if os.path.exists(os.path.join(paths.system_credentials, _CREDENTIAL)):
        raise ActionError(
            f"the credential {_CREDENTIAL} dictates the machine ID, so every clone that gets it has the same one",
            hint="give each clone another credential, or take it out",
        )


def _renew_run_copy(context: ActionContext, new: str) -> None:
    """The copy of a boot without a writable /etc, where it is not the same file anyway."""
    path = context.paths.machine_id_run
    if os.path.isfile(path) and not os.path.islink(path) and current(path) != new:
        files.replace_file(path, f"{new}\n".encode(), mode=0o444)
        context.say(f"wrote it to {path}")


def _renew_dbus_copy(context: ActionContext, new: str) -> None:
    """A copy of its own becomes the symbolic link that Debian's dbus has; a link is left as it is."""
    path = context.paths.machine_id_dbus
    if os.path.islink(path) or not os.path.exists(path):
        return
    link = files.temporary_name(path)
    with files.reported(path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(link)
        try:
            os.symlink("/etc/machine-id", link)
            files.install(link, path)
        except OSError:
            files.replace_file(path, f"{new}\n".encode(), mode=0o444)
            context.say(f"wrote it to {path}")
            return
    context.say(f"{path} is now a link to /etc/machine-id")


def _would_follow(context: ActionContext) -> None:
    path = context.paths.machine_id_dbus
    if os.path.exists(path) and not os.path.islink(path):
        context.would(f"replace {path} by a link to /etc/machine-id")
    for unit in _to_restart(context):
        context.would(f"restart {unit}")


def _to_restart(context: ActionContext) -> list[str]:
    """The running units that remember the ID, in the configured order.

    networkd asks its DHCP servers as soon as it starts. Where clones spread that, a later hook restarts it in its time.
    """
    units = [unit for unit in context.get(settings.MACHINE_ID_RESTART) if context.run.is_active(unit)]
    if networkd.UNIT in units and spread.leases_will_follow(context) and networkd.managed(context.paths):
        units.remove(networkd.UNIT)
        context.say(f"{networkd.UNIT} is restarted when this clone's share of SpreadSec= is over")
    return units


def _restart_daemons(context: ActionContext, old: str, new: str) -> None:
    """Restart what remembers the ID, in the configured order. Never dbus: that would take the session down."""
    units = _to_restart(context)
    journald = "systemd-journald.service" in units
    if journald and not context.early and context.run.find("journalctl"):
        # Archive the files under the old ID while their owner still has them open, so that they are marked clean.
        finished = context.run.run("journalctl", "--rotate", timeout=5)
        context.say("rotated the journal" if finished.ok else f"journalctl --rotate failed: {finished.complaint}")
    for unit in units:
        context.run.systemctl("try-restart", unit, no_block=True)
        context.say(f"restarting {unit}")
    if journald and not context.early:
        _await_journal(context, old, new)


def _await_journal(context: ActionContext, old: str, new: str) -> None:
    places = [os.path.join(place, new) for place in (context.paths.journal_run, context.paths.journal_var)]
    if not any(os.path.isdir(os.path.join(os.path.dirname(place), old)) for place in places):
        return  # Storage=none: journald has no directories, neither an old one nor a new one.
    # Half of what the hook has left: a machine that is slow is given more time by TimeoutSec=.
    end = time.monotonic() + context.run.remaining(_JOURNAL_WAIT_SEC) / 2
    while not any(os.path.isdir(place) for place in places):
        if time.monotonic() >= end:
            raise ActionError("journald was restarted, but does not write under the new machine ID")
        time.sleep(0.02)
    context.say("verified: journald writes under the new machine ID")


ACTION = Action(
    name="machine-id",
    hook="20-machine-id",
    summary="Give this machine a new random machine ID.",
    identity=True,
    keys=(settings.MACHINE_ID_RESTART,),
    after_fork=after_fork,
)
