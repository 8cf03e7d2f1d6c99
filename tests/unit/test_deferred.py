# SPDX-License-Identifier: Apache-2.0
"""What is spared in an idle daemon is there for whoever asks for it."""

from __future__ import annotations

import subprocess
import sys

from support.runningdaemon import environment

# Where a class of the detector has no docstring, dataclasses makes one, by inspect.
_DETECTOR = "import sys; import vmfork.daemon.__main__, vmfork.daemon.agent, vmfork.daemon.service; "


def said(code: str) -> str:
    """What a fresh interpreter prints; this one has imported everything."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {environment()['PYTHONPATH']!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.strip()


def test_the_detector_does_without_the_modules_that_only_tools_need() -> None:
    assert said(_DETECTOR + "print({'typing', 'ast', 'dis', 'argparse', 'subprocess'} & set(sys.modules))") == "set()"


def test_the_reactor_does_without_the_modules_that_only_tools_need() -> None:
    code = "from vmfork.deferred import defer; defer('inspect'); import vmfork.cli, vmfork.reactor.session; "
    assert said(code + "print({'typing', 'ast', 'dis', 'subprocess'} & set(sys.modules))") == "set()"


def test_a_deferred_module_is_whole_when_it_is_used() -> None:
    assert said(_DETECTOR + "import inspect; print(inspect.signature(lambda a, *, b=1: a))") == "(a, *, b=1)"
    assert said(_DETECTOR + "from inspect import getdoc; print(getdoc(getdoc) is not None)") == "True"


def test_a_deferred_module_is_loaded_once() -> None:
    code = "import inspect; was = inspect.Signature; import inspect; print(inspect.Signature is was)"
    assert said(_DETECTOR + code) == "True"


def test_what_a_deferred_module_does_not_have_is_an_attribute_error() -> None:
    code = """
try:
    inspect.nothing
except AttributeError as error:
    print(error)
"""
    assert said("from vmfork.deferred import defer; defer('inspect'); import inspect" + code) == (
        "module 'inspect' has no attribute 'nothing'"
    )


def test_what_is_loaded_already_is_left_alone() -> None:
    code = "import inspect; before = inspect; from vmfork.deferred import defer; defer('inspect'); "
    assert said(code + "print(sys.modules['inspect'] is before)") == "True"
