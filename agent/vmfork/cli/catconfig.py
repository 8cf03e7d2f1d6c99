# SPDX-License-Identifier: Apache-2.0
"""`vmforkctl cat-config`: every setting that holds, and the file and line it came from."""

from __future__ import annotations

import argparse
import sys

from vmfork import config, settings
from vmfork.cli import EXIT_FAILED
from vmfork.cli.output import print_json, wants_json
from vmfork.jsonfields import JsonObject
from vmfork.paths import Paths


def show(options: argparse.Namespace) -> int:
    """Print the configuration as a file that could be read again; 1 where something in it is broken."""
    loaded = config.load(Paths.from_environment())
    rows = _rows(loaded)
    if wants_json(options):
        print_json(options, rows)
    else:
        _print(options, rows)
    for problem in loaded.problems:
        print(f"vmforkctl: {problem}", file=sys.stderr)
    return EXIT_FAILED if loaded.problems else 0


def _rows(loaded: config.Config) -> list[JsonObject]:
    known = [(row.section, row.key, row.default) for row in (*settings.GENERAL, *settings.HOOK_OWN)]
    names = {(section, key) for section, key, _ in known}
    known += [(section, key, "") for section, key in sorted(loaded.assignments) if (section, key) not in names]
    found: list[JsonObject] = []
    for section, key, default in known:
        assignment = loaded.assignments.get((section, key))
        found.append(
            {
                "section": section,
                "key": key,
                "value": default if assignment is None else assignment.value,
                "origin": None if assignment is None else assignment.place,
            }
        )
    return found


def _print(options: argparse.Namespace, rows: list[JsonObject]) -> None:
    for section in dict.fromkeys(str(row["section"]) for row in rows):
        print(f"[{section}]")
        for row in rows:
            if row["section"] == section:
                remark = "" if options.no_legend else f"# {row['origin'] or 'default'}\n"
                print(f"{remark}{row['key']}={row['value']}")
        print()
