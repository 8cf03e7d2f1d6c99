# SPDX-License-Identifier: Apache-2.0
"""vmforkd as a whole, below a root prefix: what is a fork, what is none, and what a restart must not lose."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from support import asl
from support.fakeguest import RESUME_LINE, FakeGuest
from support.runningdaemon import RunningDaemon, environment, eventually, vmforkctl, vmforkd, write_hook
from vmfork.page import DETECTION_EVENT, DETECTION_NONE, DETECTION_TIMER, read_page

OTHER_BOOT = "11111111-2222-3333-4444-555555555555"
# Leaves a trace, then takes long, until the test says otherwise.
SLOW = 'echo "{what}" >> "$VMFORK_ROOT/ran"; [ -e "$VMFORK_ROOT/go" ] || sleep 60'


def fresh_id() -> bytes:
    return os.urandom(16)


def generation(guest: FakeGuest) -> int:
    return read_page(guest.paths.generation_page).generation


def poll_quickly(guest: FakeGuest) -> None:
    guest.put(guest.paths.config_etc + "/vmfork.conf", b"[Detect]\nPollIntervalSec=20ms\n")


def clone_cold(guest: FakeGuest, daemon: RunningDaemon) -> None:
    """The guest's disk boots as another machine; vmforkd is still to be started."""
    guest.set_smbios_uuid("11111111-1111-1111-1111-111111111111")
    daemon.stop()
    daemon.start()
    daemon.stop()
    guest.set_generation_id(fresh_id())
    guest.set_boot_id(OTHER_BOOT)
    guest.set_smbios_uuid("22222222-1111-1111-1111-111111111111")


