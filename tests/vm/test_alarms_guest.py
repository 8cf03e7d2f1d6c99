# SPDX-License-Identifier: Apache-2.0
"""What happens to a real guest and is no fork, in Debian 13 with its ID readable and hidden; then what is one."""

from __future__ import annotations

import base64
import uuid

import pytest
from lab import view
from lab.clones import Clones
from lab.deadline import until
from lab.guest import Guest, Saved
from lab.host import LabError

pytest_plugins = ("lab.plugin",)
pytestmark = pytest.mark.vm

# Lines of no interest to a console, until the kernel's log has lost the first of them and all that was older.
_FLOOD = """
import os
log = os.open("/dev/kmsg", os.O_RDWR | os.O_NONBLOCK)
os.lseek(log, 0, os.SEEK_END)
lost = False
while not lost:
    for _ in range(100):
        os.write(log, b"<7>" + b"x" * 900)
    try:
        os.read(log, 8192)
    except BrokenPipeError:
        lost = True
"""
# kexec_file_load of x86-64: the image has no kexec-tools.
_LOAD_KERNEL = """
import ctypes, os
kernel, initrd = (os.open(f"/var/tmp/{name}", os.O_RDONLY) for name in ("kernel", "initrd"))
line = open("/proc/cmdline", "rb").read().strip() + b"\\0"
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(ctypes.c_long(320), kernel, initrd, ctypes.c_ulong(len(line)), line, ctypes.c_ulong(0)):
    raise OSError(ctypes.get_errno(), "kexec_file_load")
"""
# What goes through the channel of an emulated guest in a second.
_PIECE = 1 << 20
_DRIVER = "/sys/bus/platform/drivers/vmgenid"
# The unit of the daemon asks for the module at each start.
_HIDDEN = "install qemu_fw_cfg /bin/false\n"
_NO_MEMORY = "[Detect]\nPhysicalMemory=no\n"


def assert_nothing_new(guest: Guest, generation: int, what: str) -> None:
    """The daemon has looked at everything that reached it, and has seen no fork."""
    guest.check("vmforkctl", "reload", timeout=120)
    assert view.status(guest)["generation"] == generation, what


def lose_records(guest: Guest) -> None:
    """Let the kernel's log run over while the daemon cannot read it."""
    daemon = view.main_pid(guest)
    guest.check("kill", "-STOP", daemon)
    guest.check("python3", "-c", _FLOOD, timeout=120)
    guest.check("kill", "-CONT", daemon)


def restart(guest: Guest) -> None:
    guest.check("systemctl", "restart", "vmforkd.service", timeout=120)


def kill(guest: Guest) -> None:
    before = view.main_pid(guest)
    guest.check("kill", "-KILL", before)
    script = 'now=$(systemctl show --property=MainPID --value vmforkd.service); test "$now" != 0 -a "$now" != "$1"'
    guest.until("sh", "-c", script, "kill", before, what="the daemon came back")
    view.wait_watching(guest)


def pause(guest: Guest) -> None:
    guest.pause()
    guest.resume()


def status_of(guest: Guest) -> str:
    """The virtual machine's, by its hypervisor."""
    return str(guest.qemu.qmp.command("query-status")["status"])


def suspend(guest: Guest) -> None:
    """To RAM, and woken by the host. The kernel's line about it is nearly that of a fork."""
    request = guest.channel.send("sh", "-c", "echo mem >/sys/power/state")
    until(lambda: status_of(guest) == "suspended", seconds=60, what=f"{guest.name}: suspended")
    guest.qemu.qmp.command("system_wakeup")
    guest.channel.answer(request, seconds=60)
    guest.check("sh", "-c", "dmesg | grep -q 'random: crng reseeded on system resumption'")


def step_clock(guest: Guest) -> None:
    guest.check("date", "--set=+1 hour")
    guest.check("date", "--set=-1 hour")


def boot_id(guest: Guest) -> str | None:
    """None while no system is up; what is asked then may get lost."""
    try:
        return guest.channel.answer(guest.channel.send("cat", "/proc/sys/kernel/random/boot_id"), seconds=5).stdout
    except LabError:
        return None


def kexec(guest: Guest) -> None:
    """Boot the same kernel again from the running one: no firmware, no hypervisor has a part in it."""
    image = guest.spec.image
    for name, path in (("kernel", image.kernel), ("initrd", image.initrd)):
        content = path.read_bytes()
        for begin in range(0, len(content), _PIECE):
            piece = base64.b64encode(content[begin : begin + _PIECE]).decode()
            guest.check("sh", "-ec", 'base64 -d >>"/var/tmp/$1"', "sh", name, stdin=piece)
    guest.check("python3", "-c", _LOAD_KERNEL)
    before = boot_id(guest)
    guest.channel.send("systemctl", "kexec")
    until(lambda: boot_id(guest) not in (before, None), seconds=180, what=f"{guest.name}: the next kernel is up")
    guest.wait_ready()
    view.wait_watching(guest)


ALARMS = (restart, kill, pause, step_clock, lose_records)


