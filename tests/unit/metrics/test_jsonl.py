"""metrics.jsonl is complete, has no step twice, and survives what happens to its process and disk."""

import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from moe_runtime.metrics.jsonl import JsonLines, last_of, read_jsonl


def write(path: Path, *steps: int) -> None:
    lines = JsonLines(path)
    for step in steps:
        assert lines.append({"step": step}) is None
    lines.close()


def steps_in(path: Path) -> list[int]:
    return [fields["step"] for fields in read_jsonl(path)]


def test_every_line_is_on_file_at_once(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.append({"step": 1})
    assert steps_in(tmp_path / "m.jsonl") == [1]
    lines.close()


def test_resuming_removes_the_steps_that_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, 1, 2, 3, 4, 5)
    lines = JsonLines(path, keep_to_step=3)
    assert steps_in(path) == [1, 2, 3]
    lines.append({"step": 4})
    lines.close()
    assert steps_in(path) == [1, 2, 3, 4]


def test_starting_over_empties_the_file(tmp_path: Path) -> None:
    write(tmp_path / "m.jsonl", 1, 2)
    JsonLines(tmp_path / "m.jsonl", keep_to_step=0).close()
    assert steps_in(tmp_path / "m.jsonl") == []


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b'{"step": 3}', b"\x00\x00\x00", b"[1]\n", b"\xff\n"])
def test_a_torn_last_line_is_tolerated_and_overwritten(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "m.jsonl"
    write(path, 1, 2)
    path.write_bytes(path.read_bytes() + tail)
    assert steps_in(path) == [1, 2]
    write(path, 3)
    assert steps_in(path) == [1, 2, 3]
    assert path.read_bytes().endswith(b'{"step": 2}\n{"step": 3}\n')


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert steps_in(tmp_path / "none.jsonl") == []


def test_nothing_is_lost_when_the_process_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            lines = JsonLines(path)
            for step in range(1, 1_000_000):
                lines.append({"step": step})
                os.write(writer, b".")
        finally:
            os._exit(1)
    finished = len(os.read(reader, 10))
    time.sleep(0.005)
    os.set_blocking(reader, False)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    finished += len(os.read(reader, 1 << 20))
    os.close(reader)
    os.close(writer)
    steps = steps_in(path)
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= finished


def test_a_line_that_finds_no_room_waits_and_is_written_later(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    lines = JsonLines(path)
    assert lines.append({"step": 1}) is None
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (18, before[1]))  # room for a line and a half
        reason = lines.append({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert reason is not None and str(path) in reason
    assert path.read_bytes() == b'{"step": 1}\n', "half a line was left"
    assert lines.append({"step": 3}) is None
    lines.close()
    assert steps_in(path) == [1, 2, 3]


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        lines = JsonLines(folder / "m.jsonl")
        ballast = folder / "ballast"
        with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        reasons = {lines.append({"step": step}) for step in range(1, 101)}
        assert reasons == {f"{folder / 'm.jsonl'}: No space left on device"}
        ballast.unlink()
        lines.close()
        assert steps_in(folder / "m.jsonl") == list(range(1, 101))
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_roll_back_removes_later_steps_written_or_waiting(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    lines = JsonLines(path)
    for step in (1, 2, 3):
        lines.append({"step": step})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, limits[1]))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        assert lines.append({"step": 4}) is not None, "the disk is full: the line waits"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    lines.keep_to(2)
    lines.append({"step": 3})
    lines.close()
    assert steps_in(path) == [1, 2, 3]


@pytest.mark.parametrize("kept", [0, 3, 7, 40, 99])
def test_the_last_line_is_found_without_reading_the_others(tmp_path: Path, kept: int) -> None:
    path, file = tmp_path / "f", JsonLines(tmp_path / "f")
    for step in range(kept):
        file.append({"step": step, "text": "x" * (5000 * step)})  # up to a few times what is read at once
    file.close()
    with path.open("a") as torn:
        torn.write('{"step": 100, "te')
    found = last_of(path)
    assert found == (None if not kept else {"step": kept - 1, "text": "x" * (5000 * (kept - 1))})
    assert last_of(tmp_path / "none") is None


def test_a_line_that_begins_as_a_record_and_is_torn_ends_the_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 2.\x00\x00\n{"step": 3, "loss": 2.0}\n')
    JsonLines(path, keep_to_step=9).close()
    assert [line["step"] for line in read_jsonl(path)] == [1]
