# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest

from vmfork import config, settings
from vmfork.paths import Paths


def write(root: Path, path: str, text: str | bytes) -> Path:
    target = root / path.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(text if isinstance(text, bytes) else text.encode())
    return target


def load(root: Path) -> config.Config:
    return config.load(Paths(str(root)))


@pytest.mark.parametrize(
    "row", [*settings.GENERAL, settings.HOOK_ENABLE, settings.HOOK_TIMEOUT_SEC, *settings.HOOK_OWN]
)
def test_every_default_is_a_valid_value(row: settings.Setting[object]) -> None:
    row.parse(row.default)


def test_no_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path).get(settings.POLL_INTERVAL_SEC) == 1.0


def test_etc_replaces_the_main_file_of_lib(tmp_path: Path) -> None:
    write(tmp_path, "/usr/lib/vmfork/vmfork.conf", "[React]\nTimeoutSec=5\nIdentity=keep\n")
    write(tmp_path, "/etc/vmfork/vmfork.conf", "[React]\nTimeoutSec=7\n")
    loaded = load(tmp_path)
    assert (loaded.get(settings.TIMEOUT_SEC), loaded.get(settings.IDENTITY)) == (7.0, "auto")


def test_drop_ins_apply_after_the_main_file_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path, "/etc/vmfork/vmfork.conf", "[React]\nTimeoutSec=1\n")
    write(tmp_path, "/etc/vmfork/vmfork.conf.d/10-a.conf", "[React]\nTimeoutSec=2\n")
    write(tmp_path, "/usr/lib/vmfork/vmfork.conf.d/20-b.conf", "[React]\nTimeoutSec=3\n")
    assert load(tmp_path).get(settings.TIMEOUT_SEC) == 3.0


def test_a_drop_in_of_etc_hides_that_of_lib(tmp_path: Path) -> None:
    write(tmp_path, "/usr/lib/vmfork/vmfork.conf.d/20-b.conf", "[React]\nTimeoutSec=3\n")
    write(tmp_path, "/etc/vmfork/vmfork.conf.d/20-b.conf", "[React]\nIdentity=keep\n")
    assert load(tmp_path).get(settings.TIMEOUT_SEC) == 30.0


def test_an_empty_file_masks_a_drop_in(tmp_path: Path) -> None:
    write(tmp_path, "/usr/lib/vmfork/vmfork.conf.d/20-b.conf", "[React]\nTimeoutSec=3\n")
    write(tmp_path, "/etc/vmfork/vmfork.conf.d/20-b.conf", "")
    assert load(tmp_path).get(settings.TIMEOUT_SEC) == 30.0


def test_a_link_to_dev_null_masks_a_drop_in(tmp_path: Path) -> None:
    write(tmp_path, "/usr/lib/vmfork/vmfork.conf.d/20-b.conf", "[React]\nTimeoutSec=3\n")
    (tmp_path / "etc/vmfork/vmfork.conf.d").mkdir(parents=True)
    (tmp_path / "etc/vmfork/vmfork.conf.d/20-b.conf").symlink_to("/dev/null")
    assert load(tmp_path).get(settings.TIMEOUT_SEC) == 30.0


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("PollIntervalSec=soon", "PollIntervalSec= must be a time"),
        ("PollIntervalSec=nan", "PollIntervalSec= must be a time"),
        ("PollIntervalSec=-1", "PollIntervalSec= must be a time"),
        ("PollIntervalSec=1e300", "PollIntervalSec= must be a time"),
        ("PhysicalMemory=perhaps", "PhysicalMemory= must be one of auto, yes, no"),
        ("Colour=red", "unknown key Colour="),
        ("just words", "neither a section nor Key=value"),
    ],
)
def test_a_broken_line_is_reported_with_its_file_and_line(tmp_path: Path, line: str, complaint: str) -> None:
    path = write(tmp_path, "/etc/vmfork/vmfork.conf", f"[Detect]\n# remark\n{line}\n")
    (problem,) = load(tmp_path).problems
    assert problem.startswith(f"{path}:3: ")
    assert complaint in problem


def test_a_broken_value_falls_back_to_the_default_not_to_an_earlier_file(tmp_path: Path) -> None:
    write(tmp_path, "/etc/vmfork/vmfork.conf", "[Detect]\nPollIntervalSec=9\n")
    write(tmp_path, "/etc/vmfork/vmfork.conf.d/a.conf", "[Detect]\nPollIntervalSec=x\n")
    assert load(tmp_path).get(settings.POLL_INTERVAL_SEC) == 1.0


def test_an_unknown_section_is_reported(tmp_path: Path) -> None:
    write(tmp_path, "/etc/vmfork/vmfork.conf", "[Nonsense]\nA=b\n")
    assert "unknown section [Nonsense]" in load(tmp_path).problems[0]


def test_a_value_before_any_section_is_reported(tmp_path: Path) -> None:
    write(tmp_path, "/etc/vmfork/vmfork.conf", "A=b\n")
    assert "before the first section" in load(tmp_path).problems[0]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x80" * 100, b"[React]\nIdentity=\xff\n"])
