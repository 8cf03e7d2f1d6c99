# SPDX-License-Identifier: Apache-2.0
"""Hook 55-wireguard: keys, and the files that give an interface its key at the next start."""

from __future__ import annotations

import base64
from pathlib import Path

from support.actions import prepared
from vmfork.actions import perform, wireguard


def test_a_key_is_clamped_for_x25519_and_never_the_same() -> None:
    keys = {wireguard.new_key() for _ in range(50)}
    assert len(keys) == 50
    for key in keys:
        raw = base64.b64decode(key, validate=True)
        assert len(raw) == 32
        assert raw[0] & 7 == 0
        assert raw[31] & 0xC0 == 0x40


def test_only_the_private_key_of_a_configuration_changes() -> None:
    before = "[Interface]\nPrivateKey = AAA=\nAddress = 10.0.0.1/24 # PrivateKey = no\n[Peer]\nPublicKey = BBB=\n"
    assert wireguard.with_key(before, "NEW=") == before.replace("AAA=", "NEW=")


def test_a_key_file_holds_the_key_alone() -> None:
    assert wireguard.with_key("AAA=\n", "NEW=") == "NEW=\n"


def test_files_of_wg_quick_and_networkd_are_found(tmp_path: Path) -> None:
    etc = tmp_path / "etc"
    (etc / "wireguard").mkdir(parents=True)
    (etc / "systemd/network").mkdir(parents=True)
    (etc / "wireguard/wg0.conf").write_text("[Interface]\nPrivateKey=AAA=\n")
    (etc / "wireguard/wg1.conf").write_text("[Interface]\nPrivateKey=AAA=\n")
    (etc / "systemd/network/a.netdev").write_text("[NetDev]\nName=wg0\nKind=wireguard\n[WireGuard]\nPrivateKey=AAA=\n")
    (etc / "systemd/network/b.netdev").write_text("[NetDev]\nName=wg0\n[WireGuard]\nPrivateKeyFile=/etc/wg0.key\n")
    (etc / "systemd/network/c.netdev").write_text("[NetDev]\nName=wg1\n[WireGuard]\nPrivateKey=AAA=\n")
    assert wireguard.key_files(prepared(tmp_path).context, "wg0") == (
        str(etc / "wireguard/wg0.conf"),
        str(etc / "systemd/network/a.netdev"),
        str(etc / "wg0.key"),
    )


def test_without_interfaces_it_is_skipped(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    assert perform(wireguard.ACTION, run.context) == 77
    assert "Interfaces=" in run.said
