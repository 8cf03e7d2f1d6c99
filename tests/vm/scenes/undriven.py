# SPDX-License-Identifier: Apache-2.0
"""A guest whose kernel has no driver for the generation ID: nobody but vmfork repairs its random numbers.

First without vmforkd, to show what is repaired: every clone gets the same bytes from the kernel. Then with it, noticed
by the timer. Then what `vmforkctl doctor` says about such a guest.
"""

from __future__ import annotations

import logging
import uuid

from lab import view
from lab.guest import Saved, Spec
from scenes import forked
from scenes.findings import Findings, short
from scenes.forked import Expected, Moment
from scenes.stage import Stage

log = logging.getLogger(__name__)

_CLONES = ("one", "two", "three")
_SHOWN = 4
_EDGES = ("kmsg", "uevent", "vmclock", "timer")


def play(stage: Stage, spec: Spec, expected: Expected, findings: Findings) -> None:
    """The whole scene."""
    moment = forked.save(stage, stage.boot(spec))
    _unrepaired(stage, moment, findings)
    forked.fork(stage, moment, expected, findings)
    _doctor(stage, moment.saved, findings)


def _unrepaired(stage: Stage, moment: Moment, findings: Findings) -> None:
    first = stage.restore(moment.saved, "without-vmforkd", moment.saved.guid)
    first.check("systemctl", "stop", "vmforkd")
    saved = stage.save(first)
    drawn = []
    for name in _CLONES:
        clone = stage.restore(saved, f"unrepaired-{name}", uuid.uuid4())
        drawn.append([str(one) for one in view.drawn(clone, "now")["urandom"]])
        stage.end(clone)
    common = [one for one in drawn[0] if all(one in others for others in drawn)]
    log.info("%s: without vmforkd, %d of %d draws are the same in three clones", stage.name, len(common), len(drawn[0]))
    if findings.expect(bool(common), f"{stage.name}: without vmforkd too, the clones drew different bytes"):
        findings.notes.append(
            f"With vmforkd stopped, three clones with IDs of their own got the same bytes from os.urandom, "
            f"{len(common)} of {len(drawn[0])} draws: {', '.join(short(one) for one in common[:_SHOWN])} ..."
        )


def _doctor(stage: Stage, saved: Saved, findings: Findings) -> None:
    clone = stage.restore(saved, "doctor", saved.guid)
    answer = clone.json("vmforkctl", "doctor", "--json=short")
    stage.end(clone)
    findings.notes.append(f"vmforkctl doctor: {answer['verdict']}")
    for source in answer["sources"]:
        if source["role"] == "edge" and source["name"] in _EDGES:
            findings.notes.append(f"  {source['name']}: {'live' if source['live'] else 'not live'}; {source['detail']}")
    findings.notes += [f"  next: {step}" for step in answer["next_steps"]]
