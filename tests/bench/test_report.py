# SPDX-License-Identifier: Apache-2.0
"""What is written of the measured values; nothing is measured here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import report
from bench.growth import straight
from bench.place import TOP
from bench.samples import Chapter, Curve, Series, kept

MACHINE = {"date": "2026-01-01 00:00 UTC", "processor": "A", "kernel": "Linux 6.1", "load": "0.00 0.00 0.00"}


def chapter(name: str, **machine: str) -> Chapter:
    series = [Series(key="one", what="one", unit="ms", values=[1.0, 2.0, 3.0], budget=5.0)]
    return Chapter(name=name, series=series, machine={**MACHINE, **machine})


def curve(*values: list[float]) -> Curve:
    sizes = (1.0, 10.0, 100.0, 1000.0)
    return Curve(key="c", what="cost", over="items", unit="ms", samples=list(zip(sizes, values, strict=False)))


def test_each_chapter_says_when_it_was_measured() -> None:
    text = report.markdown([chapter("edge"), chapter("calls", date="2026-02-02 00:00 UTC")], plot=None)
    assert "Measured 2026-01-01 00:00 UTC; load 0.00 0.00 0.00." in text
    assert "Measured 2026-02-02 00:00 UTC; load 0.00 0.00 0.00." in text


def test_a_chapter_that_was_measured_on_another_machine_says_so() -> None:
    text = report.markdown([chapter("edge"), chapter("calls", processor="B")], plot=None)
    head = text.partition("## From the edge")[0]
    assert "- kernel: Linux 6.1" in head
    assert "processor" not in head
    assert "load 0.00 0.00 0.00; processor A." in text
    assert "load 0.00 0.00 0.00; processor B." in text


def test_a_chapter_comes_back_from_its_file_as_it_was() -> None:
    one = chapter("growth")
    one.curves.append(curve([1.0, 2.0], [10.0], [100.0]))
    assert Chapter.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_a_file_of_an_older_bench_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = chapter("edge").to_json()
    del old["machine"]
    (tmp_path / "edge.json").write_text(json.dumps(old))
    (tmp_path / "calls.json").write_text(json.dumps(chapter("calls").to_json()))
    assert [one.name for one in kept(tmp_path / name for name in ("edge.json", "guest.json", "calls.json"))] == [
        "calls"
    ]
    assert f"{tmp_path}/edge.json: not of this version" in capsys.readouterr().err


@pytest.mark.parametrize("quick", [True, False])
def test_a_run_that_is_quick_or_not_complete_leaves_the_document_alone(tmp_path: Path, *, quick: bool) -> None:
    document = TOP / "docs/performance.md"
    before = document.read_bytes(), document.stat().st_mtime_ns
    done = bench("--out", str(tmp_path), *(["--quick"] if quick else []))
    assert "docs/performance.md stays as it is" in done.stderr
    assert (document.read_bytes(), document.stat().st_mtime_ns) == before
    assert (tmp_path / "fleet.json").exists()


def test_a_document_that_was_asked_for_is_written(tmp_path: Path) -> None:
    bench("--out", str(tmp_path), "--docs", str(tmp_path / "docs"), "--quick")
    assert "## A fleet of clones" in (tmp_path / "docs/performance.md").read_text()


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    """One small chapter."""
    path = f"{TOP}/agent:{TOP}/tests:{TOP}/tests/vm"
    return subprocess.run(
        [sys.executable, "-c", _ONE_CHAPTER, "--only", "fleet", *options],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )


_ONE_CHAPTER = """
from bench import __main__ as program
from bench.samples import Chapter, Series
chapter = Chapter(name="fleet", series=[Series(key="one", what="one", unit="ms", values=[1.0])])
program.CHAPTERS["fleet"] = (lambda: chapter, lambda: chapter)
program.main()
"""


@pytest.mark.parametrize(("power", "straight_enough"), [(0.5, True), (1, True), (1.5, False), (2, False)])
def test_a_cost_that_grows_faster_than_its_size_misses_the_budget(power: float, *, straight_enough: bool) -> None:
    for sizes in ((1, 10, 100, 300, 1000), (10, 100, 1000, 10_000)):
        grown = Curve(key="c", what="cost", over="items", unit="ms")
        grown.samples = [(float(size), [50 + float(size**power)]) for size in sizes]
        (row,) = straight([grown])
        assert row.kept is straight_enough


def test_a_cost_that_does_not_grow_is_not_judged() -> None:
    flat = curve([5.0, 6.0], [5.1], [4.9], [5.0, 6.1])
    assert list(straight([flat])) == []
    assert "; no growth" in report.table([Chapter(name="growth", curves=[flat])])


def test_a_cost_that_begins_to_grow_in_the_last_step_misses_the_budget() -> None:
    (row,) = straight([curve([5.0], [5.0], [5.0], [500.0])])
    assert row.kept is False
    assert "inf" in report.table([Chapter(name="growth", series=[row])])
