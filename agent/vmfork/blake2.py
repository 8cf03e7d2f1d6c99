# SPDX-License-Identifier: Apache-2.0
"""BLAKE2b without hashlib, whose import loads OpenSSL: 3.8 MiB of memory in a daemon that is idle for months."""

from __future__ import annotations

try:
    # The module that hashlib takes the function from; CPython builds it in since 3.6, but it is not documented.
    from _blake2 import blake2b
except ImportError:
    from hashlib import blake2b

__all__ = ["blake2b"]
