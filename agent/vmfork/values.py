# SPDX-License-Identifier: Apache-2.0
"""How the text of a setting is understood: each parser takes the text and raises ValueError with what it wanted.

What a parser returns is safe to use as it says: a unit's name is no option, a command line was never near a shell.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from vmfork.annotations import TYPE_CHECKING

if TYPE_CHECKING:
    from ipaddress import IPv4Network, IPv6Network

# systemd.unit(5): a name that begins with a hyphen would be an option to systemctl.
_UNIT = re.compile(r"[A-Za-z0-9:_.\\@][A-Za-z0-9:_.\\@-]{0,240}")
_UNIT_KINDS = ("service", "socket", "target", "timer", "path", "mount", "automount", "swap", "slice", "scope")
_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}


def boolean(text: str) -> bool:
    """yes/no as systemd spells them."""
    lowered = text.lower()
    if lowered in ("yes", "y", "true", "t", "on", "1"):
        return True
    if lowered in ("no", "n", "false", "f", "off", "0"):
        return False
    raise ValueError("yes or no")


def seconds(text: str) -> float:
    """A finite span of time above zero: a number of seconds, or with one of the units ms, s, min, h."""
    lowered = text.lower()
    unit = next((name for name in _UNITS if lowered.endswith(name)), "")
    try:
        value = float(lowered.removesuffix(unit)) * _UNITS.get(unit, 1.0)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and 0 < value <= 86_400):
        raise ValueError("a time such as 30, 500ms, 5min, of at most a day")
    return value


def seconds_or_zero(text: str) -> float:
    """As `seconds`, but 0 turns the thing off."""
    return 0.0 if text in ("0", "0s") else seconds(text)


def choice(*words: str) -> Callable[[str], str]:
    """One of these words, in any case."""

    def parse(text: str) -> str:
        if text.lower() not in words:
            raise ValueError("one of " + ", ".join(words))
        return text.lower()

    return parse


def text(value: str) -> str:
    """Any text: for keys whose action checks the value itself."""
    return value


def integer(minimum: int, maximum: int) -> Callable[[str], int]:
    """A whole number from `minimum` to `maximum`."""

    def parse(value: str) -> int:
        try:
            number = int(value, 10)
        except ValueError:
            number = minimum - 1
        if not minimum <= number <= maximum:
            raise ValueError(f"a whole number from {minimum} to {maximum}")
        return number

    return parse


def words(value: str) -> tuple[str, ...]:
    """Words separated by white space."""
    return tuple(value.split())


def command(value: str) -> tuple[str, ...]:
    """A command line: split like a shell does (quotes, backslashes) but never run by one; the program is absolute."""
    if not value.strip():
        return ()
    import shlex  # the idle detector does without it, as long as no command is configured

    try:
        argv = tuple(shlex.split(value))
    except ValueError:
        argv = ("",)
    if argv and not argv[0].startswith("/"):
        raise ValueError("a command line that begins with an absolute path")
    return argv


def ports(value: str) -> frozenset[int]:
    """TCP or UDP port numbers."""
    return frozenset(integer(1, 65535)(word) for word in value.split())


def networks(value: str) -> tuple[IPv4Network | IPv6Network, ...]:
    """IP networks or addresses, such as 10.0.0.0/8 2001:db8::1."""
    if not value.strip():
        return ()
    import ipaddress  # 0.3 MiB that the idle detector does without

    return tuple(ipaddress.ip_network(word, strict=False) for word in value.split())


def units(value: str) -> tuple[str, ...]:
    """Names of systemd units; one without a suffix is a service."""
    suffixes = tuple("." + kind for kind in _UNIT_KINDS)
    names = tuple(word if word.endswith(suffixes) else word + ".service" for word in value.split())
    if not all(_UNIT.fullmatch(name) for name in names):
        raise ValueError("names of systemd units, such as ssh.service or cron")
    return names
