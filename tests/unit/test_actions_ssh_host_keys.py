# SPDX-License-Identifier: Apache-2.0
"""New ssh host keys with the real ssh-keygen, on a guest in a directory."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from support.actions import killed_at_step, prepared, tree, write
from support.tools import need
from vmfork.actions import Commands, perform, ssh_host_keys, sshd_config
from vmfork.actions.ssh_scan import target
from vmfork.errors import ActionError
from vmfork.model import IdentityPolicy
from vmfork.paths import Paths


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("ssh-keygen", package="openssh-client")


def keygen(*arguments: str) -> str:
    return subprocess.run(["ssh-keygen", *arguments], capture_output=True, text=True, check=True).stdout


def make_key(
    root: Path, kind: str = "ed25519", *, name: str = "", bits: int = 0, comment: str = "root@template"
) -> Path:
    path = root / (name or f"etc/ssh/ssh_host_{kind}_key")
    path.parent.mkdir(parents=True, exist_ok=True)
    size = ["-b", str(bits)] if bits else []
    keygen("-q", "-t", kind, *size, "-N", "", "-C", comment, "-f", str(path))
    return path


def public(path: Path) -> list[str]:
    """Type and key as the private half says, checked against the public half."""
    derived = keygen("-y", "-f", str(path)).split()[:2]
    assert Path(f"{path}.pub").read_text().split()[:2] == derived
    return derived


def rotate(root: Path) -> int:
    return perform(ssh_host_keys.ACTION, prepared(root).context)


@pytest.mark.parametrize(("kind", "bits"), [("ed25519", 0), ("ecdsa", 384), ("ecdsa", 521), ("rsa", 2048)])
def test_type_size_comment_and_modes_stay_and_the_key_is_new(tmp_path: Path, kind: str, bits: int) -> None:
    path = make_key(tmp_path, kind, bits=bits, comment="root@a template")
    old, size = public(path), keygen("-l", "-f", str(path)).split()[0]
    assert rotate(tmp_path) == 0
    new = public(path)
    assert new != old
    assert new[0] == old[0]
    assert keygen("-l", "-f", str(path)).split()[0] == size
    assert Path(f"{path}.pub").read_text().split(maxsplit=2)[2] == "root@a template\n"
    assert (path.stat().st_mode & 0o777, Path(f"{path}.pub").stat().st_mode & 0o777) == (0o600, 0o644)


def test_only_types_that_exist_are_made(tmp_path: Path) -> None:
    make_key(tmp_path)
    rotate(tmp_path)
    names = {path.name for path in (tmp_path / "etc/ssh").iterdir()}
    assert names == {"ssh_host_ed25519_key", "ssh_host_ed25519_key.pub"}


def test_the_new_fingerprint_is_said(tmp_path: Path) -> None:
    path = make_key(tmp_path)
    run = prepared(tmp_path)
    perform(ssh_host_keys.ACTION, run.context)
    assert f"new ED25519 host key {keygen('-l', '-f', str(path)).split()[1]} " in run.said


def test_without_keys_the_action_is_skipped(tmp_path: Path) -> None:
    assert rotate(tmp_path) == 77


def test_a_guest_that_keeps_its_identity_keeps_its_keys(tmp_path: Path) -> None:
    old = public(path := make_key(tmp_path))
    assert perform(ssh_host_keys.ACTION, prepared(tmp_path, identity=IdentityPolicy.KEEP).context) == 77
    assert public(path) == old


def test_a_dry_run_says_which_keys_and_changes_nothing(tmp_path: Path) -> None:
    path = make_key(tmp_path)
    before = tree(tmp_path)
    run = prepared(tmp_path, dry_run=True)
    assert perform(ssh_host_keys.ACTION, run.context) == 0
    assert tree(tmp_path) == before
    assert run.lines[0].startswith(f"would make a new ED25519 host key of 256 bits in {path} (now SHA256:")


def test_a_key_named_only_in_the_configuration_is_new_too(tmp_path: Path) -> None:
    path = make_key(tmp_path, name="srv/keys/main")
    write(tmp_path / "etc/ssh/sshd_config", "HostKey /srv/keys/main\n")
    old = public(path)
    assert rotate(tmp_path) == 0
    assert public(path) != old


def test_a_key_that_no_configuration_names_is_new_too(tmp_path: Path) -> None:
    path = make_key(tmp_path)
    write(tmp_path / "etc/ssh/sshd_config", "HostKey /srv/keys/gone\n")
    old = public(path)
    assert rotate(tmp_path) == 0
    assert public(path) != old


def test_a_linked_key_is_made_where_the_link_points(tmp_path: Path) -> None:
    real = make_key(tmp_path, name="persist/ssh_host_ed25519_key")
    link = tmp_path / "etc/ssh/ssh_host_ed25519_key"
    link.parent.mkdir(parents=True)
    link.symlink_to("/persist/ssh_host_ed25519_key")
    (tmp_path / "etc/ssh/ssh_host_ed25519_key.pub").symlink_to("/persist/ssh_host_ed25519_key.pub")
    old = public(real)
    assert rotate(tmp_path) == 0
    assert link.is_symlink()
    assert public(real) != old


@pytest.mark.parametrize("left", ["private", "public", "neither"])
def test_a_pair_that_a_crash_cut_short_is_made_whole(tmp_path: Path, left: str) -> None:
    path = make_key(tmp_path)
    if left != "private":
        path.write_text("")
    if left != "public":
        Path(f"{path}.pub").write_text("")
    assert rotate(tmp_path) == 0
    assert public(path)[0] == "ssh-ed25519"


def test_a_mismatched_pair_is_made_whole(tmp_path: Path) -> None:
    path, other = make_key(tmp_path), make_key(tmp_path, name="other")
    Path(f"{path}.pub").write_bytes(Path(f"{other}.pub").read_bytes())
    assert rotate(tmp_path) == 0
    public(path)


def test_a_key_with_a_certificate_is_left_and_reported_while_the_others_are_new(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certified, free = make_key(tmp_path), make_key(tmp_path, "ecdsa")
    authority = make_key(tmp_path, name="ca")
    keygen("-q", "-s", str(authority), "-I", "host", "-h", "-n", "example.org", f"{certified}.pub")
    write(
        tmp_path / "etc/ssh/sshd_config",
        "HostKey /etc/ssh/ssh_host_ed25519_key\nHostCertificate /etc/ssh/ssh_host_ed25519_key-cert.pub\n",
    )
    old = public(certified), public(free)
    assert rotate(tmp_path) == 1
    assert public(certified) == old[0]
    assert public(free) != old[1]
    assert "is still the shared key" in capsys.readouterr().err


def test_an_encrypted_key_is_a_failure_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "etc/ssh/ssh_host_ed25519_key"
    path.parent.mkdir(parents=True)
    keygen("-q", "-t", "ed25519", "-N", "secret", "-f", str(path))
    before = tree(tmp_path)
    assert rotate(tmp_path) == 1
    assert tree(tmp_path) == before


def test_without_ssh_keygen_nothing_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_key(tmp_path)
    before = tree(tmp_path)
    bare = replace(prepared(tmp_path).context, run=Commands(Paths(str(tmp_path)), search=(str(tmp_path),)))
    assert perform(ssh_host_keys.ACTION, bare) == 1
    assert tree(tmp_path) == before
    assert "openssh-client" in capsys.readouterr().err


def test_an_ssh_keygen_that_fails_removes_nothing(tmp_path: Path) -> None:
    root, programs = tmp_path / "root", tmp_path / "bin"
    make_key(root)
    real = need("ssh-keygen", package="openssh-client")
    write(programs / "ssh-keygen", f'#!/bin/sh\ncase "$*" in *-t*) exit 1;; esac\nexec {real} "$@"\n', mode=0o755)
    before = tree(root)
    assert perform(ssh_host_keys.ACTION, prepared(root, programs=programs).context) == 1
    assert tree(root) == before


def test_an_ssh_keygen_that_makes_the_old_key_again_is_a_failure(tmp_path: Path) -> None:
    root, programs = tmp_path / "root", tmp_path / "bin"
    path = make_key(root)
    real = need("ssh-keygen", package="openssh-client")
    copy = f'for last; do :; done; cp -p {path} "$last"; cp -p {path}.pub "$last.pub"; exit 0'
    write(programs / "ssh-keygen", f'#!/bin/sh\ncase "$*" in *-t*) {copy};; esac\nexec {real} "$@"\n', mode=0o755)
    before = tree(root)
    assert perform(ssh_host_keys.ACTION, prepared(root, programs=programs).context) == 1
    assert tree(root) == before


def test_killed_at_every_step_no_key_file_is_empty_or_missing(tmp_path: Path) -> None:
    paths = [make_key(tmp_path), make_key(tmp_path, "ecdsa")]
    old = [public(path) for path in paths]
    step, mismatches = 1, 0
    while killed_at_step(step, lambda: rotate(tmp_path)):
        for path in paths:
            derived = keygen("-y", "-f", str(path)).split()[:2]
            told = Path(f"{path}.pub").read_text().split()[:2]
            assert len(told) == 2
            mismatches += derived != told
        step += 1
    assert step > 20
    # Between the two renames of each pair, and nowhere else; every later run makes it whole again.
    assert mismatches <= 2
    assert all(public(path) != before for path, before in zip(paths, old, strict=True))
    assert {path.name for path in (tmp_path / "etc/ssh").iterdir()} == {
        name for path in paths for name in (path.name, path.name + ".pub")
    }


def config(root: Path, text: str, **drop_ins: str) -> sshd_config.SshdConfig:
    write(root / "etc/ssh/sshd_config", text)
    for name, content in drop_ins.items():
        write(root / f"etc/ssh/sshd_config.d/{name}.conf", content)
    return sshd_config.read(Paths(str(root)))


def test_drop_ins_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    text = "Include /etc/ssh/sshd_config.d/*.conf\nHostKey /z\n"
    assert config(tmp_path, text, b="HostKey /b\n", a="hostkey = /a\n").host_keys == ("/a", "/b", "/z")


def test_a_relative_include_is_below_etc_ssh(tmp_path: Path) -> None:
    assert config(tmp_path, "Include sshd_config.d/*.conf\n", a='HostKey "/with space/key"\n').host_keys == (
        "/with space/key",
    )


def test_match_blocks_comments_and_none_do_not_count(tmp_path: Path) -> None:
    text = "#HostKey /x\nHostKey none\nHostKey /a # why\nMatch User bob\nHostKey /b\nPort 9\n"
    found = config(tmp_path, text)
    assert (found.host_keys, found.ports) == (("/a",), (22,))


def test_a_match_block_in_a_drop_in_ends_with_its_file(tmp_path: Path) -> None:
    text = "Include /etc/ssh/sshd_config.d/*.conf\nHostKey /z\n"
    assert config(tmp_path, text, a="Match User bob\nHostKey /no\n").host_keys == ("/z",)


def test_an_include_of_itself_is_an_error_and_not_endless(tmp_path: Path) -> None:
    with pytest.raises(ActionError, match="Include"):
        config(tmp_path, "Include /etc/ssh/sshd_config\n")


def test_a_configuration_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "etc/ssh/sshd_config").mkdir(parents=True)
    make_key(tmp_path)
    assert rotate(tmp_path) == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", ("127.0.0.1", 22)),
        ("Port 2222\n", ("127.0.0.1", 2222)),
        ("ListenAddress 0.0.0.0\nPort 23\n", ("127.0.0.1", 23)),
        ("ListenAddress 192.0.2.7:99\n", ("192.0.2.7", 99)),
        ("ListenAddress [2001:db8::1]:99\n", ("2001:db8::1", 99)),
        ("ListenAddress 2001:db8::1\n", ("2001:db8::1", 22)),
    ],
)
def test_sshd_is_asked_where_it_listens(tmp_path: Path, text: str, wanted: tuple[str, int]) -> None:
    assert target(config(tmp_path, text)) == wanted
