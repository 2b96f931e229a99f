"""`moe-runtime bench comm`: its predictions against another count, its figures, and small real runs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from moe_comm.control import HEADER_SIZE
from moe_comm.two_hop import DEFAULT_CHUNKS

from moe_runtime.cli.bench_comm import analytic
from moe_runtime.cli.bench_comm.crew import run_crew
from moe_runtime.cli.bench_comm.measure import describe, measure
from moe_runtime.cli.bench_comm.plans import plan
from moe_runtime.cli.bench_comm.routing import Routing, make_routing, max_over_mean
from moe_runtime.cli.bench_comm.settings import CONTENDERS, Settings
from moe_runtime.cli.bench_comm.summary import summarise_exchange
from moe_runtime.cli.testbed.crew import RankFailed
from moe_runtime.cli.testbed.links import require_tools
from moe_runtime.errors import ConfigError
from moe_runtime.planner.reckon.routed import flat_rows, hop_rows
from moe_runtime.planner.reckon.wire import record_bytes

_CAN_LINK = os.geteuid() == 0 and all(shutil.which(tool) for tool in ("ip", "tc", "unshare", "nsenter"))
needs_links = pytest.mark.skipif(
    not _CAN_LINK, reason="network namespaces need root, iproute2 and util-linux"
)
_SHAPE: dict[str, Any] = {"num_experts": 32, "num_groups": 4, "groups_kept": 2}
_SMALL = Settings(nodes=2, ranks_per_node=2, hidden=128, tokens=24, **_SHAPE)


def _random_ids(settings: Settings) -> np.ndarray:
    draw = np.random.default_rng(3)
    shape = (settings.world_size, settings.tokens, settings.num_experts)
    ids = draw.random(shape).argsort(axis=2)[:, :, : settings.top_k]
    ids[0] %= settings.local_experts  # rank 0 uses its own experts alone; repeated ones do not matter here
    return ids


@pytest.mark.parametrize(
    ("fields", "expected"),
    [([(3, 2)], 6), ([(3, 1), (1, 4)], 8), ([(128, 1), (1, 4), (2, 2), (2, 4)], 144), ([(5, 1), (1, 1)], 6)],
)
def test_a_record_is_laid_out_as_a_struct(fields: list[tuple[int, int]], expected: int) -> None:
    assert record_bytes(fields) == expected


def test_rows_of_one_token_by_hand() -> None:
    settings = Settings(nodes=2, ranks_per_node=2, num_experts=8, tokens=1, num_groups=4, groups_kept=4)
    # Rank 1's only token uses experts 0 (rank 0), 4 and 5 (rank 2), 6 (rank 3).
    ids: list[list[list[int]]] = [[], [[0, 4, 5, 6]], [], []]
    assert flat_rows(ids, settings.local_experts)[1] == [1, 0, 2, 1]
    far, near = hop_rows(ids, settings.local_experts, settings.ranks_per_node)
    assert far[1] == [0, 1, 0, 1], "one copy stays in the node, one goes to rank 3, of the same lane"
    assert near == [[0] * 4, [1, 0, 0, 0], [0] * 4, [0, 0, 1, 1]]


def test_bytes_between_nodes_equal_a_count_by_set_operations() -> None:
    settings, ids = _SMALL, _random_ids(_SMALL)
    node_of_expert = np.arange(settings.num_experts) // (settings.num_experts // settings.nodes)
    home = (np.arange(settings.world_size) // settings.ranks_per_node)[:, None, None]
    copies = int((node_of_expert[ids] != home).sum())
    crossing = sum(
        len(set(node_of_expert[ids[rank, token]]) - {rank // settings.ranks_per_node})
        for rank in range(settings.world_size)
        for token in range(settings.tokens)
    )
    far_pairs = settings.world_size * (settings.world_size - settings.ranks_per_node)
    plain = analytic.predict("plain", ids.tolist(), settings)
    assert analytic.between_nodes(plain.dispatch, settings) == copies * 256 + far_pairs * 8 * 8
    assert analytic.between_nodes(plain.combine, settings) == copies * 256
    two_hop = analytic.predict("two_hop_fp8", ids.tolist(), settings)
    control = far_pairs * (HEADER_SIZE + 4 + 2 * DEFAULT_CHUNKS) * 8
    assert analytic.between_nodes(two_hop.dispatch, settings) == crossing * (128 + 4 + 16 + 32) + control
    assert analytic.between_nodes(two_hop.combine, settings) == crossing * 256 + control


def test_link_directions_add_up_what_their_ranks_send() -> None:
    matrix = [[9, 1, 2, 3], [4, 9, 5, 6], [10, 20, 9, 7], [30, 40, 8, 9]]
    assert analytic.node_directions(matrix, _SMALL) == ([16, 100], [100, 16])
    assert analytic.within_nodes(matrix, _SMALL) == 1 + 4 + 7 + 8


@pytest.mark.parametrize("name", ["balanced", "natural"])
def test_routing_keeps_to_its_groups_and_to_the_load_that_its_name_promises(name: str) -> None:
    settings = Settings(tokens=512)
    routing = make_routing(name, settings)
    groups = routing.expert_ids // (settings.num_experts // settings.num_groups)
    assert max(len(set(chosen.tolist())) for chosen in groups.flatten(0, 1)) <= settings.groups_kept
    assert routing.expert_ids.sort(dim=2).values.diff(dim=2).min() > 0, "experts of a token are distinct"
    load = max_over_mean(routing.loads(settings.num_experts))
    assert load < 1.5 if name == "balanced" else 1.9 < load < 2.1


def test_adversarial_routing_leaves_one_rank_with_everything() -> None:
    routing = make_routing("adversarial", Settings(tokens=8))
    assert int(routing.expert_ids.max()) < Settings().local_experts
    with pytest.raises(ConfigError, match="use fewer ranks"):
        make_routing("adversarial", Settings(nodes=32, num_groups=32, groups_kept=4, tokens=1))


def _said(counted_off_by: int) -> tuple[list[dict[str, Any]], dict[str, Routing], Settings]:
    """What ranks would say of an exchange in which each phase takes rank + 1 seconds."""
    settings = Settings(
        nodes=2, ranks_per_node=1, hidden=128, tokens=4, **_SHAPE, rate_mbit=8,
        contenders=("plain",), routings=("balanced",),
    )  # fmt: skip
    ids = torch.from_numpy(_random_ids(settings))
    predicted = analytic.predict("plain", ids.tolist(), settings)
    said = []
    for rank in range(2):
        phases = {}
        for phase in ("dispatch", "combine"):
            sent = getattr(predicted, phase)[rank][1 - rank] + counted_off_by
            link = {"sent_bytes": sent + 66, "sent_packets": 1}
            phases[phase] = {"s": rank + 1.0, "cpu_s": 0.5, "sent": [0, sent], "link": link}
        said.append({"balanced": {"plain": [{**phases, "error": 0.0}]}})
    return said, {"balanced": Routing(ids, torch.ones(ids.shape) / 8)}, settings


def test_figures_follow_from_what_ranks_say() -> None:
    said, routings, settings = _said(0)
    line = summarise_exchange(said, routings, settings)[0]["contenders"][0]
    assert line["s"] == 4.0 and line["cpu_s"] == 2.0 and line["time"]["ratio"] == 1.0
    predicted = analytic.predict("plain", routings["balanced"].expert_ids.tolist(), settings)
    busiest = [max(matrix[0][1], matrix[1][0]) for matrix in (predicted.dispatch, predicted.combine)]
    assert line["floor_s"] == pytest.approx(sum(busiest) / 1e6), "8 Mbit/s is 10^6 bytes a second"
    assert line["over_floor"] == pytest.approx(4.0 / line["floor_s"])
    assert line["dispatch"]["is_as_predicted"] and line["combine"]["is_as_predicted"]
    counted = line["dispatch"]["inter_bytes"]
    assert line["dispatch"]["link_over_counted"] == pytest.approx(2 * 66 / counted)
    assert line["dispatch"]["header_share"] == pytest.approx(2 * 66 / counted)


def test_one_byte_too_many_is_noticed() -> None:
    said, routings, settings = _said(1)
    line = summarise_exchange(said, routings, settings)[0]["contenders"][0]
    assert not line["dispatch"]["is_as_predicted"] and not line["combine"]["is_as_predicted"]


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="leave one out"):
        plan("exchange", "none", {"rate_mbit": 100})
    with pytest.raises(ConfigError, match="veth or none"):
        plan("exchange", "wifi", {})
    with pytest.raises(ConfigError, match="divide 256 experts"):
        plan("exchange", "veth", {"nodes": 3})
    with pytest.raises(ConfigError, match="got 'even'"):
        plan("exchange", "veth", {"routings": ("even",)})


def test_links_without_their_tools_are_refused_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"ip, tc, unshare.*--links none"):
        require_tools()


def test_every_contender_is_right_and_sends_what_was_predicted_on_loopback() -> None:
    settings = Settings(
        nodes=2, ranks_per_node=1, rate_mbit=None, hidden=256, tokens=32, **_SHAPE, top_k=4, rounds=1,
        routings=("natural", "adversarial"), contenders=(*CONTENDERS, "raw"),
    )  # fmt: skip
    result = measure(settings)
    for entry in result["routings"]:
        lines = {line["contender"]: line for line in entry["contenders"]}
        assert set(lines) == {*CONTENDERS, "raw"}
        for name in CONTENDERS:
            assert lines[name]["dispatch"]["is_as_predicted"] and lines[name]["combine"]["is_as_predicted"], (
                name
            )
    assert (
        lines["two_hop_fp8"]["dispatch"]["inter_ratio"] < lines["two_hop_bf16"]["dispatch"]["inter_ratio"] < 1
    )
    assert "two_hop_fp8" in describe(result)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_measurement_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"(?s)exit code 1.*balanced\.npz"):
        run_crew(Settings(nodes=2, ranks_per_node=1, rate_mbit=None), tmp_path, 60.0)


@pytest.mark.slow
@needs_links
def test_interfaces_count_what_we_count_and_links_run_at_their_rate() -> None:
    settings = Settings(
        nodes=2, rate_mbit=200, hidden=2048, tokens=256, **_SHAPE, rounds=1,
        routings=("balanced",), contenders=("plain", "two_hop_fp8"),
    )  # fmt: skip
    result = measure(settings)
    assert 0.98 < result["links"]["receives_first"] < 1.2
    for line in result["routings"][0]["contenders"]:
        for phase in ("dispatch", "combine"):
            assert line[phase]["is_as_predicted"]
            assert 0 < line[phase]["link_over_counted"] < 0.03
        assert line["over_floor"] > 0.98, "nothing is faster than the links"


@pytest.mark.slow
@needs_links
def test_nothing_is_left_behind_by_a_benchmark_that_is_killed(tmp_path: Path) -> None:
    code = "from moe_runtime.cli.app import main; main()"
    options = ("bench", "comm", "--nodes", "2", "--rounds", "50")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    run = subprocess.Popen([sys.executable, "-c", code, *options], stdout=subprocess.DEVNULL, env=environment)
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while len(children) < 3 + 4 and time.monotonic() < deadline:  # three namespaces, four ranks
        time.sleep(0.2)
        children = psutil.Process(run.pid).children(recursive=True)
    assert len(children) >= 7
    time.sleep(3)  # until ranks have asked to die with their parent
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive
