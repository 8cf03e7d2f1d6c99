# SPDX-License-Identifier: Apache-2.0
"""Shell completion of vmforkctl, in real shells: bash's function with every verb, both shells on a real terminal."""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import subprocess
import time
from pathlib import Path

import pytest

from support.tools import need
from vmfork import cli

TOP = Path(__file__).resolve().parents[2]
BASH = TOP / "completion" / "vmforkctl.bash"
ZSH = TOP / "completion" / "vmforkctl.zsh"


def verbs() -> dict[str, argparse.ArgumentParser]:
    found = next(action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def expected(parser: argparse.ArgumentParser) -> set[str]:
    """What completion should offer for an option: with its value where `=` and one of a few words follow."""
    found = set()
    for action in parser._actions:
        for option in action.option_strings:
            words = [word for word in action.choices or () if word != "help"]
            found |= {f"{option}={word}" for word in words} or {option}
    return found


def bash_offers(*words: str, path: str | None = None) -> list[str]:
    """What bash would offer for the last word."""
    script = f"""
        source {BASH}
        COMP_WORDS=(vmforkctl "$@")
        COMP_CWORD=$#
        _vmforkctl
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    bash = need("bash", package="bash")
    done = subprocess.run(
        [bash, "--norc", "-c", script, "bash", *words],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | ({"PATH": path} if path else {}),
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_offers_every_verb() -> None:
    assert set(bash_offers("")) == set(verbs())


@pytest.mark.parametrize("verb", sorted(verbs()))
def test_bash_offers_every_option_of_the_verb(verb: str) -> None:
    # --version is the outer parser's alone, but harmless to offer.
    assert set(bash_offers(verb, "-")) - {"--version"} == expected(verbs()[verb])


def test_bash_finds_the_verb_behind_options() -> None:
    assert "--template" in bash_offers("--root", "/tmp", "--no-legend", "prepare", "--t")


def test_bash_offers_directories_for_root(tmp_path: Path) -> None:
    (tmp_path / "guest").mkdir()
    (tmp_path / "file").touch()
    assert bash_offers("--root", f"{tmp_path}/") == [f"{tmp_path}/guest"]


def test_bash_asks_vmforkctl_for_actions(tmp_path: Path) -> None:
    stub = tmp_path / "vmforkctl"
    stub.write_text('#!/bin/sh\n[ "$*" = "actions --no-legend" ] && printf "rng  reseed\\nclock  step\\n"\n')
    stub.chmod(0o755)
    assert bash_offers("action", "", path=f"{tmp_path}:/usr/bin:/bin") == ["rng", "clock"]


def test_zsh_knows_every_verb_and_option() -> None:
    text = ZSH.read_text()
    options = set().union(*(option for verb in verbs().values() for option in [expected(verb)]))
    names = {option.partition("=")[0] for option in options}
    assert {verb for verb in verbs() if f"'{verb}:" not in text} == set()
    assert {name for name in names if not re.search(rf"{name}\b", text)} == set()
    assert set(re.findall(r"--[a-z-]+[a-z]", text)) - names == {"--version"}


def on_a_terminal(argv: list[str], setup: str, typed: str, wanted: str) -> str:
    """What a terminal shows after this was typed into an interactive shell, at the latest after ten seconds."""
    pid, fd = pty.fork()
    if pid == 0:
        os.environ.update(TERM="dumb", PS1="READY> ", PROMPT="READY> ", LC_ALL="C.UTF-8")
        os.execvp(argv[0], argv)
    shown = ""
    try:
        for send, until in ((setup, "loaded-42"), (typed, wanted)):
            shown = ""
            os.write(fd, send.encode())
            deadline = time.monotonic() + 10
            while until not in shown and time.monotonic() < deadline:
                if select.select([fd], [], [], 0.1)[0]:
                    shown += os.read(fd, 4096).decode(errors="replace")
    finally:
        os.close(fd)
        os.waitpid(pid, 0)
    return shown


def test_bash_completes_on_a_terminal() -> None:
    bash = need("bash", package="bash")
    shown = on_a_terminal(
        [bash, "--norc", "--noprofile", "-i"], f"source {BASH}; echo loaded-$((6*7))\n", "vmforkctl doc\t", "doctor"
    )
    assert "vmforkctl doctor" in shown


def test_zsh_completes_verbs_and_values_on_a_terminal(tmp_path: Path) -> None:
    zsh = need("zsh", package="zsh")
    (tmp_path / "_vmforkctl").write_bytes(ZSH.read_bytes())
    setup = f"fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -u -D; echo loaded-$((6*7))\n"
    typed = "vmforkctl trig\t--identity=rot\t"
    shown = on_a_terminal([zsh, "-f", "-i"], setup, typed, "--identity=rotate")
    assert "trigger" in shown
    assert "--identity=rotate" in shown
