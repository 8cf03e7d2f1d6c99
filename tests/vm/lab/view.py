# SPDX-License-Identifier: Apache-2.0
"""What vmfork in a guest says, asked as an administrator would: through vmforkctl and its JSON.

Nothing here looks into vmfork's files or imports it: the tests hold the programs that users run against what the host
knows.
"""

from __future__ import annotations

from typing import Any

from lab.guest import Guest

_PROBE = "/usr/lib/vmfork-lab/guest_probe.py"
_FIRST_HOOK = "/etc/vmfork/hooks.d/00-lab-first"
_LAST_HOOK = "/etc/vmfork/hooks.d/99-lab-last"
_TRACE = "/run/vmfork-lab.hooks"
# The default is made for real machines; an emulated one on a busy host needs a minute for what they do in a second.
_PATIENCE = "[React]\nTimeoutSec=180s\n"
# A shell builtin, so that the hook's first instruction is what is measured. /proc/uptime is CLOCK_BOOTTIME.
_TRACING_HOOK = f"""#!/bin/sh
read -r now rest </proc/uptime
echo "$VMFORK_HOOK $VMFORK_GENERATION $VMFORK_FORK_TOKEN $now" >>{_TRACE}
"""

Event = dict[str, Any]


def put(guest: Guest, path: str, content: str, *, mode: str = "0644") -> None:
    """Write a file in the guest."""
    script = 'mkdir -p "$(dirname "$1")" && cat >"$1" && chmod "$2" "$1"'
    guest.check("sh", "-c", script, "put", path, mode, stdin=content)


def start_daemon(guest: Guest) -> None:
    """Where no service manager has started vmforkd: start it now."""
    guest.check("sh", "-c", "setsid /usr/sbin/vmforkd >/run/vmforkd.log 2>&1 </dev/null &")
    wait_watching(guest)


def wait_watching(guest: Guest) -> None:
    """Wait until vmforkd answers."""
    guest.until("vmforkctl", "status", "--json=short", seconds=120, what="vmforkd answers")


def start_probe(guest: Guest) -> None:
    """Start the program that draws random numbers after each fork, and wait until it serves."""
    command = f"setsid python3 {_PROBE} serve >/run/vmfork-lab.probe.log 2>&1 </dev/null &"
    guest.check("sh", "-c", command)
    guest.until("python3", _PROBE, "ask", "now", seconds=120, what="the probe serves")


def configure(guest: Guest) -> None:
    """Give hooks time, and add a first and a last one that note when they ran."""
    put(guest, "/etc/vmfork/vmfork.conf.d/lab.conf", _PATIENCE)
    for path in (_FIRST_HOOK, _LAST_HOOK):
        put(guest, path, _TRACING_HOOK, mode="0755")


def hook_trace(guest: Guest) -> list[tuple[str, int, str, float]]:
    """What the tracing hooks noted: hook, generation, fork token, seconds since boot."""
    lines = guest.run("cat", _TRACE).stdout.splitlines()
    # Before a snapshot there is no fork, hence no token: such a line is shorter and of no interest here.
    words = (line.split() for line in lines)
    return [
        (hook, int(generation), token, float(now)) for hook, generation, token, now in (w for w in words if len(w) == 4)
    ]


def drawn(guest: Guest, question: int | str) -> dict[str, Any]:
    """What the probe drew after the fork that made the generation greater than this, or draws `now`."""
    answer = guest.json("python3", _PROBE, "ask", str(question), timeout=90)
    assert isinstance(answer, dict)
    return answer


def status(guest: Guest) -> dict[str, Any]:
    """`vmforkctl status`."""
    answer = guest.json("vmforkctl", "status", "--json=short")
    assert isinstance(answer, dict)
    return answer


def main_pid(guest: Guest, unit: str = "vmforkd.service") -> str:
    """The process of a service, by the service manager."""
    return guest.check("systemctl", "show", "--property=MainPID", "--value", unit).strip()


def source(guest: Guest, name: str, role: str) -> dict[str, Any]:
    """One source of `vmforkctl sources`."""
    found = [one for one in status(guest)["sources"] if (one["name"], one["role"]) == (name, role)]
    assert len(found) == 1, f"{guest.name} has {len(found)} sources {name}"
    answer: dict[str, Any] = found[0]
    return answer


def events(guest: Guest) -> list[Event]:
    """`vmforkctl list`, oldest first."""
    answer = guest.json("vmforkctl", "list", "--json=short")
    assert isinstance(answer, list)
    return answer


def wait_event(guest: Guest, *, after: int, settled: bool = True, timeout: float = 180) -> Event:
    """The event of a fork newer than generation `after`; with `settled` when its reaction has ended, well or not."""
    command = ["vmforkctl", "wait", f"--after={after}", f"--timeout={timeout:.0f}", "--json=short"]
    answer = guest.json(*command, *(["--settled"] if settled else []), accept=(0, 1), timeout=timeout + 30)
    assert isinstance(answer, dict)
    return answer


def wait_generation(guest: Guest, generation: int, *, seconds: float = 60) -> None:
    """Wait until the generation page shows at least this generation; quicker than asking vmforkctl."""
    script = 'test "$(od -An -t u8 -j 16 -N 8 /run/vmfork/generation)" -ge "$1"'
    guest.until("sh", "-c", script, "generation", str(generation), seconds=seconds, what=f"generation {generation}")


def fence(guest: Guest) -> list[Event]:
    """All events so far, after the detector has looked at everything that reached it: a manual one is the last.

    To show that something is *no* fork: the trigger is a wake-up like any other, in which every edge is drained and
    every truth is read, and its answer comes after that.
    """
    guest.check("vmforkctl", "trigger", "--reason=the test asks for a fence")
    return events(guest)


def failed_hooks(event: Event) -> list[str]:
    """Hooks that did not do what they are for, with their results."""
    return [f"{one['name']}: {one['result']}" for one in event["hooks"] if one["result"] not in ("ok", "skipped")]
