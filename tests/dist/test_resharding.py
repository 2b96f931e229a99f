"""A checkpoint of any layout goes on in any other: state bit for bit, the next loss to 1e-6."""

import json
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.checkpoint.consolidate import consolidate
from moe_runtime.checkpoint.folder import open_checkpoint
from moe_runtime.checkpoint.reshard import plan_cuts, restore_cut
from moe_runtime.checkpoint.slices import SliceReader
from moe_runtime.checkpoint.stored_moments import stored_form
from moe_runtime.train.saving import TrainingState
from tests.dist.layout_case import Case
from tests.cli.small_run import write_config
from tests.dist.resume_case import Live, advance, digests, join, live, load, open_state, save, with_layout
from tests.dist.golden_checkpoint import CASES
from tests.unit.checkpoint.test_golden import RUNS
from tests.dist.test_ema_layouts import averages, short_run
from tests.ranks import run_ranks

STEPS = 2
LAYOUTS: dict[str, dict] = {
    "one": {},
    "dp2": {"dp": 2},
    "dp2 ep2": {"dp": 2, "ep": 2},
    "dp2 ep2 ZeRO 2": {"dp": 2, "ep": 2, "zero_stage": 2},
    "pp2 1f1b": {"pp": 2, "schedule": "1f1b"},
    "pp2 zbv": {"pp": 2, "schedule": "zbv"},
    "pp2 dualpipe": {"pp": 2, "schedule": "dualpipe"},
    "dp4 ep4": {"dp": 4, "ep": 4},
    "dp4 ep2": {"dp": 4, "ep": 2},
    "pp2 dp2 ep2 1f1b": {"pp": 2, "dp": 2, "ep": 2, "schedule": "1f1b"},
    "pp2 dp2 ep2 dualpipe": {"pp": 2, "dp": 2, "ep": 2, "schedule": "dualpipe"},
    "pp2 dp2 interleaved": {"pp": 2, "dp": 2, "schedule": "interleaved", "chunks": 2},
    "pp4 1f1b": {"pp": 4, "schedule": "1f1b"},
    "pp4 dualpipe": {"pp": 4, "schedule": "dualpipe"},
    "pp2 dp4 ep4 1f1b": {"pp": 2, "dp": 4, "ep": 4, "schedule": "1f1b"},
    "pp4 dp2 ep2 dualpipe": {"pp": 4, "dp": 2, "ep": 2, "schedule": "dualpipe"},
}
# From, to, moments there, moments here.
FEW = [("pp2 dp2 ep2 1f1b", "pp4 dualpipe", "bf16", "fp32")]
MANY = [
    ("pp2 dp2 ep2 dualpipe", "dp4 ep4", "fp8", "fp8"),
    ("pp4 dp2 ep2 dualpipe", "one", "fp32", "fp32"),
    ("one", "pp4 dp2 ep2 dualpipe", "fp8", "fp8"),
    ("pp4 dp2 ep2 dualpipe", "pp2 dp4 ep4 1f1b", "fp8", "fp8"),
    ("pp2 dp4 ep4 1f1b", "pp2 dualpipe", "bf16", "bf16"),
    ("pp2 dualpipe", "pp2 1f1b", "bf16", "bf16"),
    ("pp2 1f1b", "pp2 zbv", "fp8", "fp8"),
    ("pp2 zbv", "dp4 ep4", "fp32", "fp32"),
    ("dp4 ep4", "dp4 ep2", "fp8", "fp8"),
    ("dp4 ep2", "dp2", "fp32", "fp32"),
    ("dp2", "pp2 dp2 interleaved", "fp8", "fp8"),
    ("pp2 dp2 interleaved", "pp4 dualpipe", "bf16", "bf16"),
    ("pp4 dualpipe", "dp2 ep2 ZeRO 2", "fp8", "fp8"),
    ("dp2 ep2 ZeRO 2", "one", "bf16", "bf16"),
    ("dp2 ep2", "dp2 ep2 ZeRO 2", "fp8", "fp8"),
    ("one", "dp4 ep4", "bf16", "bf16"),
    ("pp2 dp2 ep2 dualpipe", "pp2 dp2 ep2 1f1b", "fp8", "fp8"),
    ("pp4 1f1b", "pp4 dualpipe", "fp32", "fp32"),
    ("pp4 dualpipe", "pp4 dp2 ep2 dualpipe", "fp8", "fp8"),
    ("pp2 dp2 ep2 1f1b", "pp2 dp4 ep4 1f1b", "fp32", "fp32"),
    ("dp4 ep2", "pp2 dp2 ep2 dualpipe", "bf16", "bf16"),
    # Another form of moments: exact from FP8 to BF16 and FP32, and from BF16 to FP32.
    ("pp2 dp2 ep2 dualpipe", "dp4 ep2", "fp8", "bf16"),
    ("pp4 dualpipe", "dp2 ep2", "fp8", "fp32"),
    ("dp4 ep4", "pp2 1f1b", "bf16", "fp32"),
]
Pair = tuple[str, str, str, str]
Said = tuple[Live, float]


