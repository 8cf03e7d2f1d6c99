# SPDX-License-Identifier: Apache-2.0
"""Evidence of who a cold clone is: the machine's UUID in SMBIOS and the cloud's name for the instance.

Neither is a truth: a change of one alone is no fork. Both only help to tell a clone from the same machine once
something else has said that there was a fork. What firmware left blank is no evidence at all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vmfork.errors import AbsentError, InputError
from vmfork.paths import Paths
from vmfork.truths.sysfile import read_whole, shown

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_UUID_LIMIT = 128
_INSTANCE_ID_LIMIT = 1024
# What cloud-init writes when it found no cloud: on the next boot it may well find one for the same machine.
_NO_DATASOURCE = "iid-datasource-none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One piece of evidence: its source name, its value or None, and in `detail` what it is or why there is none."""

    name: str
    value: str | None
    detail: str
    hint: str | None = None


def read_smbios(paths: Paths) -> Evidence:
    """The system UUID of SMBIOS as the kernel shows it, in lower case; only root may read it. Raises nothing."""
    path = paths.smbios_uuid
    try:
        text = _text(path, _UUID_LIMIT).lower()
    except (AbsentError, InputError) as error:
        return Evidence(name="smbios", value=None, detail=str(error), hint=error.hint)
    if _uuid_bytes(text) is None:
        return Evidence(name="smbios", value=None, detail=f"{shown(path)}: the firmware set no usable UUID")
    return Evidence(name="smbios", value=text, detail=f"system UUID from {shown(path)}")


def read_instance_id(paths: Paths) -> Evidence:
    """The instance ID that cloud-init noted last, one line of text. Raises nothing."""
    path = paths.cloud_instance_id
    try:
        text = _text(path, _INSTANCE_ID_LIMIT)
    except (AbsentError, InputError) as error:
        return Evidence(name="instance-id", value=None, detail=str(error), hint=error.hint)
    if not text or text == _NO_DATASOURCE:
        return Evidence(name="instance-id", value=None, detail=f"{shown(path)}: cloud-init found no cloud")
    return Evidence(name="instance-id", value=text, detail=f"instance ID from {shown(path)}")


def same_machine(one: str | None, other: str | None) -> bool:
    """Whether two SMBIOS UUIDs are compatible with one and the same machine.

    True as well where the bytes of the first three fields are swapped, which is how a change of SMBIOS version or
    firmware shows the same UUID, and where either is blank or unusable: no evidence of another machine.
    """
    first, second = _uuid_bytes(one), _uuid_bytes(other)
    if first is None or second is None:
        return True
    return second in (first, _swapped(first))


def _text(path: str, limit: int) -> str:
    try:
        text = read_whole(path, limit=limit).decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise InputError(shown(path), "is not text") from error
    if text and not text.isprintable():
        raise InputError(shown(path), "is not one line of text")
    return text


def _uuid_bytes(text: str | None) -> bytes | None:
    """The 16 bytes of a UUID in the order of its text, None where it says nothing about the machine."""
    if text is None or not _UUID.fullmatch(text.strip().lower()):
        return None
    value = bytes.fromhex(text.strip().replace("-", ""))
    return None if value in (bytes(16), b"\xff" * 16) else value


def _swapped(value: bytes) -> bytes:
    return value[3::-1] + value[5:3:-1] + value[7:5:-1] + value[8:]
