# SPDX-License-Identifier: Apache-2.0
"""docs/threat-model.md names a test for each statement: those tests exist."""

from __future__ import annotations

import re
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
TEXT = (TOP / "docs" / "threat-model.md").read_text()


def test_each_statement_names_a_test_and_each_name_is_one() -> None:
    written = "\n".join(path.read_text() for path in (TOP / "tests").glob("*/test_*.py"))
    known = set(re.findall(r"^def (test_\w+)\(", written, re.MULTILINE))
    named = re.findall(r"`(test_\w+)`", TEXT)
    assert len(named) >= 30
    assert sorted(set(named) - known) == []
    for line in TEXT.partition("## Who can cause")[2].splitlines():
        if line.startswith("| ") and "| test |" not in line:
            assert "`test_" in line, line
