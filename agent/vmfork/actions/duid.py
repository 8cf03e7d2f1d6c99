# SPDX-License-Identifier: Apache-2.0
"""DUIDs, by which DHCP servers tell machines apart: a random one, and those that systemd makes of a machine ID.

The latter let a lease be held against the machine ID of now, whoever restarted the client and when. How systemd makes
them is fixed since its version 230: a change would move every lease.
"""

from __future__ import annotations

import hashlib
import hmac
import os

_DUID_UUID = b"\x00\x04"
_DUID_EN = b"\x00\x02"
_LINK_LAYER = (b"\x00\x01", b"\x00\x03")
# DUIDType=vendor: systemd's enterprise number, then SipHash-2-4 of the machine ID under this key.
_SYSTEMD = (43793).to_bytes(4, "big")
_SYSTEMD_KEY = bytes.fromhex("80118cc2fe4a03ee3ed60c6f36391409")
# DUIDType=uuid: the machine ID's application-specific ID for this application (sd_id128_get_machine_app_specific(3)).
_SYSTEMD_APPLICATION = bytes.fromhex("a50ad112bf604577a2fb741ab1955b03")
_MASK = (1 << 64) - 1


def fresh() -> bytes:
    """A DUID-UUID (RFC 6355) of a random UUID, as it goes over the wire."""
    return _DUID_UUID + _version_4(os.urandom(16))


def of_machine(machine_id: str) -> tuple[bytes, ...]:
    """The DUIDs that systemd makes of a machine ID (32 hex digits; ValueError otherwise), one for each type."""
    raw = bytes.fromhex(machine_id)
    if len(raw) != 16:
        raise ValueError("a machine ID has 32 hex digits")
    digest = siphash24(_SYSTEMD_KEY, raw)
    specific = hmac.digest(raw, _SYSTEMD_APPLICATION, hashlib.sha256)[:16]
    return _DUID_EN + _SYSTEMD + digest.to_bytes(8, "little"), _DUID_UUID + _version_4(specific)


def is_of_hardware(duid: bytes) -> bool:
    """Whether this DUID comes from a MAC address (DUID-LLT, DUID-LL)."""
    return duid.startswith(_LINK_LAYER)


def _version_4(data: bytes) -> bytes:
    raw = bytearray(data)
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    return bytes(raw)


def siphash24(key: bytes, message: bytes) -> int:
    """SipHash-2-4 with 64 bits of result; the key has 16 bytes."""
    k0, k1 = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:16], "little")
    state = (k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573)
    padded = message + bytes(7 - len(message) % 8) + bytes((len(message) & 0xFF,))
    for start in range(0, len(padded), 8):
        word = int.from_bytes(padded[start : start + 8], "little")
        v0, v1, v2, v3 = _rounds(2, state[0], state[1], state[2], state[3] ^ word)
        state = (v0 ^ word, v1, v2, v3)
    v0, v1, v2, v3 = _rounds(4, state[0], state[1], state[2] ^ 0xFF, state[3])
    return v0 ^ v1 ^ v2 ^ v3


def _rounds(count: int, v0: int, v1: int, v2: int, v3: int) -> tuple[int, int, int, int]:
    for _ in range(count):
        v0 = (v0 + v1) & _MASK
        v2 = (v2 + v3) & _MASK
        v1, v3 = _left(v1, 13) ^ v0, _left(v3, 16) ^ v2
        v0 = (_left(v0, 32) + v3) & _MASK
        v2 = (v2 + v1) & _MASK
        v3, v1 = _left(v3, 21) ^ v0, _left(v1, 17) ^ v2
        v2 = _left(v2, 32)
    return v0, v1, v2, v3


def _left(value: int, bits: int) -> int:
    return (value << bits | value >> (64 - bits)) & _MASK
