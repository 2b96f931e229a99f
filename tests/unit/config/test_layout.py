"""Impossible layouts are refused with the axes and choices that are then really possible."""

import itertools
import re
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moe_runtime.config.axes import Schedule
from moe_runtime.config.counts import stage_loads
from moe_runtime.config.fit import _Trial, layout_findings
from moe_runtime.config.layout import check_layout
from moe_runtime.config.schema import RunConfig
from moe_runtime.config.split import split_layers
from moe_runtime.errors import ConfigError
from tests.unit.config.samples import build


def _refused(run: RunConfig, world_size: int | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_layout(run, world_size)
    return str(caught.value).splitlines()


def _offers(line: str) -> list[dict[str, dict[str, Any]]]:
    """What a line offers, as changes of sections: `nearest: 2, 4`, `set pp 1, or ep 1`, `such as [..]`."""
    key, _, text = line.partition(": ")
    section, _, name = key.partition(".")
    offers: list[dict[str, dict[str, Any]]] = []
    listed = re.search(r"nearest[^:;]*: ((?:\d+(?:, )?)+)", text)
    if listed:
        offers += [{section: {name: int(n)}} for n in listed[1].strip(", ").split(", ")]
    such_as = re.search(r"such as (\[[^]]*\]), or null", text)
    if such_as:
        offers += [{section: {name: yaml.safe_load(such_as[1])}}, {section: {name: None}}]
    for choice in re.split(r", or |; ", text)[1:]:
        words = choice.removeprefix("set ").removeprefix("layout.")
        match = re.fullmatch(r"(\w+) (\w+)(?: x dp (\d+))?", words)
        if match and match[1] in ("pp", "ep", "schedule", "zero_stage", "dispatcher"):
            changes: dict[str, Any] = {match[1]: yaml.safe_load(match[2])}
            offers.append({"layout": changes | ({"dp": int(match[3])} if match[3] else {})})
    return offers


def _with(run: RunConfig, change: dict[str, dict[str, Any]]) -> RunConfig:
    values = run.model_dump(mode="json")
    for section, keys in change.items():
        values[section] |= keys
    return RunConfig.model_validate(values)


_ONE_MISTAKE = {
    "odd pp for dualpipe": (
        {"layout": {"pp": 3, "schedule": "dualpipe"}, "batch": {"global_batch_size": 24}},
        3,
    ),
    "odd pp at the last layer": (
        {
            "model": {"num_layers": 3},
            "layout": {"pp": 3, "schedule": "dualpipe"},
            "batch": {"global_batch_size": 12},
        },
        2,
    ),
    "dualpipe on one rank": ({"layout": {"schedule": "dualpipe"}, "batch": {"global_batch_size": 4}}, 2),
    "dualpipe of one layer": (
        {"model": {"num_layers": 1}, "layout": {"schedule": "dualpipe"}, "batch": {"global_batch_size": 4}},
        1,
    ),
    "single on two ranks": ({"layout": {"pp": 2, "schedule": "single"}}, 3),
    "single on two ranks, too few microbatches for dualpipe": (
        {"layout": {"pp": 2, "schedule": "single"}, "batch": {"global_batch_size": 3}},
        2,
    ),
    "ZeRO 2 in a pipeline": ({"layout": {"pp": 2, "zero_stage": 2}}, 2),
    "ZeRO 2 under dualpipe": ({"layout": {"pp": 2, "zero_stage": 2, "schedule": "dualpipe"}}, 1),
    "ep does not divide dp": ({"layout": {"dp": 8, "ep": 3}, "model": {"num_experts": 9}}, 1),
    "ep does not divide the experts": ({"layout": {"dp": 3, "ep": 3}, "batch": {"global_batch_size": 9}}, 1),
    "ep more than dp": ({"layout": {"dp": 4, "ep": 8}}, 2),
    "local experts of two ranks": ({"layout": {"dp": 2, "ep": 2, "dispatcher": "local"}}, 2),
    "batch no multiple of the lanes": ({"layout": {"dp": 4}, "batch": {"global_batch_size": 10}}, 2),
    "batch below the lanes": ({"layout": {"dp": 4}, "batch": {"global_batch_size": 3}}, 1),
    "odd number of microbatches": (
        {"layout": {"pp": 2, "schedule": "dualpipe"}, "batch": {"global_batch_size": 7}},
        2,
    ),
    "too few microbatches": (
        {"layout": {"pp": 4, "schedule": "dualpipe"}, "batch": {"global_batch_size": 6}},
        1,
    ),
    "batch below the start of its ramp": (
        {
            "layout": {"dp": 4, "pp": 1},
            "batch": {"global_batch_size": 10, "ramp_start_size": 9, "ramp_tokens": 100},
        },
        1,
    ),
    "more stages than layers": ({"layout": {"pp": 6}, "batch": {"global_batch_size": 48}}, 2),
    "more stages than layers in a V": (
        {"layout": {"pp": 4, "schedule": "zbv"}, "batch": {"global_batch_size": 48}},
        1,
    ),
    "too few microbatches for a V": (
        {"layout": {"pp": 2, "schedule": "dualpipev"}, "batch": {"global_batch_size": 3}},
        1,
    ),
    "counts of layers for ranks, not stages": (
        {"layout": {"pp": 2, "schedule": "zbv", "layers_per_stage": [2, 2]}},
        2,
    ),
    "more stages than an odd number of layers": (
        {"model": {"num_layers": 3}, "layout": {"pp": 4, "schedule": "dualpipe"}},
        1,
    ),
    "too few counts of layers": ({"layout": {"pp": 2, "layers_per_stage": [4]}}, 2),
    "wrong sum of layers": ({"layout": {"pp": 2, "layers_per_stage": [2, 3]}}, 2),
    "a middle stage of nothing": ({"layout": {"pp": 4, "layers_per_stage": [2, 0, 1, 1]}}, 2),
}


@pytest.mark.parametrize("case", _ONE_MISTAKE)
def test_each_choice_that_a_refusal_offers_is_then_accepted(case: str) -> None:
    changes, least = _ONE_MISTAKE[case]
    run = build(**changes)
    lines = _refused(run)
    assert len({line.split(":")[0] for line in lines}) == 1, lines
    offers = [offer for line in lines for offer in _offers(line)]
    assert len(offers) >= least, lines
    for offer in offers:
        check_layout(_with(run, offer))


def test_a_stage_without_layers_passes_at_the_ends_alone() -> None:
    for counts in ([0, 4], [4, 0], [0, 2, 2, 0]):
        layout = check_layout(build(layout={"pp": len(counts), "layers_per_stage": counts}))
        assert [len(layers) for layers in layout.layers] == counts
    (line,) = _refused(build(layout={"pp": 4, "layers_per_stage": [4, 0, 0, 0]}))
    assert "a layer at least on every stage but the first and the last, got none on stage 1, 2" in line


@pytest.mark.parametrize(
    ("layout", "world_size", "wanted"),
    [
        ({"pp": 2, "dp": 2}, 2, [(2, 1), (1, 2)]),
        ({"pp": 2, "dp": 2}, 8, [(2, 4), (4, 2)]),
        ({"pp": 2, "dp": 2, "schedule": "dualpipe"}, 3, []),
        ({"pp": 2, "dp": 2, "ep": 2}, 8, [(2, 4), (4, 2)]),
        ({"pp": 2, "dp": 4, "ep": 4}, 4, [(1, 4)]),
        ({"dp": 4}, 7, []),
    ],
)
def test_a_wrong_number_of_processes_names_the_axes_and_layouts_for_as_many(
    layout: dict, world_size: int, wanted: list
) -> None:
    run = build(layout=layout, batch={"global_batch_size": 16})
    needed = run.layout.pp * run.layout.dp
    check_layout(run, needed)
    (line,) = _refused(run, world_size)
    axes = f"pp {run.layout.pp} x dp {run.layout.dp}"
    assert line.startswith(f"layout: {axes} needs {needed} processes, got {world_size}; start {needed}")
    offers = _offers(line)
    assert [(offer["layout"]["pp"], offer["layout"]["dp"]) for offer in offers] == wanted, line
    for offer in offers:
        assert check_layout(_with(run, offer), world_size).world_size == world_size


def test_all_mistakes_of_a_layout_are_told_together() -> None:
    run = build(
        layout={"pp": 3, "dp": 2, "ep": 3, "schedule": "dualpipe", "zero_stage": 2, "dispatcher": "local"},
        batch={"global_batch_size": 7},
    )
    keys = {line.split(":")[0] for line in _refused(run, 5)}
    assert keys == {
        "layout",
        "layout.pp",
        "layout.zero_stage",
        "layout.ep",
        "layout.dispatcher",
        "batch.global_batch_size",
    }


_LAYOUTS = st.fixed_dictionaries(
    {
        "pp": st.integers(1, 6),
        "dp": st.integers(1, 6),
        "ep": st.integers(1, 4),
        "schedule": st.sampled_from(get_args(Schedule)),
        "dispatcher": st.sampled_from(["auto", "local", "alltoall"]),
        "zero_stage": st.sampled_from([1, 2]),
        "layers_per_stage": st.none() | st.lists(st.integers(0, 3), min_size=1, max_size=6),
    }
)


@settings(max_examples=150, deadline=None)
@given(layout=_LAYOUTS, size=st.integers(1, 40), micro=st.integers(1, 3), layers=st.integers(1, 6))
def test_the_short_form_of_the_rules_and_the_findings_agree(
    layout: dict, size: int, micro: int, layers: int
) -> None:
    run = build(
        model={"num_layers": layers},
        layout=layout,
        batch={"global_batch_size": size, "micro_batch_size": micro},
    )
    findings = layout_findings(run.model, run.layout, run.batch)
    assert _Trial(run.model, run.layout, run.batch).fits() == (not findings)


def test_auto_means_what_the_schema_says() -> None:
    def resolved(**layout: Any) -> tuple[str, str]:
        checked = check_layout(build(layout=layout, batch={"global_batch_size": 24}))
        return checked.schedule, checked.dispatcher

    assert resolved() == ("single", "local")
    assert resolved(pp=2) == ("auto", "local")  # costs decide
    assert resolved(dp=2, ep=2) == ("single", "auto")  # the machines decide
    assert resolved(pp=2, schedule="1f1b", dp=2, dispatcher="alltoall") == ("1f1b", "alltoall")


def test_what_is_free_to_choose_lies_as_a_v_where_layers_are_enough() -> None:
    def placed(num_layers: int, **layout: Any) -> tuple:
        return check_layout(build(model={"num_layers": num_layers}, layout={"pp": 2, **layout})).placement

    for schedule in ("auto", "searched"):
        assert placed(4, schedule=schedule) == ((0, 1, 1, 0),)
        assert placed(3, schedule=schedule) == ((0, 1),)
        assert placed(4, schedule=schedule, layers_per_stage=[2, 2]) == ((0, 1),)
        assert placed(6, schedule=schedule, layers_per_stage=[1, 2, 2, 1]) == ((0, 1, 1, 0),)
        assert placed(8, schedule=schedule, chunks=1) == ((0, 1),)
        assert placed(8, schedule=schedule, chunks=4) == ((0, 1, 1, 0, 0, 1, 1, 0),)
    assert placed(4, schedule="dualpipe") == ((0, 1), (1, 0))


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [
        ({"schedule": "zbv", "chunks": 2}, "chunks: is for interleaved, searched and auto, got schedule zbv"),
        ({"schedule": "interleaved", "chunks": 1}, "chunks: expected 2 or more under interleaved, got 1"),
        ({"schedule": "searched", "chunks": 3}, "chunks: expected 1 or an even number, got 3"),
        ({"schedule": "1f1b", "max_live": 2.0}, "max_live: is for searched and auto, got schedule 1f1b"),
        ({"schedule": "dualpipe", "costs": "F=1"}, "costs: is for searched and auto, got schedule dualpipe"),
    ],
)
def test_keys_that_a_schedule_does_not_read_are_refused(layout: dict, wanted: str) -> None:
    with pytest.raises(ValidationError, match=wanted):
        build(layout={"pp": 2, **layout})


