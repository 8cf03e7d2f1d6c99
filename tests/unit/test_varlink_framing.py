# SPDX-License-Identifier: Apache-2.0
"""Varlink's framing against bytes in any pieces, too many bytes, and bytes that mean nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.tools import unavailable
from vmfork.errors import InputError, ProtocolError
from vmfork.jsonfields import JsonObject
from vmfork.varlink import framing, interface
from vmfork.varlink.framing import Decoder
from vmfork.varlink.listreply import ListReply

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def make_decoder(limit: int = 1000) -> Decoder:
    return Decoder(limit=limit, place="a peer")


@settings(max_examples=100, deadline=None)
@given(
    messages=st.lists(st.dictionaries(st.text(max_size=6), json_values, max_size=4), max_size=5), size=st.integers(1, 9)
)
def test_messages_survive_any_cutting(messages: list[JsonObject], size: int) -> None:
    stream = b"".join(framing.encode(message) for message in messages)
    decoder = make_decoder(limit=100_000)
    found = []
    for start in range(0, len(stream), size):
        decoder.feed(stream[start : start + size])
        while (message := decoder.take()) is not None:
            found.append(message)
    assert found == messages


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_garbage_is_a_message_or_a_protocol_error(data: bytes) -> None:
    decoder = make_decoder(limit=100)
    with contextlib.suppress(ProtocolError):
        decoder.feed(data)
        while decoder.take() is not None:
            pass


def test_half_a_message_is_none_yet() -> None:
    decoder = make_decoder()
    decoder.feed(b'{"method"')
    assert decoder.take() is None
    assert not decoder.has_message


def test_several_messages_at_once_are_taken_in_order() -> None:
    decoder = make_decoder()
    decoder.feed(b'{"a":1}\0{"a":2}\0{"a"')
    assert [decoder.take(), decoder.take(), decoder.take()] == [{"a": 1}, {"a": 2}, None]


def test_message_of_exactly_the_limit_is_taken() -> None:
    message = b'{"a":"' + b"x" * 92 + b'"}'
    decoder = make_decoder(limit=len(message))
    decoder.feed(message + b"\0")
    assert decoder.take() is not None


def test_message_that_never_ends_is_refused_at_the_limit() -> None:
    decoder = make_decoder(limit=100)
    decoder.feed(b"x" * 100)
    with pytest.raises(ProtocolError, match=r"a peer: .*longer than 100 bytes"):
        decoder.feed(b"x")


def test_complete_message_above_the_limit_is_refused() -> None:
    decoder = make_decoder(limit=100)
    with pytest.raises(ProtocolError, match="longer than 100 bytes"):
        decoder.feed(b"{}" + b" " * 99 + b"\0")


def test_second_message_above_the_limit_is_refused_when_its_turn_comes() -> None:
    decoder = make_decoder(limit=10)
    decoder.feed(b"{}\0" + b"{}" + b" " * 9 + b"\0")
    assert decoder.take() == {}
    with pytest.raises(ProtocolError, match="longer than 10 bytes"):
        decoder.take()


@pytest.mark.parametrize(
    "message",
    [b"", b"nonsense", b"[]", b'"text"', b"1", b"\xff\xfe", b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":1', b"{}{}"],
)
def test_what_is_no_json_object_is_refused(message: bytes) -> None:
    with pytest.raises(ProtocolError, match="a peer"):
        framing.decode(message, "a peer")


def test_utf16_is_refused_though_json_libraries_guess_it() -> None:
    with pytest.raises(ProtocolError, match="not JSON"):
        framing.decode('{"a":1}'.encode("utf-16-le"), "a peer")


def test_number_with_endless_digits_is_refused() -> None:
    with pytest.raises(ProtocolError, match="not JSON"):
        framing.decode(b'{"a":' + b"9" * 60_000 + b"}", "a peer")


@pytest.mark.parametrize("levels", [31, 32])
def test_depth_up_to_the_limit_is_taken(levels: int) -> None:
    message = b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"
    assert "a" in framing.decode(message, "a peer")


@pytest.mark.parametrize("levels", [33, 500, 30_000])
def test_depth_beyond_the_limit_is_refused(levels: int) -> None:
    message = b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"
    with pytest.raises(ProtocolError):
        framing.decode(message, "a peer")


def test_wide_message_is_not_deep() -> None:
    assert len(framing.decode(json.dumps({"a": [[]] * 1000}).encode(), "a peer")) == 1


def test_brackets_in_a_string_are_not_depth() -> None:
    assert framing.decode(b'{"a":"' + b"[" * 1000 + b'"}', "a peer") == {"a": "[" * 1000}


def test_output_is_ascii_without_inner_nul() -> None:
    message = framing.encode({"a": "\0\ud800ü"})
    assert message.isascii()
    assert message.index(0) == len(message) - 1


def test_interface_file_declares_what_the_contract_names() -> None:
    declared = interface.load(interface.VMFORK)
    assert {"GetStatus", "Subscribe", "Acknowledge", "ListForks", "Trigger", "Reload", "Prepare", "Resume"} <= set(
        declared.methods
    )
    assert declared.methods["Subscribe"].parameters["after"] == interface.Type(name="int", optional=True)


@pytest.mark.parametrize(
    ("values", "misfit"),
    [
        ({"generation": 1}, None),
        ({"generation": 2**64 - 1, "snapshot": None}, None),
        ({"generation": 2**64}, "generation"),
        ({"generation": True}, "generation"),
        ({"generation": "1"}, "generation"),
        ({}, "generation"),
        ({"generation": 1, "snapshot": 1.5}, "snapshot"),
        ({"generation": 1, "colour": 3}, "colour"),
    ],
)
def test_parameters_that_do_not_fit_are_named(values: JsonObject, misfit: str | None) -> None:
    declared = interface.load(interface.VMFORK)
    assert declared.misfit(declared.methods["Acknowledge"].parameters, values) == misfit


def test_nested_structures_are_checked() -> None:
    text = "interface a.b\ntype P (x: ?int, of: [string]bool)\nmethod M(all: []P, o: object, f: float) -> ()"
    declared = interface.parse(text, "here")
    parameters = declared.methods["M"].parameters
    assert declared.misfit(parameters, {"all": [{"x": 1, "of": {"k": True}}], "o": {}, "f": 1}) is None
    assert declared.misfit(parameters, {"all": [{"x": 1, "of": {"k": 1}}], "o": {}, "f": 1}) == "all"
    assert declared.misfit(parameters, {"all": [], "o": [], "f": 1}) == "o"
    assert declared.misfit(parameters, {"all": [], "o": {}, "f": "1"}) == "f"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "interface",
        "method M() -> ()",
        "interface a.b\nmethod M(",
        "interface a.b\nmethod M(a: ) -> ()",
        "interface a.b\nmethod M(a: Unknown) -> ()",
        "interface a.b\nmethod M(a: []Unknown) -> ()",
        "interface a.b\nmethod M() -> () ;",
        "interface a.b\nmethod M() ()",
        "interface a.b\nverb M()",
        "interface a.b\ntype T (a: int b: int)",
    ],
)
def test_broken_interface_text_is_an_error_that_names_the_file(text: str) -> None:
    with pytest.raises(InputError, match="the file: "):
        interface.parse(text, "the file")


def test_interface_without_a_file_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"no\.such\.varlink"):
        interface.load("no.such")


@given(st.lists(st.dictionaries(st.text(max_size=4), json_values, max_size=3), max_size=20))
def test_a_list_written_from_its_end_is_an_ordinary_reply(items: list[JsonObject]) -> None:
    reply = ListReply("forks", capacity=1 << 16)
    for item in reversed(items):
        assert reply.prepend(item)
    assert bytes(reply.message()) == framing.encode_reply({"forks": list(items)})


def test_a_full_list_takes_no_more_and_is_still_a_reply() -> None:
    reply = ListReply("forks", capacity=4096)
    taken = 0
    while reply.prepend({"generation": taken}):
        taken += 1
    decoder = make_decoder(4096)
    decoder.feed(bytes(reply.message()))
    assert decoder.take() == {"parameters": {"forks": [{"generation": n} for n in reversed(range(taken))]}}


def test_a_list_takes_no_huge_pages() -> None:
    if not os.path.exists("/sys/kernel/mm/transparent_hugepage"):
        unavailable("the kernel has no transparent huge pages")
    reply = ListReply("forks", capacity=1 << 26)
    # Each mapping with its size in KiB and its flags: "nh" is MADV_NOHUGEPAGE (proc_pid_smaps(5)).
    smaps = Path("/proc/self/smaps").read_text()
    found = re.findall(r"^Size: +(\d+) kB$.*?^VmFlags: ([^\n]*)$", smaps, re.MULTILINE | re.DOTALL)
    assert any(int(size) >= 1 << 16 and "nh" in flags.split() for size, flags in found)
    reply.message()
