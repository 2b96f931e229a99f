"""The same bytes whoever prepares, however the source is cut, and however often it was killed on the way."""

import bz2
import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.cli.prepare import progress_line
from moe_runtime.data.job import SURVEY, TOKENISE
from moe_runtime.data.prepare import prepare
from moe_runtime.data.sources import open_source
from moe_runtime.data.survey import _Merged
from moe_runtime.data.task import Request
from moe_runtime.errors import DataError

CHUNK = 20_000
SHARD = 7_000


def tree(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """Lines of three kinds: plain, masked, and again what was there before; 120 kB, seven chunks."""
    generator = np.random.default_rng(1)
    words = [f"word{number}" for number in range(400)]
    lines = []
    for number in range(600):
        text = " ".join(generator.choice(words, 30)) if number % 7 < 6 else lines[number // 2]["text"]
        line = {"text": text, "source": "xyz"[number % 3]}
        lines.append(line | ({"loss_spans": [[5, 20]]} if number % 5 == 0 else {}))
    file = tmp_path_factory.mktemp("source") / "lines.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Request(str(file), "bpe:400", fim_rate=0.3, validation_fraction=0.2)


@pytest.fixture(scope="module")
def whole(request_: Request, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One process, one chunk."""
    out = tmp_path_factory.mktemp("whole") / "out"
    manifest = prepare(request_, out, workers=1, shard_tokens=SHARD)
    assert manifest.counts["duplicates"] > 50
    assert len(manifest.splits["train"].shards) > 2 and manifest.splits["train"].masks
    return tree(out)


@pytest.mark.parametrize("workers, chunk", [(1, CHUNK), (2, 2 * CHUNK), (1, 2_000)])
def test_neither_workers_nor_chunks_show(
    workers: int, chunk: int, request_: Request, whole: dict[str, bytes], tmp_path: Path
) -> None:
    seen: dict[str, list[int]] = {SURVEY: [], TOKENISE: []}
    size = Path(request_.source).stat().st_size

    def show(what: str, done: int, total: int | None) -> None:
        if what in seen:
            assert total == size
            seen[what].append(done)

    out = tmp_path / "out"
    prepare(request_, out, workers=workers, shard_tokens=SHARD, chunk_bytes=chunk, progress=show)
    assert tree(out) == whole
    assert all(dones == sorted(dones) and dones[-1] == size for dones in seen.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


class Killed(BaseException):
    """Stands for whatever ends a process from outside."""


def test_a_killed_preparation_goes_on_at_what_is_missing(
    request_: Request, whole: dict[str, bytes], tmp_path: Path
) -> None:
    size = Path(request_.source).stat().st_size
    found_done: list[tuple[str, int]] = []  # of each pass of each attempt, when it begins

    def attempt(killed_in: str | None, share: float) -> None:
        seen: set[str] = set()

        def show(what: str, done: int, total: int | None) -> None:
            if what not in seen:
                seen.add(what)
                found_done.append((what, done))
            if what == killed_in and total is not None and done >= share * total:
                raise Killed

        prepare(
            request_,
            tmp_path / "out",
            workers=1,
            shard_tokens=SHARD,
            chunk_bytes=CHUNK,
            progress=show,
        )

    strikes = [(SURVEY, 0.2), (SURVEY, 0.7), ("training the tokenizer", 0.4)]
    strikes += [(TOKENISE, share) for share in (0.3, 0.6, 1.0)]
    for what, share in strikes:
        with pytest.raises(Killed):
            attempt(what, share)
    attempt(None, 1.0)
    assert tree(tmp_path / "out") == whole
    for what in (SURVEY, TOKENISE):
        done = [own for found, own in found_done if found == what]
        assert done == sorted(done) and done[0] == 0 and size / 2 < done[-1] <= size


def test_what_another_request_or_source_left_is_not_gone_on_with(request_: Request, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(Path(request_.source).read_bytes())

    def kill(what: str, done: int, total: int | None) -> None:
        if what == TOKENISE and done > CHUNK:
            raise Killed

    def surveyed(request: Request) -> int:
        """Bytes that the first pass finds done."""
        found = []

        def show(what: str, done: int, total: int | None) -> None:
            found.append(done)
            raise Killed

        with pytest.raises(Killed):
            prepare(request, tmp_path / "out", workers=1, chunk_bytes=CHUNK, progress=show)
        return found[0]

    plain = Request(str(source))
    for other in (Request(str(source), seed=2, fim_rate=0.5), plain):
        with pytest.raises(Killed):
            prepare(plain, tmp_path / "out", workers=1, chunk_bytes=CHUNK, progress=kill)
        if other is plain:
            assert surveyed(plain) == source.stat().st_size
            source.write_bytes(source.read_bytes() + b'{"text": "one more"}\n')
        assert surveyed(other) == 0


def _kill_at(folder: Path, process: subprocess.Popen, pieces: int) -> None:
    """SIGKILL as soon as so many chunks are tokenised."""
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        if len(list((folder / ".out.preparing" / "pieces").glob("*.json"))) >= pieces:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.002)
    process.wait()


@pytest.mark.slow
def test_killed_for_real_with_workers_it_leaves_no_process_and_the_same_bytes(
    request_: Request, whole: dict[str, bytes], tmp_path: Path
) -> None:
    code = (
        "from pathlib import Path; from moe_runtime.data.prepare import prepare;"
        "from moe_runtime.data.task import Request;"
        f"r = Request({request_.source!r}, 'bpe:400', fim_rate=0.3, validation_fraction=0.2);"
        f"prepare(r, Path({str(tmp_path / 'out')!r}), workers=2, shard_tokens={SHARD}, chunk_bytes={CHUNK})"
    )
    for pieces in (1, 2, 4, 6):
        process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        _kill_at(tmp_path, process, pieces)
    subprocess.run([sys.executable, "-c", code], check=True)
    assert tree(tmp_path / "out") == whole
    until = time.monotonic() + 10
    while _workers_of(tmp_path) and time.monotonic() < until:
        time.sleep(0.1)
    assert _workers_of(tmp_path) == []


def _workers_of(folder: Path) -> list[str]:
    """Processes that still have a file below a folder open, or work in it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(folder) in os.readlink(entry):
                found.append(str(entry))
        except OSError:
            continue
    return found


def _children_that_work() -> list[int]:
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if b"data.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_worker_that_dies_is_told_and_its_work_is_kept(
    request_: Request, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    struck = []

    def strike(what: str, done: int, total: int | None) -> None:
        if what == TOKENISE and done > 3 * CHUNK and not struck:
            struck.extend(_children_that_work())
            os.kill(struck[0], signal.SIGKILL)

    with pytest.raises(DataError, match=r"a worker was killed by signal 9; .* fewer --workers"):
        prepare(request_, tmp_path / "out", workers=2, shard_tokens=SHARD, chunk_bytes=CHUNK, progress=strike)
    assert len(list((tmp_path / ".out.preparing" / "pieces").glob("*.json"))) >= 2
    prepare(request_, tmp_path / "out", workers=1, shard_tokens=SHARD, chunk_bytes=CHUNK)
    assert tree(tmp_path / "out") == whole


def test_a_bad_line_far_inside_is_named_by_a_worker_too(request_: Request, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    raw = Path(request_.source).read_bytes()
    at = raw.index(b"\n", len(raw) // 2) + 1
    file.write_bytes(raw[:at] + b'{"txt": 1}\n' + raw[at:])
    with pytest.raises(DataError, match=rf"bad.jsonl, byte {at}: expected .* got keys \['txt'\]"):
        prepare(Request(str(file)), tmp_path / "out", workers=2, chunk_bytes=2 * CHUNK)
    assert not (tmp_path / ".out.preparing").exists()


def texts(name: str) -> list[str]:
    """All documents of a source, whose bytes have all been counted."""
    source, counts = open_source(name), Counter[str]()
    found = [document.text for document in source.read(counts)]
    assert counts["read_bytes"] == sum(part.num_bytes for part in source.chunks()[0])
    return found


def test_compressed_files_hold_the_same_documents(request_: Request, tmp_path: Path) -> None:
    raw = Path(request_.source).read_bytes()
    half = raw.index(b"\n", len(raw) // 2) + 1
    packed = {
        "a.jsonl.gz": gzip.compress(raw[:half]) + gzip.compress(raw[half:]),  # two members, as `cat` makes
        "a.jsonl.bz2": bz2.compress(raw),
        "a.jsonl.xz": lzma.compress(raw),
    }
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra [data]")
    zstd = pyarrow.Codec("zstd")
    packed["a.jsonl.zst"] = b"".join(zstd.compress(piece, asbytes=True) for piece in (raw[:half], raw[half:]))
    expected = texts(request_.source)
    for name, content in packed.items():
        (tmp_path / name).write_bytes(content)
        assert texts(str(tmp_path / name)) == expected, name
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match=name):
            texts(str(tmp_path / name))
        (tmp_path / name).write_bytes(b"no such thing")
        with pytest.raises(DataError, match=name):
            texts(str(tmp_path / name))


def test_a_pattern_is_its_files_in_order_each_read_by_its_kind(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.jsonl").write_text('{"text": "two"}\n')
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "deep" / "c.txt.gz").write_bytes(gzip.compress(b"three\n"))
    assert texts(f"glob:{tmp_path}/**/*.*") == ["one\n", "two", "three\n"]
    with pytest.raises(DataError, match=r"for such files say glob:.*/\*\*/\*.jsonl"):
        open_source(f"dir:{tmp_path / 'deep'}")
    (tmp_path / "picture.png").touch()
    with pytest.raises(DataError, match=r"got .*picture\.png"):
        open_source(f"glob:{tmp_path}/*")
    with pytest.raises(DataError, match="no file of that pattern"):
        open_source(f"glob:{tmp_path}/*.parquet")


@pytest.mark.parametrize("text", ["ü" * 30_000, "line\n" * 9000, "x" * 5 + "\n" + "é€𝄞" * 9000])
def test_a_text_file_cut_in_chunks_loses_nothing(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(text)
    source = open_source(str(file))
    for chunk in (10_001, 17_000, 1_000_000):
        borders = [(part.start, part.end) for parts in source.chunks(chunk) for part in parts]
        assert [start for start, _ in borders] == [0, *(end for _, end in borders[:-1])]
        raw = file.read_bytes()
        assert "".join(raw[start:end].decode() for start, end in borders) == text


def test_row_groups_of_parquet_are_shared_out(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra [data]")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [f"row {number} " * 20 for number in range(500)]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet", row_group_size=50)
    assert len(open_source(str(tmp_path / "a.parquet")).chunks(2_000)) > 3
    folders = [tmp_path / "one", tmp_path / "many"]
    for folder, chunk in zip(folders, (10**9, 2_000), strict=True):
        prepare(Request(str(tmp_path / "a.parquet")), folder, workers=1, chunk_bytes=chunk)
    assert tree(folders[0]) == tree(folders[1])


def test_surveys_are_merged_range_by_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_runtime.data.survey.BUCKET", 64)
    generator = np.random.default_rng(2)
    drawn = generator.integers(0, 2**63, 250, dtype=np.uint64) * 2 + 1
    chunks = [generator.choice(drawn, 300) for _ in range(4)]  # many twice
    for index, keys in enumerate(chunks):
        order = np.argsort(keys, kind="stable").astype("<u4")
        (tmp_path / f"{index:06d}.keys").write_bytes(keys[order].astype("<u8").tobytes())
        (tmp_path / f"{index:06d}.places").write_bytes(order.tobytes())
    buckets = list(_Merged(tmp_path, 4, np.arange(0, 1501, 300)[:5]).buckets())
    assert len(buckets) == 32
    everything = np.concatenate(chunks)
    keys, firsts = np.unique(everything, return_index=True)
    assert np.array_equal(np.concatenate([own for own, _ in buckets]), keys)
    assert np.array_equal(np.concatenate([numbers for _, numbers in buckets]), firsts)


def test_progress_says_rate_and_time_left_of_this_process() -> None:
    line = progress_line("tokenising", 3_000_000_000, 5_000_000_000, own=1_000_000_000, seconds=100.0)
    assert line == "tokenising: 3,000.0 of 5,000.0 MB, 10.0 MB/s, 0:03:20 left"
    assert progress_line("reading", 5, 5, 5, 1.0) == "reading: 0.0 of 0.0 MB, 0.0 MB/s"
