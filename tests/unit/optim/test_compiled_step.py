"""The compiled step: the bits of the plain one, however it is called; how it is built, chosen and missed."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_runtime.errors import ConfigError
from moe_runtime.optim import compiled_step, native_build, step_path
from moe_runtime.optim.adamw import AdamW
from moe_runtime.optim.compiled_step import bf16_step, fp8_step
from moe_runtime.optim.moments import Fp8Moments, moment_storage
from tests.arch.sources import ROOT
from tests.unit.optim.step_cases import LAYOUTS, differences, plain, run
from tests.unit.optim.test_adamw import parameter, train

STEPS = {"fp8": fp8_step, "bf16": bf16_step}


@pytest.fixture(autouse=True)
def library() -> None:
    try:
        compiled_step.open_library()
    except native_build.BuildError as error:
        pytest.skip(f"needs a C++ compiler: {error}")


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(("count", "offset"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_those_of_the_plain_step(kind: str, count: int, offset: int, dtype: torch.dtype) -> None:
    ours, expected = (run(step, kind, count, offset, dtype) for step in (STEPS[kind], plain(kind)))
    assert differences(ours, expected) == []


@pytest.mark.parametrize("kind", STEPS)
def test_bits_do_not_depend_on_the_number_of_threads(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        made.append(run(STEPS[kind], kind, 3 * 256 * 128 + 77, offset=(1 << 32) - 50_000, steps=2))
    assert differences(*made) == []


def test_the_comparison_sees_one_code_and_one_count() -> None:
    ours, expected = (run(fp8_step, "fp8", 300) for _ in range(2))
    ours.state["exp_avg_codes"][1, 3] ^= 1
    ours.counters[0, 3] += 1
    assert differences(ours, expected) == ["counts", "exp_avg_codes"]


def spoil(grad: torch.Tensor) -> None:
    grad[3], grad[200], grad[300] = torch.inf, torch.nan, 3e30  # the square of the last is infinite
    grad[400] = torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32)  # NaN with its sign set


@pytest.mark.parametrize("kind", STEPS)
def test_what_is_not_finite_reads_as_after_the_plain_step(kind: str) -> None:
    ours, expected = (run(step, kind, 600, spoil=spoil) for step in (STEPS[kind], plain(kind)))
    storage = moment_storage(kind)
    for got, want in zip(storage.read(ours.state, 0, 600), storage.read(expected.state, 0, 600), strict=True):
        assert torch.equal(got.nan_to_num(nan=-1.0), want.nan_to_num(nan=-1.0))
    assert torch.equal(ours.value.nan_to_num(nan=-1.0), expected.value.nan_to_num(nan=-1.0))
    if kind == "fp8":
        assert Fp8Moments().read(ours.state, 0, 600)[1][[3, 200, 300, 400]].isnan().all()
        assert ours.counts.nonfinite == expected.counts.nonfinite == 4


def test_denormal_and_huge_gradients_give_the_same_bits() -> None:
    def extremes(grad: torch.Tensor) -> None:
        grad[:128] = torch.logspace(-44, -18, 128)
        grad[128:256] = torch.logspace(-20, 18, 128)

    ours, expected = (run(step, "fp8", 400, spoil=extremes) for step in (fp8_step, plain("fp8")))
    assert differences(ours, expected) == []


@pytest.mark.parametrize("kind", STEPS)
def test_the_optimizer_takes_the_compiled_step_and_gets_the_plain_ones_weights(kind: str) -> None:
    made = []
    for path in ("compiled", "eager"):
        param = parameter(6682)
        train(AdamW([param], moments=kind, step_path=path), param, range(4))
        made.append(param.detach())
    assert torch.equal(*made)


def test_a_gradient_of_another_type_or_with_gaps_is_stepped() -> None:
    made = []
    for path in ("compiled", "eager"):
        param = torch.nn.Parameter(torch.ones(6, 50))
        param.grad = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)).t()
        AdamW([param], moments="fp8", step_path=path).step()
        made.append(param.detach())
    assert torch.equal(*made)


def test_statistics_are_taken_by_group_added_up_and_forgotten() -> None:
    params = [parameter(300, seed=1), parameter(500, seed=2)]
    optimizer = AdamW([{"params": [p]} for p in params], moments="fp8")
    optimizer.collect_statistics = True
    for param in params:
        train(optimizer, param, range(3))
        param.grad = None
    taken = optimizer.take_statistics()
    assert {group: found.elements for group, found in taken.items()} == {0: 900, 1: 1500}
    assert 0.5 < taken[0].largest_update < 3  # after one step it is 1
    assert taken[0].min_scale is not None and optimizer.take_statistics() == {}


def test_without_a_compiler_auto_is_plain_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise native_build.BuildError("no C++ compiler is installed")

    monkeypatch.setattr(step_path, "open_library", missing)
    step_path._open.cache_clear()
    param = parameter(300)
    with caplog.at_level(logging.WARNING, logger="moe_runtime"):
        train(AdamW([param], moments="fp8"), param, range(3))
    said = [record.getMessage() for record in caplog.records if "optim:" in record.getMessage()]
    assert said == ["optim: the step with fp8 moments on cpu is the plain one: no C++ compiler is installed"]
    with pytest.raises(ConfigError, match="got none: no C\\+\\+ compiler"):
        train(AdamW([param], moments="fp8", step_path="compiled"), param, range(1))
    step_path._open.cache_clear()


def test_the_environment_chooses_where_the_caller_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(step_path.ENVIRONMENT, "eager")
    assert step_path.checked_path("auto") == "eager" and step_path.checked_path("compiled") == "compiled"
    monkeypatch.setenv(step_path.ENVIRONMENT, "fast")
    with pytest.raises(ConfigError, match="got 'fast'"):
        AdamW([parameter(4)])


SMALL = 'extern "C" int answer() { return 42; }\n'


def test_ranks_that_start_together_build_once_and_all_load(tmp_path: Path) -> None:
    source = tmp_path / "small.cpp"
    source.write_text(SMALL)
    code = (
        "from pathlib import Path; from moe_runtime.optim.native_build import load_library; "
        f"print(load_library(Path({str(source)!r})).answer())"
    )
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": __import__("os").environ["PATH"]}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'comm'}"
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [rank.communicate(timeout=60)[0] for rank in ranks] == ["42\n", "42\n"]
    assert len(list((tmp_path / "moe_runtime").glob("*.so"))) == 1


def test_a_source_that_does_not_compile_is_a_reason_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.cpp"
    source.write_text("int f( {")
    with pytest.raises(native_build.BuildError, match=r"failed: .*broken\.cpp:1"):
        native_build.load_library(source)
    assert not list((tmp_path / "moe_runtime").glob("*.so"))


def test_another_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "small.cpp"
    source.write_text(SMALL)
    assert native_build.load_library(source).answer() == 42
    source.write_text(SMALL.replace("42", "43"))
    assert native_build.load_library(source).answer() == 43
