# SPDX-License-Identifier: Apache-2.0
"""vmforkctl: the command line, its verbs and their exit codes. Each verb's code is imported when it is called.

Exit codes: 0 fine, 1 failed, 2 usage, 3 daemon not running, 4 this guest cannot notice a fork, 124 wait timed out.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

from vmfork import __version__
from vmfork.errors import DaemonUnreachable, VmforkError

EXIT_FAILED, EXIT_USAGE, EXIT_NO_DAEMON, EXIT_CANNOT_NOTICE, EXIT_TIMEOUT = 1, 2, 3, 4, 124


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """One verb: its one-line help, the module and function that do it, its own arguments."""

    name: str
    summary: str
    module: str
    function: str
    arguments: Callable[[argparse.ArgumentParser], None] = lambda _parser: None
    dry_run: bool = False


def _list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--lines", type=_count, metavar="N", help="show only the newest N forks")


def _identity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--identity", choices=("auto", "rotate", "keep"), default="auto", help="identity policy")


def _trigger(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reason", metavar="TEXT", help="why; it goes to the log")
    _identity(parser)


def _prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--template", action="store_true", help="every fork from now on is a clone of a template")
    parser.add_argument("--deadline", type=_count, metavar="S", help="undo it by itself after S seconds (300)")


def _wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--settled", action="store_true", help="wait until the reaction to that fork has settled")
    parser.add_argument("--after", type=_count, metavar="N", help="a generation noted before; default: the present one")
    parser.add_argument("--timeout", type=_seconds, metavar="S", help="give up after S seconds with exit code 124")


def _action(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="as `vmforkctl actions` lists it")
    phases = ("after-fork", "before-snapshot", "after-snapshot")
    parser.add_argument("phase", nargs="?", choices=phases, default="after-fork", help="default: after-fork")


def _react(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parent", type=_count, metavar="PID", help="end with this process (for vmforkd)")


VERBS = (
    Verb(name="status", summary="what this guest knows of its forks (default)", module="status", function="status"),
    Verb(name="list", summary="the forks so far, newest last", module="status", function="forks", arguments=_list),
    Verb(name="doctor", summary="can a fork be noticed here, and what would help", module="doctor", function="doctor"),
    Verb(name="sources", summary="edges and truths, live or not, and why", module="status", function="sources"),
    Verb(name="hooks", summary="the hooks, and why some will not run", module="hooks", function="hooks"),
    Verb(name="plan", summary="what a fork would run now", module="hooks", function="plan", arguments=_identity),
    Verb(name="actions", summary="the package's own repairs", module="hooks", function="actions"),
    Verb(
        name="action",
        summary="run one repair by hand",
        module="hooks",
        function="action",
        arguments=_action,
        dry_run=True,
    ),
    Verb(
        name="react",
        summary="run the hooks for the newest fork",
        module="hooks",
        function="react",
        arguments=_react,
        dry_run=True,
    ),
    Verb(name="rotate", summary="give this guest a new identity now", module="steer", function="rotate", dry_run=True),
    Verb(
        name="trigger",
        summary="act as if this guest was forked",
        module="steer",
        function="trigger",
        arguments=_trigger,
        dry_run=True,
    ),
    Verb(
        name="prepare",
        summary="get ready for a snapshot",
        module="steer",
        function="prepare",
        arguments=_prepare,
        dry_run=True,
    ),
    Verb(name="resume", summary="the snapshot was taken, go on", module="steer", function="resume", dry_run=True),
    Verb(name="wait", summary="wait for a fork", module="wait", function="wait", arguments=_wait),
    Verb(name="cat-config", summary="the configuration, and where it came from", module="catconfig", function="show"),
    Verb(name="reload", summary="read the configuration again", module="steer", function="reload"),
)


def _count(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else -1
    if not 0 <= value < 2**64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def _add_common(parser: argparse.ArgumentParser, *, defaults: bool) -> None:
    """Options that may stand before or after the verb; only the outer parser has defaults, or it would undo them."""

    def default(value: object) -> object:
        return value if defaults else argparse.SUPPRESS

    off = default(value=False)
    parser.add_argument("--root", metavar="DIR", default=default(None), help="read and write every path below DIR")
    parser.add_argument(
        "--json", choices=("pretty", "short", "off", "help"), default=default("off"), help="print JSON: --json=pretty"
    )
    parser.add_argument(
        "-j", dest="json", action="store_const", const="auto", default=default("off"), help="JSON, pretty on a terminal"
    )
    parser.add_argument("--no-pager", action="store_true", default=off, help="accepted; there is no pager")
    parser.add_argument("--no-legend", action="store_true", default=off, help="no headings, no remarks")
    parser.add_argument("-q", "--quiet", action="store_true", default=off, help="say only what failed")


def parser() -> argparse.ArgumentParser:
    """The whole command line; manual and completion are held against it by tests."""
    found = argparse.ArgumentParser(
        prog="vmforkctl",
        description="Ask and steer vmforkd, which notices that this virtual machine was forked.",
        epilog="Exit codes: 0 fine, 1 failed, 2 usage, 3 daemon not running, 4 cannot notice a fork, 124 timed out.",
        allow_abbrev=False,
    )
    _add_common(found, defaults=True)
    found.add_argument("--version", action="version", version=f"vmforkctl {__version__}")
    found.set_defaults(verb="status", dry_run=False)
    verbs = found.add_subparsers(metavar="VERB", dest="verb_given")
    for verb in VERBS:
        sub = verbs.add_parser(verb.name, help=verb.summary, description=verb.summary, allow_abbrev=False)
        _add_common(sub, defaults=False)
        if verb.dry_run:
            sub.add_argument("--dry-run", action="store_true", default=argparse.SUPPRESS, help="change nothing")
        verb.arguments(sub)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return its exit code; no traceback ever reaches a person."""
    _open_standard_streams()
    options = parser().parse_args(arguments)
    if options.json == "help":
        print("pretty\nshort\noff")
        return 0
    if options.root is not None:
        os.environ["VMFORK_ROOT"] = os.path.abspath(options.root)
    verb = next(one for one in VERBS if one.name == (options.verb_given or options.verb))
    try:
        run: Callable[[argparse.Namespace], int] = getattr(
            importlib.import_module(f"vmfork.cli.{verb.module}"), verb.function
        )
        code = run(options)
        sys.stdout.flush()
        return code
    except DaemonUnreachable as error:
        return _fail(error, EXIT_NO_DAEMON)
    except VmforkError as error:
        return _fail(error, EXIT_FAILED)
    except BrokenPipeError:
        _drop_output()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        print(f"vmforkctl: {error.filename or verb.name}: {error.strerror}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        return EXIT_FAILED


def _open_standard_streams() -> None:
    """With one of them closed, the next file or socket would take its place and get what is printed."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # Python leaves out a stream that was closed, whatever the type checker believes.
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for descriptor, (name, stream) in enumerate(streams.items(), start=1):
        if stream is None:
            setattr(sys, name, os.fdopen(descriptor, "w", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files need not be text of this locale.
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Nobody takes what is left to print; the interpreter must not complain about that at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _fail(error: VmforkError, code: int) -> int:
    print(f"vmforkctl: {error}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    return code
