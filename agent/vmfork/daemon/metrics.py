# SPDX-License-Identifier: Apache-2.0
"""/run/vmfork/metrics.prom, in Prometheus text format 0.0.4, for node_exporter's textfile collector.

Counters begin at the start of the daemon, as Prometheus expects of a process. Nothing in it is secret.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from vmfork import __version__, atomicfile
from vmfork.daemon.ledger import Ledger
from vmfork.model import ForkEvent, HookOutcome, Kind, Role, SourceStatus
from vmfork.paths import Paths

log = logging.getLogger(__name__)

Sample = tuple[str, dict[str, str], float]


class Metrics:
    """Counts what happened and writes the file; `enabled` is Metrics= of the configuration, `sources` what they say."""

    def __init__(self, paths: Paths, ledger: Ledger, *, sources: Callable[[], Sequence[SourceStatus]]) -> None:
        self._path = paths.metrics
        self._ledger = ledger
        self._sources = sources
        self.enabled = True
        self._forks: Counter[tuple[str, str]] = Counter()
        self._hooks: Counter[tuple[str, str]] = Counter()

    def noticed(self, event: ForkEvent) -> None:
        """Count a fork, once, whatever becomes of its reaction."""
        self._forks[event.kind.value, ",".join(event.edges) or "none"] += 1

    def ended(self, event: ForkEvent) -> None:
        """Count the hooks of a reaction that ended."""
        for hook in event.hooks:
            self._hooks[hook.name, hook.result.value] += 1

    def write(self) -> None:
        """Replace the file, or take it away; a disk that refuses is a problem in status, and it is tried again."""
        self._ledger.refusals.attempt(self._path, self._write, again=True)

    def _write(self) -> None:
        if self.enabled:
            # As it is by now, also where this is tried again.
            text = "".join(self._lines(self._ledger.event, self._sources()))
            atomicfile.replace(self._path, text.encode(), mode=0o644, durable=False)
        elif os.path.lexists(self._path):
            # Not unlink alone: a read-only file system answers EROFS for what is not there, too.
            os.unlink(self._path)

    def _lines(self, event: ForkEvent | None, sources: Sequence[SourceStatus]) -> Iterator[str]:
        content = self._ledger.page.current
        # A series that first appears with its first fork would hide that fork from increase() and rate().
        forks = {
            (Kind.MANUAL.value if one.name == "manual" else Kind.LIVE.value, one.name): 0
            for one in sources
            if one.role is Role.EDGE and one.live
        }
        forks.update(self._forks)
        yield from _family("vmfork_info", "gauge", "The running vmforkd.", [("", {"version": __version__}, 1)])
        yield from _family("vmfork_generation", "gauge", "The present generation.", [("", {}, content.generation)])
        yield from _detection(content.detection)
        yield from _family(
            "vmfork_state", "gauge", "0 settled, 1 reacting, 2 the last reaction failed.", [("", {}, content.state)]
        )
        yield from _family(
            "vmfork_forks_total",
            "counter",
            "Forks noticed since this vmforkd started, by kind and by the edges heard.",
            [("", {"kind": kind, "edge": edge}, count) for (kind, edge), count in sorted(forks.items())],
        )
        yield from _family(
            "vmfork_hook_results_total",
            "counter",
            "Results of hooks since this vmforkd started.",
            [("", {"hook": hook, "result": result}, count) for (hook, result), count in sorted(self._hooks.items())],
        )
        yield from _family(
            "vmfork_source_live",
            "gauge",
            "Whether a source is live.",
            [("", {"source": one.name, "role": one.role.value}, float(one.live)) for one in sources],
        )
        if event is not None:
            yield from self._last(event)

    def _last(self, event: ForkEvent) -> Iterator[str]:
        yield from _family(
            "vmfork_last_fork_timestamp_seconds",
            "gauge",
            "When the last fork was noticed.",
            [("", {}, event.detected_at_ns / 1e9)],
        )
        if event.detect_latency_us is not None:
            yield from _family(
                "vmfork_last_detect_latency_seconds",
                "gauge",
                "From the kernel's log record to the page, at the last fork.",
                [("", {}, event.detect_latency_us / 1e6)],
            )
        ran = [hook for hook in event.hooks if hook.duration_ms is not None]
        yield from _family(
            "vmfork_last_hook_duration_seconds",
            "gauge",
            "How long each hook ran in the last reaction.",
            [("", {"hook": hook.name}, (hook.duration_ms or 0) / 1e3) for hook in ran],
        )
        bad = (HookOutcome.FAILED, HookOutcome.TIMEOUT, HookOutcome.UNTRUSTED)
        failures = sum(hook.result in bad for hook in event.hooks)
        yield from _family(
            "vmfork_last_hook_failures", "gauge", "Hooks that failed in the last reaction.", [("", {}, failures)]
        )


def nobody_watches(paths: Paths) -> None:
    """All that is still true when the daemon has ended; nothing where there is no file."""
    if not os.path.lexists(paths.metrics):
        return
    try:
        atomicfile.replace(paths.metrics, "".join(_detection(0)).encode(), mode=0o644, durable=False)
    except OSError as error:
        log.warning("%s: %s; it is taken away", paths.metrics, error.strerror)
        # Nobody comes back to try again. A series that is missing can be seen; one that says all is well cannot.
        try:
            os.unlink(paths.metrics)
        except OSError as refusal:
            log.error("%s stays, and still says that somebody watches: %s", paths.metrics, refusal.strerror)


def _detection(value: int) -> Iterator[str]:
    summary = "Who watches: 0 nobody, 1 timer, 2 event."
    return _family("vmfork_detection", "gauge", summary, [("", {}, value)])


def _family(name: str, kind: str, summary: str, samples: list[Sample]) -> Iterator[str]:
    if not samples:
        return
    yield f"# HELP {name} {summary}\n# TYPE {name} {kind}\n"
    for suffix, labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        yield f"{name}{suffix}{{{inside}}} {value:.15g}\n" if inside else f"{name}{suffix} {value:.15g}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