def test_the_first_start_records_a_baseline_only(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        assert (daemon.status()["generation"], daemon.status()["last_fork"]) == (1, None)
        assert json.loads(Path(guest.paths.state).read_text())["generation_id"] == "443322116655887799aabbccddeeff00"


def test_one_line_and_a_changed_id_are_one_event(guest: FakeGuest) -> None:
    new = fresh_id()
    with RunningDaemon(guest) as daemon:
        guest.fork(new)
        event = daemon.settled(2)
        assert (event["kind"], event["edges"], event["generation_id"]) == ("live", ["kmsg"], new.hex())
        assert event["previous_generation_id"] == "443322116655887799aabbccddeeff00"
        assert [one["generation"] for one in daemon.forks()] == [2]


def test_the_latency_is_counted_from_the_kernels_record(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        guest.fork(fresh_id())
        assert 0 < daemon.settled(2)["detect_latency_us"] < 2_000_000


def test_a_line_of_another_facility_is_no_event(guest: FakeGuest) -> None:
    # Without a readable ID the line alone decides.
    Path(guest.paths.fw_cfg_guid).unlink()
    with RunningDaemon(guest) as daemon:
        guest.kmsg_line("random: crng reseeded due to virtual machine fork", facility=1)
        guest.kmsg_line("random: crng init done")
        guest.reseed_line()
        assert daemon.settled(2)["generation"] == 2
        assert len(daemon.forks()) == 1


def test_the_same_id_again_is_no_event(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        guest.reseed_line()
        guest.fork(fresh_id())
        daemon.settled(2)
        guest.reseed_line()
        guest.fork(fresh_id())
        assert daemon.settled(3)["generation"] == 3
        assert generation(guest) == 3


def test_ten_lines_with_ten_ids_each_awaited_are_ten_events(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        tokens = set()
        for number in range(2, 12):
            guest.fork(fresh_id())
            eventually(lambda wanted=number: generation(guest) == wanted)  # type: ignore[misc]
            tokens.add(read_page(guest.paths.generation_page).token)
        daemon.settled(11)
        assert len(tokens) == 10
        assert [one["generation"] for one in daemon.forks()] == list(range(2, 12))


def test_a_line_in_pieces_is_one_line(guest: FakeGuest) -> None:
    Path(guest.paths.fw_cfg_guid).unlink()
    with RunningDaemon(guest) as daemon:
        guest.kmsg_bytes(b"5,900,1,-;random: crng reseeded due to ")
        guest.kmsg_bytes(b"virtual machine fork\n")
        assert daemon.settled(2)["edges"] == ["kmsg"]


def test_garbage_in_the_kernels_log_changes_nothing(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        guest.kmsg_bytes(b"\x00\xff;;;,,,\n" * 100 + b"x" * 3000 + b"\n")
        guest.fork(fresh_id())
        assert daemon.settled(2)["generation"] == 2


def test_a_change_that_an_answer_saw_first_is_an_event(guest: FakeGuest) -> None:
    # A read of vmclock takes its notification: a difference seen while answering must not wait for another edge.
    guest.unbind_driver()
    guest.put(guest.paths.config_etc + "/vmfork.conf", b"[Detect]\nPollIntervalSec=60\n")
    with RunningDaemon(guest) as daemon:
        guest.set_generation_id(fresh_id())
        assert daemon.status()["generation"] == 1
        assert daemon.settled(2)["kind"] == "live"


def test_without_a_bound_driver_the_timer_notices(guest: FakeGuest) -> None:
    guest.unbind_driver()
    poll_quickly(guest)
    with RunningDaemon(guest) as daemon:
        assert daemon.status()["detection"] == "timer"
        guest.set_generation_id(fresh_id())
        event = daemon.settled(2)
        assert (event["edges"], event["detect_latency_us"]) == (["timer"], None)


def test_after_a_suspension_that_left_acpi_dead_the_timer_notices(guest: FakeGuest) -> None:
    poll_quickly(guest)
    with RunningDaemon(guest) as daemon:
        assert daemon.status()["detection"] == "event"
        guest.resume_with_dead_acpi()
        eventually(lambda: daemon.status()["detection"] == "timer")
        # The kernel hears nothing of it.
        guest.set_generation_id(fresh_id())
        assert daemon.settled(2)["edges"] == ["timer"]
        doctor = daemon.ctl("doctor")
        assert doctor.returncode == 0
        assert "rebooting the guest helps" in " ".join(doctor.stdout.split())


def test_a_suspension_that_acpi_survives_changes_nothing(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        guest.set_gpe("EN    ")
        guest.kmsg_line(RESUME_LINE)
        # So that the line of the fork is not what comes after its ID was seen.
        assert daemon.ctl("reload").returncode == 0
        guest.fork(fresh_id())
        event = daemon.settled(2)
        assert (event["generation"], event["edges"]) == (2, ["kmsg"])
        assert daemon.status()["detection"] == "event"


def test_a_line_about_a_fork_that_the_timer_saw_already_is_not_another_one(guest: FakeGuest) -> None:
    poll_quickly(guest)
    guest.set_vmclock(counter=1)
    with RunningDaemon(guest) as daemon:
        guest.set_vmclock(counter=2, seq=4)
        eventually(lambda: generation(guest) == 2)
        guest.reseed_line()
        daemon.settled(2)
        assert len(daemon.forks()) == 1


def test_the_memory_that_acpi_names_is_read_and_opened_once(guest: FakeGuest) -> None:
    address, new = 0xE0000, fresh_id()
    table = f'Device (\\_SB.VGEN) {{ Name (_HID, "VMGENCTR") Name (ADDR, Package () {{ {address}, 0 }}) }}'
    Path(guest.paths.fw_cfg_guid).unlink()
    guest.put(f"{guest.paths.acpi_tables}/DSDT", asl.dsdt(table))
    for name, text in (("modalias", "acpi:VMGENCTR:VM_GEN_COUNTER:"), ("path", "\\_SB_.VGEN"), ("hid", "VMGENCTR")):
        guest.put(f"{guest.paths.acpi_devices}/VMGENCTR:00/{name}", f"{text}\n".encode())
    guest.put(guest.paths.physical_memory, bytes(address) + fresh_id())
    with RunningDaemon(guest) as daemon:
        assert _source(daemon, "acpi")["live"]
        before = os.listdir(f"/proc/{daemon.pid}/fd")
        for _ in range(5):
            assert daemon.ctl("reload").returncode == 0
        eventually(lambda: len(os.listdir(f"/proc/{daemon.pid}/fd")) <= len(before))
        guest.put(guest.paths.physical_memory, bytes(address) + new)
        guest.reseed_line()
        assert daemon.settled(2)["generation_id"] == new.hex()


def test_a_changed_vmclock_counter_is_an_event(guest: FakeGuest) -> None:
    Path(guest.paths.fw_cfg_guid).unlink()
    poll_quickly(guest)
    guest.set_vmclock(counter=7)
    with RunningDaemon(guest) as daemon:
        guest.set_vmclock(counter=6, seq=4)
        assert daemon.settled(2)["kind"] == "live"


def test_a_clock_disruption_alone_is_published_and_no_event(guest: FakeGuest) -> None:
    poll_quickly(guest)
    guest.set_vmclock(counter=7, disruption=1)
    with RunningDaemon(guest) as daemon:
        guest.set_vmclock(counter=7, disruption=2, seq=4)
        eventually(lambda: "1 clock disruptions" in str(daemon.status()["sources"]))
        guest.fork(fresh_id())
        daemon.settled(2)
        assert len(daemon.forks()) == 1


def test_a_truncated_generation_id_is_absent_and_no_event(guest: FakeGuest) -> None:
    guest.unbind_driver()
    poll_quickly(guest)
    new = fresh_id()
    with RunningDaemon(guest) as daemon:
        guest.put(guest.paths.fw_cfg_guid, b"\0" * 41)
        eventually(lambda: not _source(daemon, "fwcfg")["live"])
        guest.set_generation_id(bytes.fromhex("443322116655887799aabbccddeeff00"))
        eventually(lambda: _source(daemon, "fwcfg")["live"])
        guest.set_generation_id(new)
        assert daemon.settled(2)["generation_id"] == new.hex()
        assert len(daemon.forks()) == 1


def test_a_truth_that_is_gone_is_reported_once_each_time(guest: FakeGuest, capfd: pytest.CaptureFixture[str]) -> None:
    guest.unbind_driver()
    poll_quickly(guest)
    with RunningDaemon(guest) as daemon:
        for _ in range(2):
            Path(guest.paths.fw_cfg_guid).unlink()
            eventually(lambda: not _source(daemon, "fwcfg")["live"])
            daemon.ctl("reload")
            guest.set_generation_id(bytes.fromhex("443322116655887799aabbccddeeff00"))
            eventually(lambda: _source(daemon, "fwcfg")["live"])
        assert daemon.forks() == []
    assert capfd.readouterr().err.count("vmforkd: WARNING: fwcfg can no longer be read: ") == 2


def test_an_edge_that_is_gone_is_reported_and_the_timer_takes_over(
    guest: FakeGuest, capfd: pytest.CaptureFixture[str]
) -> None:
    new = fresh_id()
    with RunningDaemon(guest) as daemon:
        guest.unbind_driver()
        for _ in range(2):
            daemon.ctl("reload")
        assert daemon.status()["detection"] == "timer"
        guest.set_generation_id(new)
        assert daemon.settled(2)["generation_id"] == new.hex()
    assert capfd.readouterr().err.count("vmforkd: WARNING: kmsg no longer announces forks: no device is bound") == 1


def _source(daemon: RunningDaemon, name: str) -> dict[str, object]:
    return next(one for one in daemon.status()["sources"] if one["name"] == name and one["role"] == "truth")


def test_all_zero_is_a_generation_id(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        guest.fork(bytes(16))
        assert daemon.settled(2)["generation_id"] == "00" * 16


def test_a_change_while_the_daemon_is_down_is_one_live_event(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        daemon.stop()
        guest.set_generation_id(fresh_id())
        daemon.start()
        assert daemon.settled(2)["kind"] == "live"
        daemon.stop()
        daemon.start()
        assert len(daemon.forks()) == 1


def test_a_change_over_a_boot_is_one_cold_event(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        daemon.stop()
        guest.set_generation_id(fresh_id())
        guest.set_boot_id(OTHER_BOOT)
        daemon.start()
        assert daemon.settled(2)["kind"] == "cold"
        assert len(daemon.forks()) == 1


def test_a_change_over_a_boot_that_emptied_run_is_one_cold_event(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        daemon.stop()
        for path in (guest.paths.generation_page, guest.paths.detector_memory):
            Path(path).unlink()
        guest.set_generation_id(fresh_id())
        guest.set_boot_id(OTHER_BOOT)
        daemon.start()
        assert (daemon.settled(2)["kind"], daemon.settled(2)["identity"]["policy"]) == ("cold", "keep")


def test_an_early_boot_that_ran_out_of_time_ends_at_once_and_the_daemon_takes_over(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        daemon.stop()
        guest.set_generation_id(fresh_id())
        guest.set_boot_id(OTHER_BOOT)
        write_hook(guest, "10-slow", SLOW.format(what="$VMFORK_FORK_TOKEN"))
        command = [sys.executable, "-m", "vmfork.daemon", "--root", str(guest.root), "--boot"]
        with subprocess.Popen(command, env=environment()) as boot:
            eventually(lambda: (guest.root / "ran").exists())
            # What the unit's TimeoutStartSec= does; TimeoutStopSec= is 5 s.
            boot.terminate()
            boot.wait(5)
        (guest.root / "go").touch()
        daemon.start()
        event = daemon.settled(2)
        assert (event["kind"], event["state"], event["hooks"][0]["result"]) == ("cold", "settled", "ok")
        assert (guest.root / "ran").read_text().split() == [event["token"]] * 2


def test_a_plain_boot_is_no_event(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        daemon.stop()
        guest.set_boot_id(OTHER_BOOT)
        daemon.start()
        assert (daemon.status()["generation"], daemon.forks()) == (1, [])


def test_a_cold_fork_with_another_smbios_uuid_rotates_the_identity(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        clone_cold(guest, daemon)
        daemon.start()
        identity = daemon.settled(2)["identity"]
        assert identity["policy"] == "rotate"
        assert "SMBIOS" in identity["reason"]


def test_a_fork_that_supersedes_a_rotation_takes_it_over(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        clone_cold(guest, daemon)
        write_hook(guest, "10-slow", SLOW.format(what="$VMFORK_GENERATION $VMFORK_IDENTITY"))
        daemon.start()
        eventually(lambda: (guest.root / "ran").exists())
        assert daemon.ctl("trigger").returncode == 0
        eventually(lambda: "3 rotate" in (guest.root / "ran").read_text())
        (guest.root / "go").touch()
        guest.fork(fresh_id())
        assert daemon.settled(4)["identity"]["policy"] == "rotate"
        assert [one["state"] for one in daemon.forks()] == ["superseded", "superseded", "settled"]
        # It is done now, and owed no more.
        guest.fork(fresh_id())
        assert daemon.settled(5)["identity"]["policy"] == "keep"


def test_a_cold_fork_whose_id_can_be_read_only_later_is_still_one_with_its_evidence(guest: FakeGuest) -> None:
    guest.set_smbios_uuid("11111111-2222-3333-4444-555555555555")
    with RunningDaemon(guest) as daemon:
        daemon.stop()
        Path(guest.paths.detector_memory).unlink()
        Path(guest.paths.fw_cfg_guid).unlink()
        guest.set_boot_id(OTHER_BOOT)
        guest.set_smbios_uuid("99999999-2222-3333-4444-555555555555")
        daemon.start()
        guest.set_generation_id(fresh_id())
        assert daemon.ctl("reload").returncode == 0
        event = daemon.settled(2)
        assert (event["kind"], event["identity"]["policy"]) == ("cold", "rotate")


@pytest.mark.parametrize(("instance", "policy"), [("i-another", "rotate"), ("i-same", "keep")])
def test_a_cloud_that_names_the_instance_only_after_the_early_boot_is_heard(
    guest: FakeGuest, instance: str, policy: str
) -> None:
    guest.set_instance_id("i-same")
    with RunningDaemon(guest) as daemon:
        daemon.stop()
        guest.set_generation_id(fresh_id())
        guest.set_boot_id(OTHER_BOOT)
        write_hook(guest, "10-note", 'echo "$VMFORK_IDENTITY" >>"$VMFORK_ROOT/ran"')
        command = [sys.executable, "-m", "vmfork.daemon", "--root", str(guest.root), "--boot"]
        boot = subprocess.run(command, env=environment(), check=True, timeout=60, capture_output=True, text=True)
        assert "without a result" not in boot.stderr
        # What cloud-init does later in the boot, before vmforkd's turn.
        guest.set_instance_id(instance)
        daemon.start()
        event = daemon.settled(2)
        assert (event["kind"], event["identity"]["policy"]) == ("cold", policy)
        assert "cloud instance-id" in event["identity"]["reason"]
        assert len(daemon.forks()) == 1
        # What has run with the right policy is not run again.
        assert (guest.root / "ran").read_text().split() == (["keep", "rotate"] if policy == "rotate" else ["keep"])
        daemon.stop()
        daemon.start()
        assert len(daemon.forks()) == 1, "the new name is what the next boot compares with"


def test_another_smbios_uuid_alone_is_no_event(guest: FakeGuest) -> None:
    guest.set_smbios_uuid("11111111-1111-1111-1111-111111111111")
    with RunningDaemon(guest) as daemon:
        daemon.stop()
        guest.set_boot_id(OTHER_BOOT)
        guest.set_smbios_uuid("22222222-1111-1111-1111-111111111111")
        daemon.start()
        assert daemon.forks() == []


def test_the_vmclock_counter_is_not_compared_over_a_boot(guest: FakeGuest) -> None:
    guest.set_vmclock(counter=5)
    with RunningDaemon(guest) as daemon:
        daemon.stop()
        guest.set_vmclock(counter=0)
        guest.set_boot_id(OTHER_BOOT)
        daemon.start()
        assert daemon.forks() == []


def test_a_fork_whose_reaction_was_cut_off_by_a_kill_is_reacted_to_after_the_restart(guest: FakeGuest) -> None:
    write_hook(guest, "10-slow", SLOW.format(what="$VMFORK_FORK_TOKEN"))
    with RunningDaemon(guest) as daemon:
        guest.fork(fresh_id())
        eventually(lambda: (guest.root / "ran").exists())
        daemon.kill()
        (guest.root / "go").touch()
        daemon.start()
        event = daemon.settled(2)
        assert (event["state"], event["hooks"][0]["result"]) == ("settled", "ok")
        assert set((guest.root / "ran").read_text().split()) == {event["token"]}


def test_a_fork_during_a_reaction_supersedes_it(guest: FakeGuest) -> None:
    write_hook(guest, "10-slow", SLOW.format(what="$VMFORK_GENERATION"))
    with RunningDaemon(guest) as daemon:
        guest.fork(fresh_id())
        eventually(lambda: (guest.root / "ran").exists())
        (guest.root / "go").touch()
        guest.fork(fresh_id())
        assert daemon.settled(3)["state"] == "settled"
        first, second = daemon.forks()
        assert (first["state"], first["hooks"][0]["result"]) == ("superseded", "interrupted")
        assert (second["state"], second["hooks"][0]["result"]) == ("settled", "ok")
        assert (guest.root / "ran").read_text().split() == ["2", "3"]


def test_hooks_run_in_order_and_a_failure_does_not_stop_the_others(guest: FakeGuest) -> None:
    write_hook(guest, "10-a", 'echo a >> "$VMFORK_ROOT/ran"; exit 3')
    write_hook(guest, "20-b", 'echo b >> "$VMFORK_ROOT/ran"; exit 77')
    write_hook(guest, "30-c", 'echo c >> "$VMFORK_ROOT/ran"')
    with RunningDaemon(guest) as daemon:
        guest.fork(fresh_id())
        event = daemon.settled(2)
        assert [(one["name"], one["result"]) for one in event["hooks"]] == [
            ("10-a", "failed"),
            ("20-b", "skipped"),
            ("30-c", "ok"),
        ]
        assert event["state"] == "failed"
        assert (guest.root / "ran").read_text().split() == ["a", "b", "c"]


def test_a_hook_gets_the_event_and_no_generation_id_in_its_environment(guest: FakeGuest) -> None:
    new = fresh_id()
    write_hook(guest, "10-env", 'env > "$VMFORK_ROOT/env"; cat > "$VMFORK_ROOT/stdin"')
    with RunningDaemon(guest) as daemon:
        guest.fork(new)
        token = daemon.settled(2)["token"]
    environment = (guest.root / "env").read_text()
    assert f"VMFORK_FORK_TOKEN={token}" in environment
    assert new.hex() not in environment
    assert json.loads((guest.root / "stdin").read_text())["token"] == token


def test_the_page_keeps_its_inode_over_restarts(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        before = os.stat(guest.paths.generation_page)
        daemon.kill()
        daemon.start()
        after = os.stat(guest.paths.generation_page)
        assert (before.st_ino, stat.S_IMODE(after.st_mode), after.st_size) == (after.st_ino, 0o444, 4096)


def test_a_stopped_daemon_leaves_nobody_watches_on_the_page(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        assert read_page(guest.paths.generation_page).detection == DETECTION_EVENT
        daemon.stop()
        assert read_page(guest.paths.generation_page).detection == DETECTION_NONE


def test_the_timer_alone_is_on_the_page(guest: FakeGuest) -> None:
    guest.unbind_driver()
    with RunningDaemon(guest):
        assert read_page(guest.paths.generation_page).detection == DETECTION_TIMER


def test_a_killed_daemons_page_is_corrected_by_its_unit(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        daemon.kill()
        assert read_page(guest.paths.generation_page).detection == DETECTION_EVENT
        assert vmforkd(guest, "--nobody-watches").returncode == 0
        assert read_page(guest.paths.generation_page).detection == DETECTION_NONE


def test_a_root_of_any_length_works(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["a-directory-with-a-long-name"] * 8)
    deep.mkdir(parents=True)
    with FakeGuest(deep / "guest") as guest, RunningDaemon(guest) as daemon:
        guest.fork(fresh_id())
        assert daemon.settled(2)["generation"] == 2


def test_a_broken_configuration_is_reported_and_the_daemon_runs(guest: FakeGuest) -> None:
    guest.put(guest.paths.config_etc + "/vmfork.conf", b"[Detect]\nPollIntervalSec=never\n")
    with RunningDaemon(guest) as daemon:
        assert any("vmfork.conf:2:" in problem for problem in daemon.status()["problems"])
        assert daemon.ctl("doctor").returncode == 1


def test_a_broken_state_file_is_set_aside_and_reported(guest: FakeGuest) -> None:
    guest.put(guest.paths.state, b'{"generation": "many"')
    guest.put(guest.paths.detector_memory, b"\xff\x00")
    with RunningDaemon(guest) as daemon:
        assert len(daemon.status()["problems"]) >= 2
        assert Path(guest.paths.state + ".broken").exists()
        guest.fork(fresh_id())
        assert daemon.settled(2)["generation"] == 2


def test_a_guest_with_nothing_cannot_notice_and_doctor_says_so(tmp_path: Path) -> None:
    with FakeGuest(tmp_path / "guest", generation_id=None) as guest:
        guest.unbind_driver()
        with RunningDaemon(guest) as daemon:
            run = daemon.ctl("doctor")
            assert run.returncode == 4
            assert run.stdout.startswith("This guest cannot notice that it was forked.")
            assert read_page(guest.paths.generation_page).detection == DETECTION_NONE


def test_doctor_without_a_daemon_exits_3(guest: FakeGuest) -> None:
    run = vmforkctl(guest, "doctor")
    assert run.returncode == 3
    assert "vmforkd is not running" in run.stdout


def test_status_without_a_daemon_prints_the_page_and_exits_3(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        guest.fork(fresh_id())
        daemon.settled(2)
        daemon.stop()
    run = vmforkctl(guest, "status", "--json=short")
    assert run.returncode == 3
    assert (json.loads(run.stdout)["generation"], json.loads(run.stdout)["detection"]) == (2, "none")


def test_a_trigger_is_a_manual_event_that_keeps_the_identity(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        event = json.loads(daemon.ctl("trigger", "--reason", "a test", "--json=short").stdout)
        assert (event["kind"], event["edges"], event["identity"]["policy"]) == ("manual", ["manual"], "keep")
        assert daemon.settled(2)["kind"] == "manual"


def test_wait_times_out_with_124(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        assert daemon.ctl("wait", "--timeout", "0.2").returncode == 124


def test_wait_sees_a_fork_that_happened_before_it_was_called(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        guest.fork(fresh_id())
        daemon.settled(2)
        run = daemon.ctl("wait", "--after", "1", "--timeout", "10", "--json=short")
        assert (run.returncode, json.loads(run.stdout)["generation"]) == (0, 2)


def test_the_history_survives_a_restart(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        for number in (2, 3):
            guest.fork(fresh_id())
            daemon.settled(number)
        daemon.stop()
        assert [one["generation"] for one in json.loads(vmforkctl(guest, "list", "-j").stdout)] == [2, 3]


def test_the_generation_never_goes_back_over_a_boot(guest: FakeGuest) -> None:
    with RunningDaemon(guest) as daemon:
        guest.fork(fresh_id())
        daemon.settled(2)
        daemon.stop()
        for path in (guest.paths.generation_page, guest.paths.detector_memory):
            Path(path).unlink()
        guest.set_boot_id(OTHER_BOOT)
        daemon.start()
        assert daemon.status()["generation"] == 2


def test_the_public_socket_shows_no_generation_id(guest: FakeGuest) -> None:
    from vmfork.varlink.client import Client

    with RunningDaemon(guest) as daemon:
        guest.fork(fresh_id())
        daemon.settled(2)
        with Client.connect(guest.paths.public_socket) as client:
            status = client.call("io.vmfork.GetStatus", {})["status"]
            assert isinstance(status, dict)
            assert status["generation_id"] is None
            assert status["generation_tag"]
            assert daemon.status()["generation_id"] is not None


def test_the_public_socket_grants_nothing(guest: FakeGuest) -> None:
    from vmfork.varlink.client import Client, RemoteError

    with RunningDaemon(guest), Client.connect(guest.paths.public_socket) as client:
        for method in ("Trigger", "Reload", "Prepare", "Resume", "BeginReaction"):
            with pytest.raises(RemoteError) as refused:
                client.call(f"io.vmfork.{method}", {})
            assert refused.value.name == "io.vmfork.PermissionDenied"
