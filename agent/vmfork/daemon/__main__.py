# SPDX-License-Identifier: Apache-2.0
"""`python3 -m vmfork.daemon`: the command line of vmforkd(8)."""

from __future__ import annotations

import logging
import os
import sys

from vmfork import __version__, sysd
from vmfork.annotations import TYPE_CHECKING
from vmfork.errors import InputError, Unavailable, VmforkError
from vmfork.page import DETECTION_NONE, PageWriter, read_page
from vmfork.paths import Paths

if TYPE_CHECKING:
    import argparse

log = logging.getLogger("vmfork.daemon")


class Options:
    """What a start without any option means."""

    root: str | None = None
    verbose = False
    boot = False
    nobody_watches = False


def parser() -> argparse.ArgumentParser:
    """The options; vmforkd(8) is held against them by a test."""
    import argparse

    found = argparse.ArgumentParser(
        prog="vmforkd", description="Notices that this virtual machine was forked, publishes it, starts the reaction."
    )
    found.add_argument("--root", metavar="DIR", default=None, help="read and write every path below DIR")
    found.add_argument("--verbose", action="store_true", help="log more")
    mode = found.add_mutually_exclusive_group()
    mode.add_argument("--boot", action="store_true", help="decide about a cold fork, edit files, and end")
    mode.add_argument("--nobody-watches", action="store_true", help="say on the page that no daemon runs, and end")
    found.add_argument("--version", action="version", version=f"vmforkd {__version__}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run vmforkd; 0 when told to stop, 1 where it cannot work, 2 for a wrong command line."""
    given = sys.argv[1:] if arguments is None else arguments
    # The unit gives none: 0.6 MiB less in a daemon that is idle for months.
    options = parser().parse_args(given, Options()) if given else Options()
    paths = Paths.from_environment() if options.root is None else Paths(options.root)
    sysd.set_up_logging("vmfork-boot" if options.boot else "vmforkd", verbose=options.verbose)
    os.umask(0o022)
    try:
        if options.nobody_watches:
            _say_that_nobody_watches(paths)
        else:
            from vmfork.daemon import coredumps
            from vmfork.daemon.agent import Vmforkd

            coredumps.forbid()
            Vmforkd(paths, early=options.boot).run()
    except VmforkError as error:
        log.error("%s", error)
        if error.hint:
            log.error("hint: %s", error.hint)
        return 1
    except OSError as error:
        log.error("%s: %s", error.filename or "vmforkd", error.strerror)
        return 1
    return 0


def _say_that_nobody_watches(paths: Paths) -> None:
    """For ExecStopPost=, which also runs after the daemon was killed."""
    try:
        read_page(paths.generation_page)
    except Unavailable:
        return
    except InputError as error:
        log.warning("%s", error)
    with PageWriter(paths.generation_page) as page:
        page.set_detection(DETECTION_NONE)
    from vmfork.daemon.metrics import nobody_watches

    nobody_watches(paths)


if __name__ == "__main__":
    sys.exit(main())
