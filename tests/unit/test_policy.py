# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from vmfork.model import IdentityPolicy, Kind
from vmfork.policy import Evidence, choose

ROTATE, KEEP = IdentityPolicy.ROTATE, IdentityPolicy.KEEP


@pytest.mark.parametrize(
    ("setting", "evidence", "policy"),
    [
        ("auto", Evidence(kind=Kind.LIVE), KEEP),
        ("auto", Evidence(kind=Kind.LIVE, smbios_changed=True, instance_changed=True), KEEP),
        ("auto", Evidence(kind=Kind.LIVE, template="Template=yes is configured"), ROTATE),
        ("auto", Evidence(kind=Kind.COLD), KEEP),
        ("auto", Evidence(kind=Kind.COLD, smbios_changed=True), ROTATE),
        ("auto", Evidence(kind=Kind.COLD, instance_changed=True), ROTATE),
        ("auto", Evidence(kind=Kind.COLD, template="declared a template"), ROTATE),
        ("auto", Evidence(kind=Kind.MANUAL, template="declared a template"), KEEP),
        ("auto", Evidence(kind=Kind.LIVE, owed=True), ROTATE),
        ("auto", Evidence(kind=Kind.MANUAL, owed=True), ROTATE),
        ("keep", Evidence(kind=Kind.LIVE, owed=True), KEEP),
        ("rotate", Evidence(kind=Kind.LIVE), ROTATE),
        ("rotate", Evidence(kind=Kind.MANUAL), KEEP),
        ("keep", Evidence(kind=Kind.COLD, smbios_changed=True), KEEP),
        ("keep", Evidence(kind=Kind.LIVE, template="declared a template"), KEEP),
    ],
)
def test_identity_is_rotated_only_with_evidence(setting: str, evidence: Evidence, policy: IdentityPolicy) -> None:
    assert choose(setting, evidence).policy is policy


def test_a_trigger_rotates_when_it_is_asked_to() -> None:
    assert choose("keep", Evidence(kind=Kind.MANUAL), asked=ROTATE).policy is ROTATE


def test_the_reason_names_what_changed() -> None:
    reason = choose("auto", Evidence(kind=Kind.COLD, smbios_changed=True, instance_changed=True)).reason
    assert "SMBIOS UUID" in reason
    assert "instance-id" in reason
