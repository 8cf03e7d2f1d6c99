# SPDX-License-Identifier: Apache-2.0
"""The detector's decision, by example and against a model hypervisor (hypothesis)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmfork.detector import CREDIT_NS, GENERATION_ID, Decision, Memory, WakeUp, decide

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16
KMSG = frozenset({"kmsg"})
BOTH = frozenset({"kmsg", "uevent"})


def wake(
    memory: Memory,
    *,
    now: int = 0,
    words: Mapping[str, int] | None = None,
    truths: Mapping[str, bytes] | None = None,
    listening: frozenset[str] = KMSG,
) -> Decision:
    return decide(memory, WakeUp(now_ns=now, words=words or {}, truths=truths or {}, listening=listening))


def seen(value: bytes) -> Memory:
    return Memory(truths={GENERATION_ID: value})


def test_the_first_sight_of_a_truth_is_no_fork() -> None:
    assert not wake(Memory(), truths={GENERATION_ID: A}).fork


def test_an_equal_truth_is_no_fork() -> None:
    assert not wake(seen(A), truths={GENERATION_ID: A}).fork


def test_a_changed_truth_is_a_fork() -> None:
    decision = wake(seen(A), truths={GENERATION_ID: B})
    assert decision.fork
    assert decision.changed == (GENERATION_ID,)


def test_all_zero_is_a_value_like_any_other() -> None:
    assert wake(seen(A), truths={GENERATION_ID: bytes(16)}).fork
    assert wake(seen(bytes(16)), truths={GENERATION_ID: A}).fork


def test_an_absent_truth_is_remembered() -> None:
    absent = wake(seen(A), truths={})
    assert not absent.fork
    assert wake(absent.memory, truths={GENERATION_ID: B}).fork


def test_the_word_of_an_edge_without_any_truth_is_a_fork() -> None:
    assert wake(Memory(), words={"kmsg": 1}).fork


def test_the_word_of_an_edge_with_an_unchanged_id_is_odd() -> None:
    decision = wake(seen(A), words={"kmsg": 1}, truths={GENERATION_ID: A})
    assert not decision.fork
    assert decision.odd == ("kmsg",)


def test_the_word_of_an_edge_is_believed_when_the_id_was_never_seen_before() -> None:
    assert wake(Memory(), words={"kmsg": 1}, truths={GENERATION_ID: A}).fork


def test_an_unchanged_vmclock_counter_does_not_refute_the_kernels_word() -> None:
    memory = Memory(truths={"vmclock": b"1"})
    assert wake(memory, words={"kmsg": 1}, truths={"vmclock": b"1"}).fork


def test_a_late_word_for_a_fork_already_seen_spends_its_credit() -> None:
    first = wake(Memory(truths={"vmclock": b"1"}), truths={"vmclock": b"2"})
    late = wake(first.memory, now=CREDIT_NS - 1, words={"kmsg": 1}, truths={"vmclock": b"2"})
    assert first.fork
    assert not late.fork
    assert late.odd == ()


def test_a_credit_is_spent_only_once() -> None:
    first = wake(Memory(truths={"vmclock": b"1"}), truths={"vmclock": b"2"})
    second = wake(first.memory, now=1, words={"kmsg": 1})
    assert wake(second.memory, now=2, words={"kmsg": 1}).fork


def test_a_credit_ends_after_two_seconds() -> None:
    first = wake(Memory(truths={"vmclock": b"1"}), truths={"vmclock": b"2"})
    assert wake(first.memory, now=CREDIT_NS, words={"kmsg": 1}).fork


def test_an_edge_that_spoke_in_the_same_wake_up_gets_no_credit() -> None:
    first = wake(Memory(truths={"vmclock": b"1"}), words={"kmsg": 1}, truths={"vmclock": b"2"})
    assert first.fork
    assert wake(first.memory, now=1, words={"kmsg": 1}).fork


def test_two_edges_about_one_fork_are_one_fork_even_with_no_truth() -> None:
    first = wake(Memory(), words={"kmsg": 1}, listening=BOTH)
    second = wake(first.memory, now=10, words={"uevent": 1}, listening=BOTH)
    assert (first.fork, second.fork) == (True, False)


def test_a_new_fork_while_an_old_word_is_still_on_its_way_is_one_more_fork() -> None:
    first = wake(seen(A), truths={GENERATION_ID: B})
    second = wake(first.memory, now=5, words={"kmsg": 1}, truths={GENERATION_ID: C})
    third = wake(second.memory, now=6, words={"kmsg": 1}, truths={GENERATION_ID: C})
    assert (first.fork, second.fork, third.fork) == (True, True, False)
    assert third.odd == ()


def test_an_id_that_could_not_be_read_at_its_fork_does_not_count_again_when_it_can() -> None:
    first = wake(seen(A), words={"kmsg": 1}, truths={})
    second = wake(first.memory, now=CREDIT_NS, truths={GENERATION_ID: B})
    third = wake(second.memory, now=CREDIT_NS, truths={GENERATION_ID: C})
    assert (first.fork, second.fork, third.fork) == (True, False, True)


def test_the_word_about_another_fork_is_believed_though_the_id_is_seen_for_the_first_time_since() -> None:
    first = wake(seen(A), words={"kmsg": 1}, truths={})
    assert wake(first.memory, now=CREDIT_NS, words={"kmsg": 1}, truths={GENERATION_ID: C}).fork


def test_a_vmclock_that_could_not_be_read_at_a_fork_does_not_count_again_when_it_can() -> None:
    memory = Memory(truths={GENERATION_ID: A, "vmclock": b"1"})
    first = wake(memory, truths={GENERATION_ID: B})
    second = wake(first.memory, truths={GENERATION_ID: B, "vmclock": b"2"})
    assert (first.fork, second.fork) == (True, False)


# The model hypervisor. In a step the host forks the guest (all truths change, and each edge will speak with some delay,
# perhaps never, perhaps twice), time passes, the detector wakes up and hears what is due.


@dataclass(frozen=True)
class Step:
    forks: bool
    delays: tuple[int | None, ...]  # for each edge: None = its word is lost
    doubled: bool
    passes: int
    wakes: bool
    readable: bool


MILLI = 1_000_000
steps = st.builds(
    Step,
    forks=st.booleans(),
    delays=st.tuples(*[st.one_of(st.none(), st.integers(0, CREDIT_NS - 1))] * 2),
    doubled=st.booleans(),
    passes=st.integers(0, 4_000 * MILLI),
    wakes=st.booleans(),
    readable=st.booleans(),
)
budget = settings(max_examples=400, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Hypervisor:
    """Holds the truth of the guest and the words under way."""

    def __init__(self) -> None:
        self.now = 0
        self.counter = 0
        self.due: list[tuple[int, str]] = []

    def fork(self, delays: tuple[int | None, ...], *, doubled: bool) -> None:
        self.counter += 1
        for edge, delay in zip(sorted(BOTH), delays, strict=True):
            if delay is not None:
                self.due += [(self.now + delay, edge)] * (2 if doubled else 1)

    def heard(self) -> dict[str, int]:
        ready = [edge for when, edge in self.due if when <= self.now]
        self.due = [(when, edge) for when, edge in self.due if when > self.now]
        return {edge: ready.count(edge) for edge in set(ready)}

    def value(self) -> bytes:
        return self.counter.to_bytes(16, "little")


@budget
@given(st.lists(steps, max_size=40))
def test_with_a_readable_id_each_seen_change_is_exactly_one_fork_whatever_the_edges_do(script: list[Step]) -> None:
    host = Hypervisor()
    memory = wake(Memory(), truths={GENERATION_ID: host.value()}).memory
    last_read = host.counter
    for step in script:
        if step.forks:
            host.fork(step.delays, doubled=step.doubled)
        host.now += step.passes
        if step.wakes:
            decision = wake(
                memory, now=host.now, words=host.heard(), truths={GENERATION_ID: host.value()}, listening=BOTH
            )
            assert decision.fork == (host.counter != last_read)
            memory, last_read = decision.memory, host.counter


@budget
@given(st.lists(steps, max_size=40))
def test_an_id_that_is_readable_only_now_and_then_loses_and_invents_nothing_with_silent_edges(
    script: list[Step],
) -> None:
    host = Hypervisor()
    memory = wake(Memory(), truths={GENERATION_ID: host.value()}).memory
    last_read = host.counter
    for step in script:
        if step.forks:
            host.fork((None, None), doubled=False)
        host.now += step.passes
        if step.wakes:
            truths = {GENERATION_ID: host.value()} if step.readable else {}
            decision = wake(memory, now=host.now, truths=truths)
            assert decision.fork == (step.readable and host.counter != last_read)
            memory = decision.memory
            last_read = host.counter if step.readable else last_read


@budget
@given(st.lists(steps, max_size=40))
def test_an_id_that_is_readable_only_now_and_then_counts_each_fork_once_with_an_edge_that_speaks_at_once(
    script: list[Step],
) -> None:
    host = Hypervisor()
    memory = wake(Memory(), truths={GENERATION_ID: host.value()}).memory
    forks = 0
    for step in script:
        if step.forks:
            host.fork((0, None), doubled=False)
        host.now += step.passes
        if step.forks or step.wakes:
            truths = {GENERATION_ID: host.value()} if step.readable else {}
            decision = wake(memory, now=host.now, words=host.heard(), truths=truths)
            memory, forks = decision.memory, forks + decision.fork
        assert forks == host.counter


@budget
@given(st.lists(steps, max_size=40))
def test_with_only_the_vmclock_counter_and_edges_that_keep_their_time_each_fork_is_one(script: list[Step]) -> None:
    """Forks further apart than the credits last, so that a word can belong to one fork only."""
    host = Hypervisor()
    memory = wake(Memory(), truths={"vmclock": host.value()}).memory
    forks = 0
    for step in script:
        if step.forks:
            host.fork(step.delays, doubled=False)
            # The truth is read at once (vmclock's own edge), the words of the others follow in their own time.
            for _ in range(3):
                decision = wake(
                    memory, now=host.now, words=host.heard(), truths={"vmclock": host.value()}, listening=BOTH
                )
                memory, forks = decision.memory, forks + decision.fork
                host.now += CREDIT_NS // 2 - 1
        host.now += CREDIT_NS
        host.heard()
    assert forks == host.counter


@budget
@given(st.lists(steps, max_size=40))
def test_with_no_truth_each_word_of_a_single_edge_is_one_fork(script: list[Step]) -> None:
    host = Hypervisor()
    memory = Memory()
    for step in script:
        if step.forks:
            host.fork((step.delays[0], None), doubled=False)
        host.now += step.passes
        if step.wakes:
            words = host.heard()
            decision = wake(memory, now=host.now, words=words, listening=KMSG)
            assert decision.fork == bool(words)
            memory = decision.memory
