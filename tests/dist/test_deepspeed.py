"""Our AdamW with FP8 moments under plain `deepspeed.initialize`: ZeRO 1, 2, 3 and BF16_Optimizer.

One world runs all cases; the tests then look at what it found. What is compared: masters and state as
stored, bit for bit, of runs that were saved and loaded with one that was not.
"""

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_runtime.errors import CheckpointError
from tests.dist.deepspeed_world import (
    KINDS,
    bits,
    convert,
    exported,
    load,
    logical,
    open_engine,
    partitions,
    quiet,
    same,
    save,
    train,
)
from tests.ranks import run_ranks

Found = dict[str, Any]
QUICK = [kind for kind in KINDS if kind != "stage3_bf16"]


def resume(kind: str, folder: Path) -> Found:
    """Three steps, save, two more; a rigid and a universal load go through the same two."""
    engine = open_engine(kind)
    train(engine, range(3))
    save(engine, folder, kind)
    at_save = logical(engine)
    loss = train(engine, range(3, 5))
    wanted = bits(engine)
    rigid = open_engine(kind, seed=1)
    load(rigid, folder, kind)
    found: Found = {
        "is_quantised": all(t.dtype == torch.uint8 for part in bits(rigid) for k, t in part.items() if "codes" in k),
        "bytes": [sum(t.numel() * t.element_size() for k, t in part.items() if k != "master") for part in wanted],
        "lengths": [flat.numel() for flat in partitions(engine)],
        "loaded": same(at_save, logical(rigid)),
        "loss": train(rigid, range(3, 5)) == loss,
        "went_on": same(wanted, bits(rigid)),
    }  # fmt: skip
    tag = convert(folder, kind)
    universal = open_engine(kind, seed=2, universal=True)
    load(universal, folder, tag)
    found["universal_loaded"] = same(at_save, logical(universal))
    if kind.startswith("stage3"):
        with pytest.raises(CheckpointError) as caught:
            train(universal, range(3, 4))
        found["refused"] = str(caught.value)
        universal = open_engine(kind, seed=2, universal=True)
        load(universal, folder, tag)
        universal.optimizer.optimizer.restore_hyperparameters()
    found["universal_loss"] = train(universal, range(3, 5)) == loss
    found["universal_went_on"] = same(wanted, bits(universal))
    return found


