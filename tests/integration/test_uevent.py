# SPDX-License-Identifier: Apache-2.0
"""The uevent edge with the kernel's own broadcast, in a network namespace of the test (Linux 4.18 or newer)."""

from __future__ import annotations

import ctypes.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.runningdaemon import environment
from support.tools import need, need_root
from vmfork.edges.uevent import announces_fork, announces_source, kernel_sends_it

DRIVER = """
import json, os, select, socket, struct, sys
from vmfork.edges.uevent import Uevent

# root may have the kernel broadcast a uevent in its own network namespace: NETLINK_KOBJECT_UEVENT to port 0.
def inject(**properties):
    path = properties["DEVPATH"]
    body = b"%s@%s\\0" % (properties["ACTION"].encode(), path.encode())
    broadcast(body + b"".join(b"%s=%s\\0" % (key.encode(), value.encode()) for key, value in properties.items()))

def broadcast(body):
    header = struct.pack("=IHHII", 16 + len(body), 16, 5, 0, 0)  # NLM_F_REQUEST | NLM_F_ACK
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 15) as sender:
        sender.bind((0, 0))
        sender.sendto(header + body, (0, 0))
        (error,) = struct.unpack_from("=i", sender.recv(4096), 16)
        assert error == 0, os.strerror(-error)

def heard(edge):
    total = {"words": 0, "hotplug": False, "lost": False}
    while select.select([edge.fileno()], [], [], 0.5)[0]:
        said = edge.drain()
        total["words"] += said.words
        total["hotplug"] |= said.hotplug
        total["lost"] |= said.lost
    return total

edge = Uevent()
fork = dict(ACTION="change", DEVPATH="/devices/platform/QEMUVGID:00", SUBSYSTEM="platform", DRIVER="vmgenid")
fork["NEW_VMGENID"] = "1"
results = {}
"""


def in_namespace(body: str) -> dict[str, dict[str, object]]:
    """Run an edge in a network namespace of its own; what it heard, by name."""
    need_root()
    need("unshare", package="util-linux")
    run = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", DRIVER + body + "\nprint(json.dumps(results))"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout))


def test_the_kernels_event_is_one_word() -> None:
    results = in_namespace("inject(**fork); results['fork'] = heard(edge)")
    assert results["fork"] == {"words": 1, "hotplug": False, "lost": False}


def test_the_same_event_on_another_kobject_is_one_word() -> None:
    results = in_namespace(
        "inject(**{**fork, 'DEVPATH': '/devices/LNXSYSTM:00/X:00', 'SUBSYSTEM': 'acpi'}); results['fork'] = heard(edge)"
    )
    assert results["fork"]["words"] == 1


def test_other_events_are_no_word() -> None:
    results = in_namespace(
        """
inject(**{**fork, "ACTION": "add", "DEVPATH": "/devices/x", "DRIVER": "x"})
inject(**{**fork, "NEW_VMGENID": "0"})
inject(**{key: value for key, value in fork.items() if key != "NEW_VMGENID"})
results["other"] = heard(edge)
"""
    )
    assert results["other"]["words"] == 0


def test_a_device_that_appears_is_a_reason_to_look_again() -> None:
    results = in_namespace(
        """
inject(ACTION="add", DEVPATH="/devices/virtual/misc/vmclock0", SUBSYSTEM="misc", DEVNAME="vmclock0")
results["add"] = heard(edge)
"""
    )
    assert results["add"] == {"words": 0, "hotplug": True, "lost": False}


def test_after_an_overflow_of_the_socket_the_edge_goes_on_and_says_that_something_was_lost() -> None:
    results = in_namespace(
        """
for number in range(6000):
    inject(ACTION="change", DEVPATH="/devices/x%d" % number, SUBSYSTEM="x", FILL="y" * 1000)
results["flood"] = heard(edge)
inject(**fork)
results["after"] = heard(edge)
"""
    )
    assert results["flood"]["lost"] is True
    assert results["after"] == {"words": 1, "hotplug": False, "lost": False}


