"""`moe-runtime doctor`, on this machine and on machines that are broken on purpose."""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.cli.doctor import machine, network, software, wandb_state
from moe_runtime.cli.doctor.command import page
from moe_runtime.cli.doctor.finding import Finding, exit_code, ok
from tests.cli.small_run import ROOT

_AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="name spaces and mounts need root")
_DOCTOR = f"{sys.executable} -m moe_runtime doctor --json"


def diagnose(*command: str, **environment: str) -> tuple[int, dict[str, Any]]:
    """Exit code and findings by name of a doctor in a process of its own."""
    done = subprocess.run(
        command or ("sh", "-c", _DOCTOR),
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'comm'}"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    said = json.loads(done.stdout)
    assert said["exit_code"] == done.returncode
    for one in said["findings"]:
        assert (one["state"] == "ok") == (one["mend"] is None), one
        assert "\n" not in f"{one['said']}{one['mend']}", one
    return done.returncode, {one["name"]: one for one in said["findings"]}


def test_here_ranks_meet_over_gloo_and_all_rooms_were_looked_at() -> None:
    code, found = diagnose()
    assert found["torch"]["state"] == "ok" and found["gloo"]["state"] == "ok"
    assert {"packages", "MPI", "/dev/shm", "disk", "hostname", "ports", "W&B", "clock"} <= set(found)
    assert code == 2 * any(one["state"] == "fail" for one in found.values()) or code == 1


@_AS_ROOT
def test_without_a_network_the_doctor_says_how_to_get_the_loopback_back() -> None:
    strange = "no-such-name-anywhere"
    inside = f"hostname {strange}; {_DOCTOR}"
    code, found = diagnose("unshare", "--net", "--uts", "sh", "-c", inside)
    assert code == 2
    assert found["loopback"]["state"] == "fail" and found["loopback"]["mend"] == "ip link set lo up"
    assert found["gloo"]["state"] == "fail"
    assert found["hostname"]["state"] == "warn"
    assert found["hostname"]["mend"] == f"echo '127.0.1.1 {strange}' >> /etc/hosts"


@pytest.mark.slow
@_AS_ROOT
def test_loopback_alone_is_enough_for_a_machine_of_its_own() -> None:
    _, found = diagnose("unshare", "--net", "sh", "-c", f"ip link set lo up; {_DOCTOR}")
    assert found["loopback"]["state"] == "ok" and found["gloo"]["state"] == "ok"
    assert "no other machine reaches this one" in found["interfaces"]["said"]


def test_what_is_broken_in_the_environment_is_told_each_with_its_remedy(tmp_path: Path) -> None:
    """A torch that cannot be imported, a rank's variables, an interface that is not there, no key shown."""
    (tmp_path / "torch.py").write_text(
        "raise ImportError('libcudart.so.13: cannot open shared object file')\n"
    )
    code, found = diagnose(
        PYTHONPATH=f"{tmp_path}:{ROOT}:{ROOT / 'comm'}",
        GLOO_SOCKET_IFNAME="nosuch0",
        RANK="3",
        WORLD_SIZE="8",
        WANDB_API_KEY="0123456789012345678901234567890123456789",
    )
    assert code == 2
    assert "libcudart.so.13" in found["torch"]["said"] and found["torch"]["mend"].startswith("pip install")
    assert found["GLOO_SOCKET_IFNAME"]["mend"] == "unset GLOO_SOCKET_IFNAME"
    assert found["variables"]["mend"] == "unset RANK WORLD_SIZE"
    assert "a key is there" in found["W&B"]["said"] and "0123456789" not in json.dumps(found)


@pytest.mark.slow
def test_what_hangs_is_ended_and_told(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import time; time.sleep(300)\n")
    code, found = diagnose(PYTHONPATH=f"{tmp_path}:{ROOT}:{ROOT / 'comm'}")
    assert code == 2 and "no answer" in found["torch"]["said"]


@pytest.mark.slow
def test_an_empty_path_and_no_home_are_no_hindrance() -> None:
    _, found = diagnose(sys.executable, "-m", "moe_runtime", "doctor", "--json", PATH="/none", HOME="/none")
    assert found["C++ compiler"]["mend"] == "apt install g++"
    assert found["gloo"]["state"] == "ok"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_a_failure_and_little_shared_memory_a_warning(tiny_disk: Path) -> None:
    disk = machine._disk("disk", tiny_disk)
    assert disk.state == "fail" and "expected 0.5 GB" in disk.said
    shared = machine._shared_memory(tiny_disk, has_gpu=False)
    assert shared.state == "warn" and shared.mend == f"mount -o remount,size=8G {tiny_disk}"
    assert machine._shared_memory(tiny_disk / "none", has_gpu=False).state == "warn"


def test_a_clock_before_the_time_of_our_own_files_is_a_failure() -> None:
    import time

    assert machine._clock(time.time() + 3600).state == "fail"
    assert machine._clock(time.time() - 3600).state in ("ok", "note")


@pytest.mark.parametrize(("text", "cores"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("?", None)])
def test_a_quota_of_processor_time_is_read(text: str, cores: float | None, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert machine._quota(tmp_path / "cpu.max") == cores
    assert machine._quota(tmp_path / "none") is None


def test_a_port_that_is_taken_is_told_with_another_that_is_free() -> None:
    with socket.socket() as taken:
        try:
            taken.bind(("0.0.0.0", 29500))
            taken.listen()
        except OSError as error:
            assert error.errno == errno.EADDRINUSE  # somebody else has it, which is as good
        found = network._port()
    assert found.state == "warn" and "HOST:" in found.said and found.mend == "ss -ltnp 'sport = :29500'"


def test_a_package_out_of_range_is_told_with_the_command_that_gets_it() -> None:
    from packaging.requirements import Requirement

    assert software._fault(Requirement("numpy>=1")) is None
    wanted, said = software._fault(Requirement("numpy>=99")) or (None, "")
    assert wanted is not None and said.startswith("expected >=99, got ")
    assert software._fault(Requirement("no-such-package-anywhere")) is not None


def test_a_broken_netrc_is_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "netrc"
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(file))
    monkeypatch.chdir(tmp_path)
    for text, state in (
        ("machine api.wandb.ai login user password abc\n", "ok"),
        ("machine\n", "note"),
        ("machine elsewhere login a password b\n", "note"),
    ):
        file.write_text(text)
        file.chmod(0o600)
        (found,) = wandb_state.look()
        assert found.state == state and "abc" not in found.said


def test_the_page_has_a_command_below_each_fault_and_the_worst_decides() -> None:
    findings = [ok("a", "fine"), Finding("bb", "note", "more to have", "get it")]
    assert exit_code(findings) == 0 and page(findings).endswith("moe-runtime train quickstart")
    findings.append(Finding("c", "warn", "odd", "mend it"))
    assert exit_code(findings) == 1
    findings.append(Finding("d", "fail", "broken", "mend that"))
    assert exit_code(findings) == 2
    lines = page(findings).splitlines()
    assert lines[1:3] == ["note  bb  more to have", "          -> get it"]
    assert lines[-1] == "1 to mend before runs will work, 1 to look at"