def handed_out(engine: Any, truth: dict[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    """What `safe_get_full_optimizer_state` says of every parameter: true, raised, nan or WRONG."""
    from deepspeed.utils import safe_get_full_optimizer_state

    said = {}
    for name, param in engine.module.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            try:
                value = safe_get_full_optimizer_state(param, key)
            except (KeyError, ValueError, TypeError):
                said[f"{name}.{key}"] = "raised"
                if not hasattr(param, "ds_id"):  # a rank that owns nothing of it waits for the sum
                    dist.all_reduce(torch.full((param.numel(),), torch.nan), group=param._dp_group)
                continue
            wanted = truth[name][key].view(value.shape)
            verdict = "true" if torch.equal(value, wanted) else "WRONG"
            said[f"{name}.{key}"] = "nan" if value.isnan().all() else verdict
    return said


def local_codes(engine: Any) -> set[str]:
    """Types that stage 3 gives for a rank's own part of the state."""
    from deepspeed.utils import safe_get_local_optimizer_state

    found = set()
    for param in engine.module.parameters():
        try:
            found.add(str(safe_get_local_optimizer_state(param, "exp_avg").dtype))
        except KeyError:
            found.add("raised")
    return found


def views(kind: str, moments: str, folder: Path) -> dict[str, dict[str, str]]:
    """Answers after some steps; and after a universal load into an engine that has stepped, and a step."""
    engine = open_engine(kind, moments)
    train(engine, range(3))
    tag = f"{kind}_{moments}"
    save(engine, folder, tag)
    tag = convert(folder, tag)
    answers = {"stepped": handed_out(engine, exported(folder, tag))}
    if kind.startswith("stage3"):
        answers["local"] = {"all": ",".join(sorted(local_codes(engine)))}
        return answers
    again = open_engine(kind, moments, universal=True)
    train(again, range(1))
    load(again, folder, tag)
    train(again, range(3, 4))
    save(again, folder, "again")
    answers["loaded"] = handed_out(again, exported(folder, convert(folder, "again")))
    return answers


def all_cases(rank: int, world_size: int, folder: str) -> Found:
    quiet()
    found: Found = {kind: resume(kind, Path(folder)) for kind in QUICK}
    for kind, moments in (("stage1", "fp8"), ("stage3", "fp8"), ("stage1", "fp32")):
        found[f"views_{kind}_{moments}"] = views(kind, moments, Path(folder))
    return found


@pytest.fixture(scope="module")
def two() -> Iterator[list[Found]]:
    with tempfile.TemporaryDirectory() as folder:
        yield run_ranks(all_cases, 2, folder, timeout_s=90)


def check_resumed(found: Found, kind: str) -> None:
    case = found[kind]
    assert case["is_quantised"]
    assert case["loaded"] and case["loss"] and case["went_on"], case
    assert case["universal_loaded"] and case["universal_loss"] and case["universal_went_on"], case


@pytest.mark.parametrize("kind", QUICK)
def test_save_load_resume_is_bit_identical_on_two_ranks(two: list[Found], kind: str) -> None:
    for found in two:
        check_resumed(found, kind)


@pytest.mark.parametrize("kind", QUICK)
def test_state_takes_two_bytes_an_element_whatever_the_partition(two: list[Found], kind: str) -> None:
    for found in two:
        for numel, num_bytes in zip(found[kind]["lengths"], found[kind]["bytes"], strict=True):
            blocks = -(-numel // 128)
            assert num_bytes <= 2 * 128 * blocks + 2 * blocks + 4


def test_stage_3_says_that_deepspeed_lost_the_weight_decay_of_groups(two: list[Found]) -> None:
    for found in two:
        assert "restore_hyperparameters() after load_checkpoint" in found["stage3"]["refused"]


def test_codes_are_never_handed_out_as_values(two: list[Found]) -> None:
    for found in two:
        for said in found["views_stage1_fp8"].values():
            assert set(said.values()) <= {"raised", "nan"}
    # nan is what a rank hears that owns nothing of a parameter whose owner raised
    assert any("raised" in found["views_stage1_fp8"]["stepped"].values() for found in two)


def test_stage_3_raises_for_codes_too(two: list[Found]) -> None:
    for found in two:
        assert set(found["views_stage3_fp8"]["stepped"].values()) == {"raised"}
        assert found["views_stage3_fp8"]["local"] == {"all": "raised"}


def test_fp32_moments_are_handed_out_truly_or_not_at_all(two: list[Found]) -> None:
    """DeepSpeed links the state of the first group alone: the others raise, with torch's AdamW too."""
    said = [said for found in two for said in found["views_stage1_fp32"]["stepped"].values()]
    assert "true" in said and set(said) <= {"true", "raised", "nan"}


def documented(rank: int, world_size: int, code: str, folder: str) -> dict[str, Any]:
    """Run the lines of docs/optimizer.md as they stand."""
    quiet()
    os.chdir(folder)
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, names)
    client = names["engine"].optimizer.optimizer
    stored = [client.state[flat]["exp_avg_codes"].dtype for flat in partitions(names["engine"])]
    return {"loss": float(names["loss"].detach()), "stored": stored, "lines": len(code.strip().splitlines())}


def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/optimizer.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    for found in run_ranks(documented, 2, code, str(tmp_path)):
        assert found["loss"] < 40 and found["stored"] == [torch.uint8] * 2  # it starts near 64
        assert found["lines"] <= 26
    assert (tmp_path / "checkpoints" / "latest").exists()


def four_ranks(rank: int, world_size: int, folder: str) -> Found:
    quiet()
    return {kind: resume(kind, Path(folder)) for kind in KINDS}


@pytest.mark.slow
def test_save_load_resume_is_bit_identical_on_four_ranks(tmp_path: Path) -> None:
    for found in run_ranks(four_ranks, 4, str(tmp_path), timeout_s=400):
        for kind in KINDS:
            check_resumed(found, kind)


def leave(rank: int, world_size: int, folder: str, kind: str) -> list[float]:
    """Two ranks train, save, convert, and go on."""
    quiet()
    engine = open_engine(kind)
    train(engine, range(3))
    save(engine, Path(folder), kind)
    convert(Path(folder), kind)
    return [train(engine, range(step, step + 1)) for step in range(3, 9)]


def arrive(rank: int, world_size: int, folder: str, kind: str, tag: str, made: str) -> list[float]:
    """Load a universal checkpoint; save it as it came, and stored anew; go on from there."""
    quiet()
    engine = open_engine(kind, seed=5, universal=True)
    load(engine, Path(folder), tag)
    client = engine.optimizer.optimizer
    client.restore_hyperparameters()
    save(engine, Path(folder), f"{made}_raw")
    convert(Path(folder), f"{made}_raw")
    if kind.startswith("stage3"):  # which shows the client its partitions one at a time
        engine.optimizer._set_fp32_optimizer_param_groups()
    client._settle_all()
    if kind.startswith("stage3"):
        engine.optimizer._clear_fp32_optimizer_param_groups()
    save(engine, Path(folder), made)
    convert(Path(folder), made)
    return [train(engine, range(step, step + 1)) for step in range(3, 9)]


def check_rounded(was: dict, now: dict, times: int) -> float:
    """Every value within so many roundings of the format; gives the share of equal values of v."""
    equal = numel = 0
    for name, tensors in was.items():
        assert torch.equal(tensors["fp32"], now[name]["fp32"])
        root, got = (t[name]["exp_avg_sq"].sqrt() for t in (was, now))
        factor = (9 / 8) ** times - 1
        assert ((got - root).abs() <= factor * root + 1e-12).all()
        mean, other = (t[name]["exp_avg"] for t in (was, now))
        # m is kept in units of sqrt(v): a step of E4M3 of the quotient, its quantum 2^-13.
        assert ((other - mean).abs() <= factor * mean.abs() + times * 1.3 * 2.0**-13 * root).all()
        equal, numel = equal + int((got == root).sum()), numel + root.numel()
    return equal / numel


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_to_one_to_two_ranks_and_to_four_through_the_universal_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    """What is exact: files, masters, steps. Rounded once by each change of cuts: m and sqrt(v)."""
    folder = tmp_path_factory.mktemp("universal")
    uninterrupted = run_ranks(leave, 2, str(folder), kind)[0]
    was = exported(folder, f"{kind}_universal")
    one = run_ranks(arrive, 1, str(folder), kind, f"{kind}_universal", "one")[0]
    two = run_ranks(arrive, 2, str(folder), kind, "one_universal", "two")[0]
    four = run_ranks(arrive, 4, str(folder), kind, f"{kind}_universal", "four")[0]
    for made in ("one", "four"):
        raw = exported(folder, f"{made}_raw_universal")
        assert all(torch.equal(raw[name][key], was[name][key]) for name in was for key in ("exp_avg", "fp32"))
        assert check_rounded(was, exported(folder, f"{made}_universal"), 1) > 0.9
    assert check_rounded(was, exported(folder, "two_universal"), 2) > 0.9
    for losses in (one, two, four):
        assert losses == pytest.approx(uninterrupted, rel=0.03)