def test_an_overflow_while_there_is_no_descriptor_left_is_recovered_from_too() -> None:
    results = in_namespace(
        """
import resource
for number in range(6000):
    inject(ACTION="change", DEVPATH="/devices/x%d" % number, SUBSYSTEM="x", FILL="y" * 1000)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (edge.fileno() + 1, hard))
results["flood"] = heard(edge)
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
inject(**fork)
results["after"] = heard(edge)
"""
    )
    assert results["flood"]["lost"] is True
    assert results["after"] == {"words": 1, "hotplug": False, "lost": False}


def test_a_message_that_is_no_event_is_passed_over() -> None:
    results = in_namespace(
        """
broadcast(b"no event at all")
inject(**fork)
results["fork"] = heard(edge)
"""
    )
    assert results["fork"] == {"words": 1, "hotplug": False, "lost": False}


def test_an_event_with_a_name_that_is_no_utf_8_is_passed_over() -> None:
    results = in_namespace(
        """
broadcast(b"add@/devices/x\\0ACTION=add\\0DEVPATH=/devices/\\xff\\0SUBSYSTEM=misc\\0")
inject(**fork)
results["fork"] = heard(edge)
"""
    )
    assert results["fork"] == {"words": 1, "hotplug": False, "lost": False}


def test_a_synthetic_event_is_refused() -> None:
    properties = {"ACTION": "change", "NEW_VMGENID": "1", "SYNTH_UUID": "0"}
    assert not announces_fork(properties)
    assert announces_fork({"ACTION": "change", "NEW_VMGENID": "1"})


@pytest.mark.parametrize(
    ("properties", "is_source"),
    [
        ({"ACTION": "add", "DEVPATH": "/devices/platform/VMGENCTR:00"}, True),
        ({"ACTION": "bind", "DEVPATH": "/devices/platform/5fe00000.vmgenid", "DRIVER": "vmgenid"}, True),
        ({"ACTION": "remove", "DEVPATH": "/devices/x", "DEVNAME": "vmclock0"}, True),
        ({"ACTION": "change", "DEVPATH": "/devices/platform/VMGENCTR:00"}, False),
        ({"ACTION": "add", "DEVPATH": "/devices/pci0000:00/0000:00:01.0"}, False),
        ({}, False),
    ],
)
def test_only_devices_that_could_be_sources_are_probed_again(properties: dict[str, str], *, is_source: bool) -> None:
    assert announces_source(properties) == is_source


@pytest.mark.parametrize(
    ("release", "sends"),
    [("6.8.0", True), ("6.8.7", True), ("6.8.8", False), ("6.8.0-45-generic", False), ("6.12.107+deb13", False)],
)
def test_only_mainline_6_8_0_to_6_8_7_is_known_to_send_it(release: str, *, sends: bool) -> None:
    assert kernel_sends_it(release) == sends


def test_libudev_is_not_searched_for_and_ctypes_stays_whole() -> None:
    results = in_namespace(
        """
loaded = sorted({"ctypes.util", "shutil", "tempfile"} & set(sys.modules))
import ctypes.util
results["modules"] = {"loaded": loaded, "found": ctypes.util.find_library("c")}
"""
    )
    assert results["modules"] == {"loaded": [], "found": "libc.so.6"}


def test_without_libudev_there_is_no_reason_to_try_again() -> None:
    need_root()
    library = Path(ctypes.util.find_library("udev") or "libudev.so.1")
    found = next(path for folder in ("/usr/lib", "/lib") for path in Path(folder).rglob(library.name))
    script = 'mount --bind /dev/null "$0" && exec "$@"'
    code = "from vmfork.edges.uevent import Uevent; edge = Uevent(); print(edge.fileno(), edge.has_failed)"
    run = subprocess.run(
        [
            need("unshare", package="util-linux"),
            "--mount",
            "sh",
            "-ec",
            script,
            found.resolve(),
            sys.executable,
            "-c",
            code,
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.stdout, run.stderr) == ("-1 False\n", "")
