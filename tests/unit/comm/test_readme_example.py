"""What comm/README.md shows is what the library does."""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from moe_comm import dispatcher, errors, factory
from moe_comm.factory import open_dispatcher
from moe_comm.placement import Placement
from moe_comm.wire.codec import WIRES

from tests.ranks import run_ranks
from tests.unit.comm.readme_case import README, examples, losses_of, run_layer


def test_the_example_has_30_lines_and_needs_torch_and_moe_comm_alone():
    source = examples()[0]
    assert len([line for line in source.splitlines() if line.strip()]) <= 30
    imports = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    assert {line.split()[1].split(".")[0].rstrip(",") for line in imports} == {"torch", "moe_comm"}


def test_the_example_learns_and_is_a_plain_moe_layer():
    losses, distances = zip(*run_ranks(run_layer, 2, examples()[0]), strict=True)
    assert len(losses[0]) == 5
    assert losses[0][-1] < 0.7 * losses[0][0]
    assert losses[1] == []
    assert max(distances) < 1e-5


def test_the_comparison_sees_an_example_with_wrong_experts():
    results = run_ranks(run_layer, 2, _changed({"zip(rows.split(row_counts.tolist()),": "zip([rows],"}))
    assert min(distance for _, distance in results) > 1e-2


def test_bounded_to_few_rows_the_example_goes_in_rounds_and_is_the_same_layer():
    results = run_ranks(run_layer, 2, _changed({"max_rows=4096": "max_rows=100"}))
    assert max(distance for _, distance in results) < 1e-5


def _changed(words: dict[str, str]) -> str:
    """The example with other words, trained for two steps only."""
    source = examples()[0]
    for old, new in {**words, "range(1, 51)": "range(1, 3)"}.items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    return source


@pytest.mark.slow
@pytest.mark.launcher
def test_the_example_runs_under_torchrun(tmp_path):
    script = tmp_path / "moe_example.py"
    script.write_text(examples()[0])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    losses = losses_of(done.stdout)
    assert len(losses) == 5
    assert losses[-1] < 0.7 * losses[0]


def test_the_example_of_tiles_reads_what_a_dispatcher_hands_out():
    local = open_dispatcher("local", Placement(4), wire="fp8_pow2", keep_tiles=True)
    tokens = torch.randn(6, 256)
    expert_ids = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]])
    received = local.dispatch(tokens, torch.ones(6, 2), expert_ids).wait()
    names: dict = {"received": received}
    exec(compile(examples()[1], "README", "exec"), names)
    values = names["codes"].view(torch.float8_e4m3fn).float() * names["scale"].repeat_interleave(128, dim=1)
    assert values.equal(names["rows"]) and received.rows.isnan().all()


def test_the_replacement_example_sends_tokens_to_slots_of_their_experts():
    names: dict = {}
    exec(compile(examples()[-1], "README", "exec"), names)
    layout, slot_ids = names["layout"], names["slot_ids"]
    assert (layout.slot_experts[0][slot_ids] == names["expert_ids"]).all()
    # Copies take turns: none of an expert's has much more than its part.
    taken = Counter(slot_ids.flatten().tolist())
    for slots in layout.expert_slots()[0].tolist():
        shares = [taken[slot] for slot in slots if slot >= 0]
        assert max(shares) < 2.5 * sum(shares) / len(shares)
    assert names["moved"].shape == (58,)


def test_every_word_and_name_of_the_library_that_the_page_lists_exists():
    page = README.read_text()
    for word in (*factory.KINDS, *WIRES):
        assert f"`{word}`" in page
    for name in vars(dispatcher.Dispatcher):
        if not name.startswith("_"):
            assert f"dispatcher.{name}" in page or f"`{name}`" in page
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.CommError) and name != "NumericsError":
            assert f"`{name}`" in page