def _case(name: str, moments: str, sequences: int) -> Case:
    """A layout with so many sequences a step, over all lanes."""
    layout = LAYOUTS[name]
    microbatches = sequences // layout.get("dp", 1)
    return Case(name, layout, microbatches, mtp_depth=1, precision="fp32", moments=moments)


def _ranks(name: str) -> int:
    layout = LAYOUTS[name]
    return layout.get("pp", 1) * layout.get("dp", 1)


def _folder(name: str, moments: str) -> str:
    return f"{name} {moments}".replace(" ", "_")


def _save_all(rank: int, world_size: int, cases: list[Case], root: str) -> list[Said]:
    """Train, save, say what the state was, and the loss of one step more."""
    said = []
    for case in cases:
        state = open_state(case, rank)
        advance(state, 0, STEPS)
        save(state, str(Path(root) / _folder(case.name, case.moments)), STEPS)
        said.append((live(state), *advance(state, STEPS, 1)))
    return said


def _load_all(rank: int, world_size: int, cases: list[tuple[Case, str]], root: str) -> list[Said]:
    """Load each, say what the state is, and the loss of the next step."""
    said = []
    for case, name in cases:
        state, folder = open_state(case, rank), str(Path(root) / name)
        _check_bytes_read(state, folder)
        assert load(state, folder) == STEPS
        said.append((live(state), *advance(state, STEPS, 1)))
    return said


def _check_bytes_read(state: TrainingState, folder: str) -> None:
    """Restoring a rank's optimizer state reads what it needs, and no more."""
    checkpoint, moments = open_checkpoint(Path(folder)), state.runtime.config.optim.moments
    partitions = state.optimizer.partitions()
    cuts = plan_cuts(checkpoint, partitions, moments, state.first_expert)
    with SliceReader(checkpoint) as reader:
        for cut in cuts:
            restore_cut(reader, cut, state.optimizer.client)  # type: ignore[arg-type]
    stored = {stored_form(checkpoint.manifest, part) for part in checkpoint.manifest.partitions}
    elements = sum(partition.end - partition.start for partition in partitions)
    # Of FP8 moments whole blocks are read at both ends of a run: 2 x 127 elements more, of 2 bytes.
    each = {"fp32": 12, "bf16": 8, "fp8": 6 + 2 / 128}[stored.pop()]
    blocks = sum(2 * 127 * (2 + 2 / 128) for cut in cuts for _ in cut.runs) if each < 8 else 0
    counters = sum(4 for cut in cuts for _ in cut.sources)
    assert reader.bytes_read <= elements * each + blocks + counters


def _in_worlds(function: object, jobs: dict[int, list], root: str) -> dict[int, list[Said]]:
    """Runs each world's jobs; of every job the whole state and the loss."""
    results = {}
    for world_size, own in jobs.items():
        parts = run_ranks(function, world_size, own, root, timeout_s=300)  # type: ignore[arg-type]
        by_job = zip(*parts, strict=True)
        results[world_size] = [(join([live for live, _ in ranks]), ranks[0][1]) for ranks in by_job]
    return results


def check_pairs(pairs: list[Pair], root: str, sequences: int) -> None:
    """What was saved in the first layout of a pair is what the second takes up."""
    saves: dict[int, list[Case]] = {}
    loads: dict[int, list[tuple[Case, str]]] = {}
    for source, target, before, after in pairs:
        case = _case(source, before, sequences)
        if case not in saves.setdefault(_ranks(source), []):
            saves[_ranks(source)].append(case)
        job = (_case(target, after, sequences), _folder(source, before))
        loads.setdefault(_ranks(target), []).append(job)
    saved = _in_worlds(_save_all, saves, root)
    loaded = _in_worlds(_load_all, loads, root)
    for source, target, before, after in pairs:
        case, job = _case(source, before, sequences), (_case(target, after, sequences), _folder(source, before))
        was, loss = saved[_ranks(source)][saves[_ranks(source)].index(case)]
        now, next_loss = loaded[_ranks(target)][loads[_ranks(target)].index(job)]
        label = f"{source}, {before} -> {target}, {after}"
        assert digests(was) == digests(now), label
        assert abs(next_loss - loss) <= 1e-6 * abs(loss), f"{label}: {loss} {next_loss}"
        _check_oracle(Path(root) / _folder(source, before), was, label)


