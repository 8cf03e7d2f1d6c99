# SPDX-License-Identifier: Apache-2.0
"""The manual says what the programs do: every verb, option, setting and hook, and nothing that does not exist."""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

import pytest

import vmfork
from support.tools import need
from vmfork import cli, settings
from vmfork.daemon import __main__ as daemon

TOP = Path(__file__).resolve().parents[2]
MANUAL = TOP / "docs" / "man"
PAGES = sorted(path.stem for path in MANUAL.glob("*.rst"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every page as a reader sees it, without its line breaks."""
    target = tmp_path_factory.mktemp("man")
    # The distribution's Python: the packages are built with it, and it has docutils.
    built = subprocess.run(
        ["/usr/bin/python3", str(MANUAL / "build.py"), str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if "No module named 'docutils'" in built.stdout:
        need("rst2man", package="python3-docutils")
    assert built.returncode == 0, built.stdout
    man = need("man", package="man-db")
    shown = {}
    for page in target.iterdir():
        done = subprocess.run(
            [man, "--warnings", "-E", "UTF-8", "-l", str(page)],
            capture_output=True,
            text=True,
            env={"MANWIDTH": "2000", "LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin", "MAN_KEEP_FORMATTING": ""},
            check=True,
        )
        assert done.stderr == "", page.name
        shown[page.name] = done.stdout
    return shown


def section(page: str, title: str) -> str:
    """The text below a heading, to the next one."""
    found = re.search(rf"^{title}\n(.*?)(?=^\S|\Z)", page, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def terms(text: str) -> list[str]:
    """The terms of a section's definition lists: lines with the smallest indentation of all."""
    return re.findall(r"^ {7}(\S.*)$", text, re.MULTILINE)


def option_strings(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def verbs() -> dict[str, argparse.ArgumentParser]:
    found = next(action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def documented_options(text: str) -> dict[str, str]:
    """Option to its description."""
    found = {}
    for line in terms(text):
        if line.startswith("-"):
            head, _, rest = line.partition("  ")
            following = text[text.index(line) + len(line) :].lstrip("\n")
            body = rest.strip() or following.partition("\n")[0].strip()
            for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", head):
                found[option] = body
    return found


def test_there_is_a_page_for_everything() -> None:
    assert PAGES == ["vmfork-hooks.7", "vmfork.3", "vmfork.conf.5", "vmforkctl.1", "vmforkd.8"]


@pytest.mark.parametrize("name", PAGES)
def test_page_is_of_this_version(pages: dict[str, str], name: str) -> None:
    assert f"vmfork {vmfork.__version__}" in pages[name]


@pytest.mark.parametrize("name", PAGES)
def test_references_between_pages_lead_somewhere(pages: dict[str, str], name: str) -> None:
    referred = {f"{page}.{number}" for page, number in re.findall(r"\b(vmfork[\w.-]*)\((\d)\)", pages[name])}
    assert referred <= set(PAGES)


def test_every_verb_of_vmforkctl_is_documented_and_none_is_invented(pages: dict[str, str]) -> None:
    described = {term.split()[0] for term in terms(section(pages["vmforkctl.1"], "VERBS"))}
    assert described == set(verbs())


def test_every_option_of_vmforkctl_is_documented_and_none_is_invented(pages: dict[str, str]) -> None:
    existing = option_strings(cli.parser()).union(*(option_strings(verb) for verb in verbs().values()))
    assert documented_options(section(pages["vmforkctl.1"], "OPTIONS")).keys() == existing


def test_options_of_single_verbs_are_documented_for_these_verbs(pages: dict[str, str]) -> None:
    common = option_strings(cli.parser())
    existing: dict[str, set[str]] = {}
    for name, parser in verbs().items():
        for option in option_strings(parser) - common:
            existing.setdefault(option, set()).add(name)
    described = {
        option: set(body.removeprefix("For ").partition(":")[0].split(", "))
        for option, body in documented_options(section(pages["vmforkctl.1"], "OPTIONS")).items()
        if body.startswith("For ")
    }
    assert described == existing


def test_every_exit_code_is_documented(pages: dict[str, str]) -> None:
    described = {term.split()[0] for term in terms(section(pages["vmforkctl.1"], "EXIT STATUS")) if term[0].isdigit()}
    codes = {value for name, value in vars(cli).items() if name.startswith("EXIT_")}
    assert described == {"0", *map(str, codes)}


def test_every_option_of_vmforkd_is_documented_and_none_is_invented(pages: dict[str, str]) -> None:
    assert documented_options(section(pages["vmforkd.8"], "OPTIONS")).keys() == option_strings(daemon.parser())


def test_every_setting_is_documented(pages: dict[str, str]) -> None:
    page = pages["vmfork.conf.5"]
    for setting in (*settings.GENERAL, settings.HOOK_ENABLE, settings.HOOK_TIMEOUT_SEC, *settings.HOOK_OWN):
        assert f"[{setting.section}]" in page or setting.section == "Hook", setting
        assert re.search(rf"^ +{setting.key}=", page, re.MULTILINE), setting


def test_every_shipped_hook_is_documented_and_none_is_invented(pages: dict[str, str]) -> None:
    shipped = {path.name for path in (TOP / "hooks.d").iterdir() if path.name[0].isdigit()}
    described = set(re.findall(r"\b\d\d-[a-z-]+", section(pages["vmfork-hooks.7"], "SHIPPED HOOKS")))
    assert described == shipped


def test_every_name_of_the_library_is_documented_and_none_is_invented(pages: dict[str, str]) -> None:
    page = pages["vmfork.3"]
    calls = [line for line in terms(section(page, "DESCRIPTION")) if re.match(r"[A-Za-z_]+\(", line)]
    described = {name for line in calls for name in re.findall(r"([A-Za-z_]+)\(", line)}
    described |= {term.split()[0] for term in terms(section(page, "ERRORS"))}
    assert len(described) >= 10
    missing = {name for name in vmfork.__all__ if not re.search(rf"\b{name}\b", page)}
    assert missing == set()
    assert {name for name in described if not hasattr(vmfork, name)} == set()
