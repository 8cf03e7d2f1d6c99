# SPDX-License-Identifier: Apache-2.0
"""Who is a clone? Whether a fork makes machine-id, host keys and hostname new, and the sentence that says why.

A hypervisor changes the generation ID for clones and rollbacks, sometimes for plain boots and migrations. Rotating the
identity of a machine that was only rolled back harms as much as not rotating that of a clone, so `auto` rotates with
evidence alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmfork.model import Identity, IdentityPolicy, Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known about a fork beside the fork itself.

    `owed` is true where a reaction that was to rotate the identity has not ended: the new one takes its place.
    `template` says how this guest was declared a template, None if it was not. `smbios_changed` and
    `instance_changed` compare with the last boot, and mean something for a cold fork only.
    """

    kind: Kind
    owed: bool = False
    template: str | None = None
    smbios_changed: bool = False
    instance_changed: bool = False


def choose(setting: str, evidence: Evidence, *, asked: IdentityPolicy | None = None) -> Identity:
    """The policy for one fork: `setting` is Identity= (auto, rotate, keep), `asked` what a manual trigger asked for."""
    if asked is not None:
        return Identity(policy=asked, reason="asked for by the trigger")
    if evidence.owed and setting != "keep":
        return Identity(policy=IdentityPolicy.ROTATE, reason="the reaction before was to rotate it and has not ended")
    if evidence.kind is Kind.MANUAL:
        return Identity(policy=IdentityPolicy.KEEP, reason="a manual trigger rotates only when asked to")
    if setting != "auto":
        return Identity(policy=IdentityPolicy(setting), reason=f"Identity={setting} is configured")
    if evidence.template is not None:
        return Identity(policy=IdentityPolicy.ROTATE, reason=evidence.template)
    if evidence.kind is Kind.COLD:
        changed = [
            name
            for name, moved in (
                ("the SMBIOS UUID", evidence.smbios_changed),
                ("the cloud instance-id", evidence.instance_changed),
            )
            if moved
        ]
        if changed:
            return Identity(policy=IdentityPolicy.ROTATE, reason=f"{' and '.join(changed)} changed as well: a clone")
        return Identity(
            policy=IdentityPolicy.KEEP,
            reason="neither SMBIOS UUID nor cloud instance-id changed: no evidence of a clone",
        )
    return Identity(policy=IdentityPolicy.KEEP, reason="not declared a template: a rollback looks the same as a clone")
