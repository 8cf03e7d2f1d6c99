#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Makes the manual pages: `build.py DIRECTORY` turns every *.rst beside it into a page there.

The list of settings in vmfork.conf(5) is made from vmfork.settings, so that it can neither lack one nor invent one.
Needs docutils, and no installed vmfork.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "agent"))

from vmfork import __version__, settings  # noqa: E402


def definitions(rows: Iterable[settings.Setting[Any]]) -> Iterator[str]:
    """One reST definition per setting."""
    for row in rows:
        default = f"Default: ``{row.default}``." if row.default else "No default."
        yield f"``{row.key}=``\n    {row.summary} {default}\n"


def general_settings() -> str:
    """The sections [Detect], [Publish] and [React]."""
    parts = []
    for section in dict.fromkeys(row.section for row in settings.GENERAL):
        title = f"[{section}]"
        parts += [title, "-" * len(title), ""]
        parts += definitions(row for row in settings.GENERAL if row.section == section)
    return "\n".join(parts)


def hook_settings() -> str:
    """What holds for every hook, then the keys of the shipped ones."""
    parts = list(definitions((settings.HOOK_ENABLE, settings.HOOK_TIMEOUT_SEC)))
    for section in dict.fromkeys(row.section for row in settings.HOOK_OWN):
        title = f"[{section}]"
        parts += ["", title, "-" * len(title), ""]
        parts += definitions(row for row in settings.HOOK_OWN if row.section == section)
    return "\n".join(parts)


def source(path: Path) -> str:
    """The reST text of a page, complete."""
    text = path.read_text(encoding="utf-8")
    text = text.replace("@GENERAL_SETTINGS@", general_settings()).replace("@HOOK_SETTINGS@", hook_settings())
    return text.replace("@VERSION@", __version__)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: build.py DIRECTORY", file=sys.stderr)
        return 2
    from docutils.core import publish_string  # type: ignore[import-untyped]

    target = Path(arguments[0])
    target.mkdir(parents=True, exist_ok=True)
    # halt_level: a page with markup that is not understood is not built at all.
    overrides = {"halt_level": 2, "input_encoding": "unicode", "output_encoding": "unicode", "_disable_config": True}
    for path in sorted(HERE.glob("*.rst")):
        page = publish_string(source(path), source_path=str(path), writer_name="manpage", settings_overrides=overrides)
        (target / path.stem).write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