def _check_oracle(folder: Path, was: Live, label: str) -> None:
    whole = consolidate(open_checkpoint(folder))
    found = {(kind, name): values.numpy() for name, kinds in whole.items() for kind, values in kinds.items()}
    assert digests(found) == digests({key: was[key] for key in was if key[0] != "weight"}), label


def test_state_of_one_layout_goes_on_in_another(tmp_path: Path) -> None:
    check_pairs(FEW, str(tmp_path), sequences=8)


@pytest.mark.slow
def test_state_goes_through_more_than_twenty_pairs_of_layouts(tmp_path: Path) -> None:
    check_pairs(MANY, str(tmp_path), sequences=16)


def _load_golden(rank: int, world_size: int, runs: list[Path]) -> list[dict[str, str]]:
    """What each golden checkpoint is in a single process."""
    said = []
    for run in runs:
        state = open_state(with_layout(CASES[run.name], {}, 8), rank)
        load(state, str(run))
        said.append(digests(live(state)))
    return said


def test_golden_checkpoints_of_every_format_go_on_in_a_single_process() -> None:
    (said,) = run_ranks(_load_golden, 1, RUNS)
    assert said == [json.loads((run / "state.json").read_text()) for run in RUNS]


def _begin(rank: int, world_size: int, case: Case, folder: str) -> tuple[Live, list[float]]:
    """Two steps, a checkpoint, and two steps more as if nothing had happened."""
    state = open_state(case, rank)
    losses = advance(state, 0, 2)
    save(state, folder, 2)
    at_save = live(state)
    return at_save, losses + advance(state, 2, 2)


def _go_on(rank: int, world_size: int, case: Case, folder: str, step: int) -> tuple[Live, Live, list[float]]:
    """Load, one step, a checkpoint; gives the state at both ends, and the loss."""
    state = open_state(case, rank)
    assert load(state, folder) == step
    before = live(state)
    losses = advance(state, step, 1)
    save(state, folder, step + 1)
    return before, live(state), losses


def test_a_dualpipe_run_goes_on_alone_and_comes_back(tmp_path: Path) -> None:
    pipe, alone, folder = _case("pp4 dualpipe", "fp8", 8), _case("one", "fp8", 8), str(tmp_path)
    begun = run_ranks(_begin, 4, pipe, folder)
    middle = run_ranks(_go_on, 1, alone, folder, 2)
    back = run_ranks(_go_on, 4, pipe, folder, 3)
    assert digests(join([state for state, _ in begun])) == digests(middle[0][0])
    assert digests(middle[0][1]) == digests(join([start for start, _, _ in back]))
    straight = begun[0][1]
    np.testing.assert_allclose(middle[0][2], straight[2], rtol=1e-6)
    # After an update whose FP8 moments were rounded by other noise.
    np.testing.assert_allclose(back[0][2], straight[3], rtol=1e-3)


def _losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_real_run_takes_up_its_data_and_average_in_another_layout(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, layout={}, optim__moments="fp32", train__eval_every=0))
    two = ("layout.dp=2", "layout.ep=2")
    run_ranks(short_run, 2, config, (*two, "name=straight", "train.total_steps=4"))
    run_ranks(short_run, 2, config, (*two, "name=moved", "train.total_steps=2"))
    run_ranks(short_run, 1, config, ("name=moved", "train.total_steps=4"))
    straight, moved = (tmp_path / "runs" / name for name in ("straight", "moved"))
    assert _losses(moved)[:2] == _losses(straight)[:2]
    np.testing.assert_allclose(_losses(moved), _losses(straight), rtol=1e-5)
    events = (moved / "events.jsonl").read_text()
    assert "saved in another layout: dp 2 -> 1, ep 2 -> 1, world_size 2 -> 1" in events
    first, second = averages(straight), averages(moved)
    for name, average in first.items():
        assert (average - second[name]).abs().mean() < 1e-6, name
