# SPDX-License-Identifier: Apache-2.0
"""The kernel's own random number generator, really reseeded."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from support.actions import AGENT, in_namespaces, prepared
from support.tools import need_root, unavailable
from vmfork import kernelrng
from vmfork.actions import perform, rng, vdso
from vmfork.errors import ActionError
from vmfork.paths import Paths


@pytest.fixture(autouse=True)
def _root() -> None:
    need_root()


def counter() -> int:
    """The kernel's counter of keys; tests that need it do not run on kernels before 6.11."""
    found = vdso.random_generation()
    if found is None:
        unavailable("this kernel does not publish its counter of random keys (Linux 6.11 and later, vDSO getrandom)")
    return int(found or 0)


def test_the_counter_moves_with_a_reseed_and_not_without() -> None:
    first = counter()
    os.getrandom(64)
    kernelrng.mix(Paths(""), b"x" * 64)
    assert counter() == first
    descriptor = os.open("/dev/urandom", os.O_RDONLY)
    fcntl.ioctl(descriptor, kernelrng.RNDRESEEDCRNG)
    os.close(descriptor)
    assert counter() == first + 1


def in_mount_namespace(setup: str, command: str = "action rng") -> subprocess.CompletedProcess[str]:
    """With an empty /var/lib of its own, so that this machine's seed stays."""
    return in_namespaces(["--mount"], f"mount -t tmpfs none /var/lib\n{setup}\n{command}\nstat -c '%a %s' {SEED}")


SEED = "/var/lib/systemd/random-seed"


def test_the_action_proves_the_reseed_and_renews_the_seed_file() -> None:
    before = counter()
    done = in_mount_namespace(f"mkdir /var/lib/systemd; head -c 512 /dev/zero > {SEED}; chmod 640 {SEED}")
    assert done.returncode == 0, done.stderr
    assert "verified: the kernel's counter of keys went from" in done.stdout
    assert done.stdout.endswith("600 512\n")
    assert counter() > before


def test_a_seed_of_another_size_keeps_its_size() -> None:
    done = in_mount_namespace(f"mkdir /var/lib/systemd; head -c 1000 /dev/zero > {SEED}")
    assert done.stdout.endswith("600 1000\n"), done.stderr


def test_a_dry_run_does_not_reseed() -> None:
    before = counter()
    run = prepared("", dry_run=True)
    rng.after_fork(run.context)
    assert counter() == before
    assert run.lines[0].startswith("would mix")


def test_without_the_capability_it_is_a_failure_and_nothing_is_claimed() -> None:
    done = in_mount_namespace(
        "",
        "exec setpriv --bounding-set -sys_admin "
        f'--inh-caps -sys_admin {sys.executable} -c \'import sys; sys.path.insert(0, "{AGENT}"); '
        'from vmfork.actions import main; sys.exit(main("rng", []))\'',
    )
    assert done.returncode == 1
    assert "was not reseeded" in done.stderr
    assert "reseeded the kernel's generator" not in done.stdout


def test_a_counter_that_does_not_move_is_a_failure() -> None:
    with pytest.raises(ActionError, match="did not move"):
        rng.proof(7, 7)


def test_without_a_counter_the_proof_says_what_it_rests_on() -> None:
    assert "publishes no counter" in rng.proof(None, None)


def test_below_a_root_the_kernel_is_left_alone_and_the_seed_is_renewed(tmp_path: Path) -> None:
    seed = tmp_path / "var/lib/systemd/random-seed"
    seed.parent.mkdir(parents=True)
    seed.write_bytes(bytes(512))
    before = counter()
    assert perform(rng.ACTION, prepared(tmp_path).context) == 0
    assert counter() == before
    assert (seed.stat().st_size, seed.stat().st_mode & 0o777, seed.read_bytes() != bytes(512)) == (512, 0o600, True)


def test_without_systemds_seed_service_no_seed_file_appears(tmp_path: Path) -> None:
    context = replace(prepared(tmp_path).context)
    assert perform(rng.ACTION, context) == 0
    assert list(tmp_path.iterdir()) == []
