# SPDX-License-Identifier: Apache-2.0
"""What looks like a fork and is none. After each of these a guest must still be at generation 1, and the fork that
follows must be its first one.

Most of it is played twice: with the ID and a vmclock that can be read, and without either, where the kernel's line is
all there is. A FIFO hands each line out once, so it cannot show that a line which stays in the log is not taken again
after a restart: tests/vm/test_alarms_guest.py does.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from support.fakeguest import FIRST_GENERATION_ID, RESEED_LINE, RESUME_LINE
from torture.crash import WORKERS
from torture.liveguest import LiveGuest
from torture.scenario import Broken
from torture.table import Row
from vmfork import history
from vmfork.errors import VmforkError
from vmfork.model import IdentityPolicy, Kind

_OTHER_BOOT = "22222222-3333-4444-5555-666666666666"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """Something that happens to a guest at generation 1."""

    name: str
    happens: Callable[[LiveGuest], None]
    hidden: bool = False

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


def _look(live: LiveGuest) -> None:
    """Let the daemon look: it answers when it has dealt with all that came before, then the timer has its turn."""
    for _ in range(3):
        live.problems()
        live.reload()


def _live_migration(live: LiveGuest) -> None:
    for number in range(2, 6):
        live.guest.set_vmclock(counter=7, disruption=number, seq=2 * number)
        _look(live)


def _restart(live: LiveGuest) -> None:
    for _ in range(3):
        live.stop()
        live.start()


def _kill(live: LiveGuest) -> None:
    for _ in range(3):
        assert live.process is not None
        live.process.kill()
        live.process.wait()
        live.start()


def _reload(live: LiveGuest) -> None:
    for _ in range(10):
        assert live.process is not None
        live.process.send_signal(signal.SIGHUP)
        _look(live)


def _empty_run(live: LiveGuest) -> None:
    for path in (live.guest.paths.generation_page, live.guest.paths.detector_memory):
        Path(path).unlink()


def _reboot(live: LiveGuest) -> None:
    live.stop()
    _empty_run(live)
    live.guest.set_boot_id(_OTHER_BOOT)
    if Path(live.guest.paths.devices, "vmclock0").exists():
        # The counter of a new virtual machine begins where the host likes.
        live.guest.set_vmclock(counter=0, seq=2)
    live.start()


def _reboot_replaying_the_log(live: LiveGuest) -> None:
    live.stop()
    _empty_run(live)
    live.guest.set_boot_id(_OTHER_BOOT)
    live.guest.reseed_line()
    live.start()


def _module(live: LiveGuest) -> None:
    for _ in range(3):
        live.guest.unbind_driver()
        _look(live)
        live.guest.bind_driver()
        _look(live)


def _unplug(live: LiveGuest) -> None:
    live.guest.set_vmclock(counter=7)
    live.reload()
    for _ in range(3):
        Path(live.guest.paths.fw_cfg_guid).unlink()
        Path(live.guest.paths.devices, "vmclock0").unlink()
        _look(live)
        live.guest.set_generation_id(FIRST_GENERATION_ID)
        live.guest.set_vmclock(counter=7)
        _look(live)


def _broken_truth(live: LiveGuest) -> None:
    for blob in (b"", bytes(40), bytes(55)):
        live.guest.put(live.guest.paths.fw_cfg_guid, blob)
        _look(live)
    live.guest.set_generation_id(FIRST_GENERATION_ID)
    _look(live)


def _same_id_announced(live: LiveGuest) -> None:
    for _ in range(5):
        live.guest.set_generation_id(FIRST_GENERATION_ID)
        live.guest.reseed_line()
        _look(live)


def _forged_lines(live: LiveGuest) -> None:
    # What a process can write to /dev/kmsg: any facility but the kernel's, any text, any imitation of a prefix.
    for facility in (1, 3, 4, 16, 23, 100):
        live.guest.kmsg_line(RESEED_LINE, facility=facility)
    live.guest.kmsg_line(f"5,1,1,-;{RESEED_LINE}", facility=1)
    live.guest.kmsg_line(f"{RESEED_LINE} not", facility=0)
    live.guest.kmsg_line(f" {RESEED_LINE}", facility=0)
    live.guest.kmsg_bytes(f"13,1,1,-;x\n {RESEED_LINE}\n".encode())
    _look(live)


def _upgrade(live: LiveGuest) -> None:
    live.stop()
    for path in (live.guest.paths.state, live.guest.paths.detector_memory):
        text = Path(path).read_text()
        Path(path).write_text(text.replace("{", '{"from_a_newer_version":{"a":[1,null]},', 1))
    live.start()


def _suspend(live: LiveGuest) -> None:
    live.guest.set_gpe("EN    ")
    live.guest.kmsg_line(RESUME_LINE)
    _look(live)
    live.guest.resume_with_dead_acpi()
    _look(live)


def _smbios(live: LiveGuest) -> None:
    live.guest.set_smbios_uuid("11111111-1111-1111-1111-111111111111")
    live.reload()
    live.stop()
    live.guest.set_boot_id(_OTHER_BOOT)
    live.guest.set_smbios_uuid("22222222-1111-1111-1111-111111111111")
    live.start()


ALARMS = (
    Alarm(name="live migration", happens=_live_migration),
    Alarm(name="daemon restarted", happens=_restart),
    Alarm(name="daemon killed", happens=_kill),
    Alarm(name="configuration reloaded", happens=_reload),
    Alarm(name="reboot or kexec, same ID", happens=_reboot),
    Alarm(name="driver unbound and bound", happens=_module),
    Alarm(name="devices unplugged and back", happens=_unplug),
    Alarm(name="ID unreadable for a while", happens=_broken_truth),
    Alarm(name="same ID announced", happens=_same_id_announced),
    Alarm(name="lines forged by processes", happens=_forged_lines),
    Alarm(name="state of a newer version", happens=_upgrade),
    Alarm(name="another SMBIOS UUID", happens=_smbios),
    Alarm(name="suspended to RAM twice", happens=_suspend),
    Alarm(name="reboot, the log read again", happens=_reboot_replaying_the_log),
)


# The same where the kernel's line alone tells: all that does not happen to an ID or a vmclock.
_WITHOUT_AN_ID = (_restart, _kill, _reload, _reboot, _module, _forged_lines, _upgrade, _smbios, _suspend)
HIDDEN = tuple(
    Alarm(name=f"{alarm.name}, no ID", happens=alarm.happens, hidden=True)
    for alarm in ALARMS
    if alarm.happens in _WITHOUT_AN_ID
)


def _hide(live: LiveGuest) -> None:
    """Nothing tells forks but the kernel's line: the driver is bound, and neither ID nor vmclock can be read."""
    Path(live.guest.paths.fw_cfg_guid).unlink()