def test_what_happens_to_a_guest_is_no_fork_and_the_next_fork_is_noticed(trixie: Saved, clones: Clones) -> None:
    guest = clones.restore(trixie, "alarms", guid=trixie.guid)
    guest.check("sysctl", "kernel.printk_devkmsg=on")
    for alarm in ALARMS:
        alarm(guest)
        assert_nothing_new(guest, 1, alarm.__name__)
    assert view.status(guest)["detection"] == "event"
    daemon = view.main_pid(guest)
    guest.check("kill", "-STOP", daemon)
    clone = clones.restore(guest.save(), "alarms-fork", guid=uuid.uuid4())
    clone.check("python3", "-c", _FLOOD, timeout=120)
    clone.check("kill", "-CONT", daemon)
    event = view.wait_event(clone, after=1)
    assert clone.generation_id is not None
    assert (event["generation"], event["kind"], event["state"]) == (2, "live", "settled"), event
    assert event["generation_id"] == clone.generation_id.hex()
    assert [one["kind"] for one in view.events(clone)] == ["live"]


def test_a_suspension_is_no_fork_and_the_next_fork_is_noticed(trixie: Saved, clones: Clones) -> None:
    guest = clones.restore(trixie, "suspended", guid=trixie.guid)
    suspend(guest)
    assert_nothing_new(guest, 1, "suspend")
    # The firmware of q35 in Debian 12 does not set ACPI up again: from now on the kernel hears of no new ID.
    edges = ["kmsg"] if view.source(guest, "kmsg", "edge")["live"] else ["timer"]
    assert view.status(guest)["detection"] == ("event" if edges == ["kmsg"] else "timer")
    clone = clones.restore(guest.save(), "suspended-fork", guid=uuid.uuid4())
    event = view.wait_event(clone, after=1)
    assert (event["generation"], event["kind"], event["edges"]) == (2, "live", edges), event
    assert event["generation_id"] == (clone.generation_id or b"").hex()


def test_a_kernel_that_kexec_starts_is_no_fork_and_the_next_fork_is_noticed(trixie: Saved, clones: Clones) -> None:
    guest = clones.restore(trixie, "kexec", guid=trixie.guid)
    kexec(guest)
    assert_nothing_new(guest, 1, "kexec")
    assert view.events(guest) == []
    assert view.status(guest)["detection"] == "event"
    clone = clones.restore(guest.save(), "kexec-fork", guid=uuid.uuid4())
    event = view.wait_event(clone, after=1)
    assert (event["generation"], event["kind"], event["edges"]) == (2, "live", ["kmsg"]), event


def test_a_driver_that_loses_its_device_is_no_fork_and_the_timer_watches(trixie: Saved, clones: Clones) -> None:
    # Linux 6.12 neither takes its notify handler away nor binds again (EIO): nothing may come to that handler any more,
    # so no fork follows here.
    guest = clones.restore(trixie, "unbound", guid=trixie.guid)
    guest.check("sh", "-ec", f'cd {_DRIVER}; for device in *:*; do echo "$device" >unbind; done')
    assert_nothing_new(guest, 1, "unbound")
    assert view.status(guest)["detection"] == "timer"
    assert not view.source(guest, "kmsg", "edge")["live"]
    assert [one["kind"] for one in view.fence(guest)] == ["manual"]


def test_without_a_readable_id_the_kernels_word_is_taken_once(trixie: Saved, clones: Clones) -> None:
    first = clones.restore(trixie, "hidden", guid=trixie.guid)
    first.check("sysctl", "kernel.printk_devkmsg=on")
    view.put(first, "/run/modprobe.d/lab.conf", _HIDDEN)
    view.put(first, "/etc/vmfork/vmfork.conf.d/lab-memory.conf", _NO_MEMORY)
    first.check("rmmod", "qemu_fw_cfg")
    restart(first)
    assert not view.source(first, "fwcfg", "truth")["live"]
    guest = clones.restore(first.save(), "hidden-fork", guid=uuid.uuid4())
    event = view.wait_event(guest, after=1)
    assert (event["generation"], event["kind"], event["edges"]) == (2, "live", ["kmsg"])
    # The line is in the log now, and stays there until records are lost.
    for alarm in (restart, kill, pause, step_clock, lose_records):
        alarm(guest)
        assert_nothing_new(guest, 2, alarm.__name__)
    # Once more, and the line is lost before it can be read: the interrupt tells.
    daemon = view.main_pid(guest)
    guest.check("kill", "-STOP", daemon)
    second = clones.restore(guest.save(), "hidden-lost", guid=uuid.uuid4())
    second.check("python3", "-c", _FLOOD, timeout=120)
    second.check("kill", "-CONT", daemon)
    assert view.wait_event(second, after=2)["generation"] == 3
    assert [one["kind"] for one in view.events(second)] == ["live", "live"]
    # Nothing is left that could tell, where the firmware leaves ACPI dead; then that is what must be said.
    suspend(second)
    assert_nothing_new(second, 3, "suspend")
    live = view.source(second, "kmsg", "edge")["live"]
    assert view.status(second)["detection"] == ("event" if live else "none")
    assert second.run("vmforkctl", "doctor").exit_code == (0 if live else 4)
