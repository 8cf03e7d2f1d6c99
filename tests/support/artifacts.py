# SPDX-License-Identifier: Apache-2.0
"""What tests leave for a person to read: reports of other tools, whole, in artifacts/ of the tree."""

from __future__ import annotations

from pathlib import Path

ARTIFACTS = Path(__file__).resolve().parents[2] / "artifacts"


def keep(name: str, text: str) -> None:
    """Write artifacts/`name`, in place of what an earlier run left there."""
    ARTIFACTS.mkdir(exist_ok=True)
    (ARTIFACTS / name).write_text(text)