def _fork(live: LiveGuest, alarm: Alarm) -> bytes | None:
    """A fork as this guest shows it, and its ID where that can be read."""
    if not alarm.hidden:
        return live.fork()
    live.guest.reseed_line()
    live.row.sent += 1
    return None


def play(alarm: Alarm) -> Row:
    """The alarm, then a fork."""
    with LiveGuest(alarm.name) as live:
        row = live.row
        live.configure("[Detect]\nPollIntervalSec=20ms\n")
        if alarm.hidden:
            _hide(live)
        else:
            live.guest.set_vmclock(counter=7, disruption=1)
        try:
            live.start()
            alarm.happens(live)
            row.check(live.shows(1), "was taken for a fork")
            row.check(live.ran() == [], "hooks ran")
            value = _fork(live, alarm)
            live.until(lambda: live.is_written(2, value), "the fork that followed is the first one")
            row.seen += len(live.events())
        except (Broken, VmforkError) as error:
            row.check(False, str(error))
        row.hooks += len(live.ran())
        return row


def plain_boot_with_a_new_id() -> Row:
    """Firecracker and guid=auto give a new ID at each boot: the hooks that always run do, the identity is kept."""
    hook = 'echo "$VMFORK_GENERATION $VMFORK_IDENTITY $VMFORK_KIND" >>"$VMFORK_ROOT/ran"'
    with LiveGuest("new ID at a plain boot", hook=hook) as live:
        row = live.row
        try:
            live.guest.set_smbios_uuid("11111111-1111-1111-1111-111111111111")
            live.start()
            live.stop()
            _empty_run(live)
            live.guest.set_boot_id(_OTHER_BOOT)
            value = os.urandom(16)
            live.guest.set_generation_id(value)
            row.sent += 1
            live.start()
            live.until(lambda: live.is_written(2, value), "the fork settled")
            (event,) = history.load(live.guest.paths).events
            row.check((event.kind, event.identity.policy) == (Kind.COLD, IdentityPolicy.KEEP), "is not cold, keep")
            row.check(live.ran() == ["2", "keep", "cold"], "the hook heard something else")
            row.seen += 1
            row.hooks += 1
        except (Broken, VmforkError) as error:
            row.check(False, str(error))
        return row


def alarm_rows() -> Iterator[Row]:
    """One row of them all."""
    row = Row(name="false alarms")
    with ThreadPoolExecutor(WORKERS) as pool:
        for result in pool.map(play, (*ALARMS, *HIDDEN)):
            row.add(result)
    row.add(plain_boot_with_a_new_id())
    yield row
