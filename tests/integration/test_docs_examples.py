# SPDX-License-Identifier: Apache-2.0
"""The examples of the documentation, as they are printed there, run against a page and a service below a root."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vmfork
from support.forkservice import ForkService
from support.tools import need, unavailable

AGENT = Path(vmfork.__file__).parents[1]
DOCS = AGENT.parent / "docs"


def examples(document: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / document).read_text(), re.M | re.S)


def run(command: list[str], root: Path) -> str:
    environment = {**os.environ, "VMFORK_ROOT": str(root), "PYTHONPATH": str(AGENT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python_with(module: str) -> str:
    """An interpreter that has a module of Debian's, which this environment need not have."""
    for interpreter in (sys.executable, "/usr/bin/python3"):
        if subprocess.run([interpreter, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0:
            return interpreter
    unavailable(f"{module} is not installed (apt-get install python3-{module})")
    return ""


def test_the_documents_have_examples() -> None:
    assert len(examples("library.md", "python")) >= 7
    assert len(examples("generation-page.md", "c")) == 2
    assert len(examples("generation-page.md", "sh")) == 2


@pytest.mark.parametrize("example", examples("library.md", "python"))
def test_an_example_in_python_runs(example: str, tmp_path: Path) -> None:
    interpreter = python_with("trio") if "import trio" in example else sys.executable
    with ForkService(tmp_path):
        assert "Traceback" not in run([interpreter, "-c", example], tmp_path)


@pytest.mark.parametrize("word", ["select.select", "asyncio.run", "trio.run"])
def test_an_event_loop_of_the_examples_notices_a_fork(word: str, tmp_path: Path) -> None:
    (example,) = (text for text in examples("library.md", "python") if word in text)
    patient = example.replace("0.1", "20").replace("while True:", "for _ in range(1):")
    interpreter = python_with("trio") if "import trio" in example else sys.executable
    environment = {**os.environ, "VMFORK_ROOT": str(tmp_path), "PYTHONPATH": str(AGENT)}
    with (
        ForkService(tmp_path) as service,
        subprocess.Popen([interpreter, "-c", patient], env=environment, stdout=subprocess.PIPE) as process,
    ):
        service.await_subscribers(1)
        service.fork()
        output, _ = process.communicate(timeout=30)
    assert output in (b"forked\n", b"generation 2\n")


def test_the_examples_for_a_shell_print_the_page(tmp_path: Path) -> None:
    generation, token = examples("generation-page.md", "sh")
    with ForkService(tmp_path) as service:
        event = service.fork()
        page = service.paths.generation_page

        def here(text: str) -> list[str]:
            return ["sh", "-euc", text.replace("/run/vmfork/generation", page)]

        assert run(here(generation), tmp_path) == "2\n"
        assert run(here(token), tmp_path) == f"{event.token.hex()} 2\n"


@pytest.mark.parametrize("number", [0, 1])
def test_an_example_in_c_prints_the_generation(number: int, tmp_path: Path) -> None:
    compiler = need("gcc", package="gcc")
    source, program = tmp_path / "example.c", str(tmp_path / "example")
    source.write_text(examples("generation-page.md", "c")[number])
    with ForkService(tmp_path) as service:
        service.fork()
        place = f'-DGENERATION_PAGE="{service.paths.generation_page}"'
        flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{AGENT / 'include'}", place]
        run([compiler, *flags, str(source), "-o", program], tmp_path)
        assert run([program], tmp_path).split()[-1] == "2"