def _costs(run: RunConfig, num_stages: int) -> dict[tuple[int, ...], tuple[int, int]]:
    """Of every possible split the heaviest stage and the sum of squares, by brute force."""
    layers, first, last = stage_loads(run.model)
    costs = {}
    for cuts in itertools.combinations(range(1, len(layers)), num_stages - 1):
        ends = [0, *cuts, len(layers)]
        loads = [sum(layers[a:b]) for a, b in itertools.pairwise(ends)]
        loads[0] += first
        loads[-1] += last
        counts = tuple(b - a for a, b in itertools.pairwise(ends))
        costs[counts] = (max(loads), sum(load**2 for load in loads))
    return costs


@settings(max_examples=40, deadline=None)
@given(
    num_stages=st.integers(1, 7),
    vocab_size=st.sampled_from([8, 100, 1000, 4096]),
    ffn_size=st.integers(1, 300),
    num_dense_layers=st.integers(0, 9),
)
def test_the_heaviest_stage_is_as_light_as_can_be_and_the_others_are_even(
    num_stages: int, vocab_size: int, ffn_size: int, num_dense_layers: int
) -> None:
    sizes = {"vocab_size": vocab_size, "ffn_size": ffn_size, "num_dense_layers": num_dense_layers}
    run = build(model={"num_layers": 9, **sizes})
    costs = _costs(run, num_stages)
    assert costs[split_layers(run.model, num_stages)] == min(costs.values())
