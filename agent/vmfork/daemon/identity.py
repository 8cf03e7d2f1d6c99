# SPDX-License-Identifier: Apache-2.0
"""Gathers the evidence that the identity policy is chosen by, and saves the baseline it is compared with."""

from __future__ import annotations

from itertools import takewhile

from vmfork import policy, settings
from vmfork.config import Config
from vmfork.daemon import templatemark
from vmfork.daemon.ledger import Ledger
from vmfork.model import EventState, Identity, IdentityPolicy, Kind
from vmfork.paths import Paths
from vmfork.state import Remembered
from vmfork.truths.evidence import read_instance_id, read_smbios, same_machine


def choose(paths: Paths, config: Config, ledger: Ledger, kind: Kind, *, asked: IdentityPolicy | None) -> Identity:
    """The policy for a fork of this kind; only a cold one looks at the evidence."""
    saved, owed, template = ledger.saved, _is_owed(ledger.remembered), _template(paths, config, ledger.remembered)
    evidence = policy.Evidence(kind=kind, owed=owed, template=template)
    if kind is Kind.COLD:
        instance = read_instance_id(paths).value
        evidence = policy.Evidence(
            kind=kind,
            owed=owed,
            template=template,
            smbios_changed=not same_machine(saved.smbios_uuid, read_smbios(paths).value),
            instance_changed=None not in (saved.instance_id, instance) and saved.instance_id != instance,
        )
    return policy.choose(config.get(settings.IDENTITY), evidence, asked=asked)


def _is_owed(remembered: Remembered) -> bool:
    """Whether the reaction that a new fork supersedes, or one superseded before it, was to rotate the identity."""
    if remembered.handled or remembered.event is None:
        return False
    superseded = takewhile(lambda one: one.state is EventState.SUPERSEDED, reversed(remembered.unwritten))
    return any(one.identity.policy is IdentityPolicy.ROTATE for one in (remembered.event, *superseded))


def _template(paths: Paths, config: Config, remembered: Remembered) -> str | None:
    if config.get(settings.TEMPLATE):
        return "Template=yes is configured"
    if templatemark.stands(paths, remembered):
        return "this guest was declared a template by vmforkctl prepare --template"
    return None


def save_baseline(paths: Paths, ledger: Ledger) -> None:
    """What the next boot compares with."""
    ledger.baseline(smbios_uuid=read_smbios(paths).value, instance_id=read_instance_id(paths).value)
