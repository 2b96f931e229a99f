"""A save behind the training holds what was there when it began, and is reported however it ends."""

import errno
import os
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from moe_runtime.checkpoint.background import BackgroundSaver
from moe_runtime.checkpoint.disk import check_on_disk
from moe_runtime.checkpoint.folder import find_latest_good, open_checkpoint
from moe_runtime.checkpoint.optimizer import read_partitions
from moe_runtime.checkpoint.snapshot import HostCopy
from moe_runtime.checkpoint.store import CheckpointStore, Contribution, Saved, SaveFailed
from moe_runtime.checkpoint.tensors import read_tensors
from moe_runtime.errors import CheckpointError
from moe_runtime.parallel.peers import Peers
from tests.file_limit import largest_file
from tests.unit.checkpoint.samples import META, contribution, partition, weights


class Gate:
    """Holds a writing thread at one point until it is opened."""

    def __init__(self, point: str) -> None:
        self.point, self.reached, self.opened = point, threading.Event(), threading.Event()

    def __call__(self, point: str) -> None:
        if point == self.point:
            self.reached.set()
            assert self.opened.wait(60), "nobody opened the gate"


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_steps_taken_while_a_checkpoint_is_written_do_not_show_in_it(tmp_path: Path) -> None:
    gate = Gate("write")
    saver = BackgroundSaver(CheckpointStore(tmp_path, Peers(), 2, gate))
    live = contribution(10)
    saver.start(10, live, META)
    assert gate.reached.wait(60)
    for tensor in [*live.weights.values(), *live.optimizer().values()]:
        tensor.zero_()  # the training goes on, and the disk is slow
    assert saver.take() is None and saver.running_step == 10
    assert names(tmp_path) == [".tmp-step_00000010"], "half written, under a name that nobody reads"
    assert find_latest_good(tmp_path / "checkpoints").checkpoint is None
    gate.opened.set()
    report = saver.wait()
    assert report is not None and isinstance(report.outcome, Saved) and report.step == 10
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in read_tensors(checkpoint, weights(10)):
        assert torch.equal(tensor, weights(10)[name])
    (state,) = read_partitions(checkpoint, 0).values()
    for key, tensor in partition(10).tensors.items():
        assert torch.equal(state.tensors[key].view(torch.uint8), tensor.view(torch.uint8))
    assert saver.take() is None and saver.wait() is None, "a report is given once"


def test_a_checkpoint_is_not_there_before_its_rename(tmp_path: Path) -> None:
    gate = Gate("rename")
    saver = BackgroundSaver(CheckpointStore(tmp_path, Peers(), 2, gate))
    saver.start(10, contribution(10), META)
    assert gate.reached.wait(60)
    assert (tmp_path / "checkpoints" / ".tmp-step_00000010" / "manifest.json").exists()
    assert find_latest_good(tmp_path / "checkpoints").checkpoint is None
    gate.opened.set()
    assert saver.wait() is not None and names(tmp_path) == ["step_00000010"]


def test_the_buffers_are_made_once_and_made_anew_for_tensors_of_another_form() -> None:
    copy = HostCopy()
    first = copy.take(contribution(10)).wait().weights
    second = copy.take(contribution(20)).wait().weights
    for name, tensor in second.items():
        assert tensor.data_ptr() == first[name].data_ptr() and torch.equal(tensor, weights(20)[name])
    longer = {"embed.weight": torch.ones(7, 4)}
    third = copy.take(Contribution(longer)).wait().weights
    assert torch.equal(third["embed.weight"], longer["embed.weight"])


def test_a_writer_that_fails_costs_one_checkpoint_and_the_next_is_written(tmp_path: Path) -> None:
    def refuse(point: str) -> None:
        if point == "write":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    store = CheckpointStore(tmp_path, Peers(), 2)
    saver = BackgroundSaver(store)
    for point_of_failure in (refuse, None):
        store.at = point_of_failure or (lambda point: None)
        saver.start(10, contribution(10), META)
        report = saver.wait()
        assert report is not None
        if point_of_failure:
            assert isinstance(report.outcome, SaveFailed) and "Input/output error" in report.outcome.message
            assert names(tmp_path) == [], "nothing is left of the attempt"
    assert isinstance(report.outcome, Saved) and names(tmp_path) == ["step_00000010"]


def test_a_writer_that_dies_of_something_else_raises_where_the_training_asks(tmp_path: Path) -> None:
    def leave(point: str) -> None:
        if point == "write":
            raise SystemExit(5)

    saver = BackgroundSaver(CheckpointStore(tmp_path, Peers(), 2, leave))
    saver.start(10, contribution(10), META)
    with pytest.raises(SystemExit):
        saver.wait()
    assert saver.running_step is None


def test_a_quota_costs_the_checkpoint_says_how_much_it_needs_and_leaves_nothing(tmp_path: Path) -> None:
    saver = BackgroundSaver(CheckpointStore(tmp_path, Peers(), 2))
    saver.start(10, contribution(10), META)
    assert saver.wait() is not None
    with largest_file(1 << 20):
        saver.start(20, Contribution({"embed.weight": torch.ones(1 << 20)}), META)
        report = saver.wait()
    assert report is not None and isinstance(report.outcome, SaveFailed)
    assert "disk full (File too large): need 4.2 MB, have " in report.outcome.message
    assert names(tmp_path) == ["step_00000010"]


def test_a_disk_that_has_become_read_only_costs_the_checkpoint(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk]).returncode != 0:
        pytest.skip("cannot mount a tmpfs here")
    try:
        saver = BackgroundSaver(CheckpointStore(disk, Peers(), 2))
        saver.start(10, contribution(10), META)
        assert saver.wait() is not None
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        saver.start(20, contribution(20), META)
        report = saver.wait()
        assert report is not None and isinstance(report.outcome, SaveFailed)
        assert "Read-only file system" in report.outcome.message and "\n" not in report.outcome.message
        assert names(disk) == ["step_00000010"]
        assert find_latest_good(disk / "checkpoints").checkpoint is not None
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("on_disk", "said"),
    [
        (b"abcdXfgh", "other bytes than were written, from byte 4 on"),
        (b"abcdef", "other bytes than were written, from byte 4 on"),
        (b"", "other bytes than were written, from byte 0 on"),
        (b"abcdefghi", "expected 8 bytes on disk, got more"),
    ],
)
def test_what_the_disk_gives_back_is_compared_with_memory(tmp_path: Path, on_disk: bytes, said: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(on_disk)
    with pytest.raises(CheckpointError, match=said):
        check_on_disk(path, [b"abcd", b"", memoryview(b"efgh")])


def test_what_the_disk_gives_back_may_be_longer_than_one_read(tmp_path: Path) -> None:
    data = bytes(range(256)) * (40 << 10)  # 10 MiB
    path = tmp_path / "file"
    path.write_bytes(data)
    check_on_disk(path, [data[:5], data[5:]])
    path.write_bytes(data[:-1] + b"x")
    with pytest.raises(CheckpointError, match="other bytes"):
        check_on_disk(path, [data])