def test_binary_garbage_is_reported_and_ignored(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, "/etc/vmfork/vmfork.conf", content)
    loaded = load(tmp_path)
    assert loaded.problems == (f"{path}: is not a text file in UTF-8",)


def test_an_enormous_file_is_reported_and_ignored(tmp_path: Path) -> None:
    write(tmp_path, "/etc/vmfork/vmfork.conf", b"#" * (2 << 20))
    assert "is larger than" in load(tmp_path).problems[0]


def test_a_directory_in_the_place_of_the_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "etc/vmfork/vmfork.conf").mkdir(parents=True)
    assert "is not a regular file" in load(tmp_path).problems[0]


def test_a_hook_has_its_own_time_out(tmp_path: Path) -> None:
    write(tmp_path, "/etc/vmfork/vmfork.conf", "[Hook 40-leases]\nTimeoutSec=2min\nEnable=no\n")
    hook = load(tmp_path).hook("40-leases")
    assert (hook.enable, hook.timeout_sec) == ("no", 120.0)


def test_the_extension_of_a_hook_does_not_count_for_its_settings(tmp_path: Path) -> None:
    write(tmp_path, "/etc/vmfork/vmfork.conf", "[Hook 90-mine]\nEnable=no\n")
    assert load(tmp_path).hook("90-mine.sh").enable == "no"


def test_times_may_have_units() -> None:
    assert [settings.seconds(text) for text in ("30", "500ms", "0.5s", "5min", "1h")] == [30, 0.5, 0.5, 300, 3600]


def test_a_file_that_others_may_write_is_not_obeyed(tmp_path: Path) -> None:
    path = write(tmp_path, "/etc/vmfork/vmfork.conf", "[React]\nIdentity=rotate\n")
    path.chmod(0o666)
    loaded = load(tmp_path)
    assert loaded.get(settings.IDENTITY) == "auto"
    assert "is not trusted" in loaded.problems[0]


def test_a_file_in_a_directory_that_others_may_write_is_not_obeyed(tmp_path: Path) -> None:
    path = write(tmp_path, "/etc/vmfork/vmfork.conf.d/a.conf", "[React]\nIdentity=rotate\n")
    path.parent.chmod(0o777)
    assert load(tmp_path).get(settings.IDENTITY) == "auto"


def test_nobody_masks_or_overrides_a_file_through_a_directory_that_others_may_write(tmp_path: Path) -> None:
    write(tmp_path, "/usr/lib/vmfork/vmfork.conf", "[React]\nIdentity=keep\n")
    write(tmp_path, "/usr/lib/vmfork/vmfork.conf.d/20-b.conf", "[React]\nTimeoutSec=3\n")
    write(tmp_path, "/etc/vmfork/vmfork.conf", "")
    write(tmp_path, "/etc/vmfork/vmfork.conf.d/20-b.conf", "")
    (tmp_path / "etc/vmfork").chmod(0o777)
    loaded = load(tmp_path)
    assert (loaded.get(settings.IDENTITY), loaded.get(settings.TIMEOUT_SEC)) == ("keep", 3.0)
    (problem,) = loaded.problems
    assert problem.startswith(f"{tmp_path}/etc/vmfork: is not trusted")


def test_an_open_directory_is_complained_about_even_while_nothing_stands_in_it(tmp_path: Path) -> None:
    (tmp_path / "etc/vmfork").mkdir(parents=True)
    (tmp_path / "etc/vmfork").chmod(0o777)
    (problem,) = load(tmp_path).problems
    assert problem.startswith(f"{tmp_path}/etc/vmfork: is not trusted")


def test_a_link_of_root_to_a_trusted_file_is_obeyed(tmp_path: Path) -> None:
    write(tmp_path, "/usr/share/site.conf", "[React]\nIdentity=rotate\n")
    (tmp_path / "etc/vmfork").mkdir(parents=True)
    (tmp_path / "etc/vmfork/vmfork.conf").symlink_to("/usr/share/site.conf")
    assert load(tmp_path).get(settings.IDENTITY) == "rotate"


def test_a_file_that_cannot_be_opened_for_a_moment_is_obeyed_all_the_same(tmp_path: Path) -> None:
    write(tmp_path, "/etc/vmfork/vmfork.conf", "[React]\nIdentity=rotate\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def give_back(*_: object) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    # A signal, so that however busy this machine is it comes before the last try.
    before = signal.signal(signal.SIGALRM, give_back)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        loaded = load(tmp_path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        give_back()
        signal.signal(signal.SIGALRM, before)
    assert (loaded.problems, loaded.get(settings.IDENTITY)) == ((), "rotate")


def test_a_main_file_of_which_nothing_can_be_known_is_reported_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/vmfork").symlink_to("vmfork")
    assert any("is not trusted" in problem for problem in load(tmp_path).problems)
