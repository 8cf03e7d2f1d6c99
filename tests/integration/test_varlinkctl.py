# SPDX-License-Identifier: Apache-2.0
"""The varlink server, as a process of its own, seen by the reference client: systemd's varlinkctl."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from support import varlinkctl
from support.varlinkservice import STATUS
from vmfork.varlink import interface
from vmfork.varlink.client import Client

DEADLINE = 30


@pytest.fixture(scope="module")
def tool() -> list[str]:
    return varlinkctl.command()


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "io.vmfork")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen(
        [sys.executable, "-m", "support.varlinkservice", path], stdout=subprocess.PIPE, env=environment
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield path
        assert server.poll() is None, "the server died"
    finally:
        server.terminate()
        server.communicate(timeout=DEADLINE)


def run(tool: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*tool, "--no-pager", *arguments], capture_output=True, text=True, timeout=DEADLINE, check=False
    )


def line_of(stream: IO[bytes], buffer: bytearray) -> bytes:
    """The next line that a running program prints."""
    deadline = time.monotonic() + DEADLINE
    while b"\n" not in buffer:
        left = deadline - time.monotonic()
        assert left > 0, f"only {bytes(buffer)!r} was printed"
        if select.select([stream], [], [], left)[0]:
            data = os.read(stream.fileno(), 65536)
            assert data, f"ended after {bytes(buffer)!r}"
            buffer += data
    line, _, rest = bytes(buffer).partition(b"\n")
    buffer[:] = rest
    return line


def test_info_shows_product_and_interfaces(tool: list[str], address: str) -> None:
    done = run(tool, "info", "--json=short", address)
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["vendor"] == "vmfork"
    assert info["version"] == "1.2.3"
    assert sorted(info["interfaces"]) == ["io.vmfork", "org.varlink.service"]


@pytest.mark.parametrize("name", ["io.vmfork", "org.varlink.service"])
def test_introspect_understands_the_whole_interface(tool: list[str], address: str, name: str) -> None:
    done = run(tool, "introspect", address, name)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    declared = interface.load(name)
    for keyword, names in (("method", declared.methods), ("type", declared.types), ("error", declared.errors)):
        for item in names:
            assert f"{keyword} {item}" in done.stdout


def test_interface_file_passes_validation(tool: list[str]) -> None:
    path = os.path.join(os.path.dirname(interface.__file__), "io.vmfork.varlink")
    done = run(tool, "validate-idl", path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_list_methods_names_them_all(tool: list[str], address: str) -> None:
    done = run(tool, "list-methods", address, "io.vmfork")
    assert done.returncode == 0, done.stderr
    expected = {f"io.vmfork.{name}" for name in interface.load("io.vmfork").methods}
    assert set(done.stdout.split()) == expected


def test_call_prints_the_reply(tool: list[str], address: str) -> None:
    done = run(tool, "call", "--json=short", address, "io.vmfork.GetStatus", "{}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"status": STATUS}


def test_call_with_long_reply_prints_all_of_it(tool: list[str], address: str) -> None:
    done = run(tool, "call", "--json=short", address, "io.vmfork.ListForks", '{"limit":1000}')
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["forks"]) == 1000


@pytest.mark.parametrize(
    ("method", "parameters", "error"),
    [
        ("io.vmfork.ListForks", '{"limit":"x"}', "org.varlink.service.InvalidParameter"),
        ("io.vmfork.GetStatus", '{"x":1}', "org.varlink.service.InvalidParameter"),
        ("io.vmfork.Nothing", "{}", "org.varlink.service.MethodNotFound"),
        ("com.example.Nothing", "{}", "org.varlink.service.InterfaceNotFound"),
        ("io.vmfork.Subscribe", "{}", "org.varlink.service.ExpectedMore"),
        ("io.vmfork.Reload", "{}", "io.vmfork.PermissionDenied"),
    ],
)
def test_call_that_fails_names_the_error(
    tool: list[str], address: str, method: str, parameters: str, error: str
) -> None:
    done = run(tool, "call", "--json=short", address, method, parameters)
    assert done.returncode != 0
    assert error in done.stdout + done.stderr


def test_call_more_prints_each_notice_as_it_happens(tool: list[str], address: str) -> None:
    arguments = ["call", "--more", "--json=short", address, "io.vmfork.Subscribe", '{"track":true,"after":1}']
    with subprocess.Popen([*tool, "--no-pager", *arguments], stdout=subprocess.PIPE) as watching:
        assert watching.stdout is not None
        buffer = bytearray()
        # --json=short marks records with RS (RFC 7464) in a stream.
        hello = json.loads(line_of(watching.stdout, buffer).lstrip(b"\x1e"))
        assert (hello["notice"], hello["generation"]) == ("hello", 7)
        with Client.connect(address) as trigger:
            for generation in (8, 9):
                trigger.call("io.vmfork.Trigger")
                notice = json.loads(line_of(watching.stdout, buffer).lstrip(b"\x1e"))
                assert (notice["notice"], notice["generation"]) == ("fork", generation)
                assert notice["event"]["generation"] == generation
        watching.terminate()


def test_call_oneway_is_carried_out(tool: list[str], address: str) -> None:
    done = run(tool, "call", "--oneway", address, "io.vmfork.Acknowledge", '{"generation":7}')
    assert done.returncode == 0, done.stderr
