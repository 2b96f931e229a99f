"""The trace form and what is read from it, on a step worked out by hand and on simulated ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moe_runtime.errors import ConfigError
from moe_runtime.planner.costs import Costs, StageCosts
from moe_runtime.planner.figures import figures_of
from moe_runtime.planner.measured import timeline_of
from moe_runtime.planner.measured_costs import measured_costs, whole_model
from moe_runtime.planner.simulate import simulate
from moe_runtime.planner.trace import Event, Trace, read_trace, to_chrome, write_trace
from moe_runtime.schedule import build
from moe_runtime.schedule.action import is_transfer
from moe_runtime.schedule.forward_only import forward_only
from tests.unit.planner.synthetic import trace_of

# 1F1B on 2 ranks; F takes 1 s, B 2 s, a tensor 0.25 s. Rank 1 is never idle once begun, rank 0 waits twice:
#   rank 0  F0 10-11  F1 11-12  ............ B0 14.5-16.5 .. B1 17.5-19.5
#   rank 1  .........  F0 11.25-12.25  B0 -14.25  F1 -15.25  B1 -17.25
HAND_MADE = Trace(
    events=(
        Event(0, "action", "0F0", 10.0, 11.0),
        Event(0, "action", "0F1", 11.0, 12.0),
        Event(0, "action", "0SA1", 12.0, 12.01),
        Event(0, "action", "0B0", 14.5, 16.5),
        Event(0, "exchange", "combine_b layers.1", 15.0, 16.0),
        Event(0, "wait", "exchange", 15.5, 16.0),
        # A recorder that begins an entry before its input is there: the wait is no part of the entry.
        Event(0, "action", "0B1", 16.5, 19.5),
        Event(0, "wait", "transfer", 16.5, 17.5),
        Event(0, "phase", "attend_b layers.1", 17.5, 19.5),
        Event(1, "action", "1F0", 11.25, 12.25),
        Event(1, "exchange", "dispatch layers.2", 11.5, 12.0),
        Event(1, "exchange", "combine layers.2", 11.75, 12.25),  # 0.75 s of exchange, 0.25 s of it both
        Event(1, "wait", "exchange", 11.875, 12.125),
        Event(1, "action", "1B0", 12.25, 14.25),
        Event(1, "action", "1F1", 14.25, 15.25),
        Event(1, "action", "1B1", 15.25, 17.25),
    ),
    program=build("1f1b", 2, 2),
    pp_ranks=(0, 1),
    step=7,
)


def test_figures_of_a_hand_made_trace() -> None:
    timeline = timeline_of(HAND_MADE)
    figures = figures_of(timeline)
    assert figures.makespan == 9.5  # 10 to 19.5
    assert figures.bubble_fraction == pytest.approx((3.5 + 3.5) / 19)  # both ranks compute 6 s
    assert [timeline.comm(rank) for rank in (0, 1)] == [1.0, 0.75]
    assert [timeline.exposed(rank) for rank in (0, 1)] == [0.5, 0.25]
    assert figures.exposed_comm_fraction == pytest.approx(0.75 / 19)
    assert figures.hidden_comm_fraction == pytest.approx(4 / 7)
    assert figures.hidden_in_pairs_fraction is None
    assert [timeline.peak_memory(rank) for rank in (0, 1)] == [2.0, 1.0]


def test_an_entry_begins_when_what_it_takes_in_has_arrived() -> None:
    assert timeline_of(HAND_MADE).rows[0][-1].start == 7.5  # 17.5 on the recorder's clock


def test_costs_of_a_hand_made_trace() -> None:
    costs = measured_costs(HAND_MADE)
    # Of stage 1's forwards one waited 0.25 s, of stage 0's backwards one 0.5 s: medians halve that.
    assert costs.stages[0] == StageCosts(1.0, 0.875, 0.875, 0.0, 0.25)
    assert costs.stages[1] == StageCosts(0.875, 1.0, 1.0, 0.125, 0.0)
    assert costs.transfer == 0.25
    assert whole_model(costs, 1).forward == 1.875


@pytest.mark.parametrize(("name", "ranks", "microbatches"), [("dualpipe", 4, 8), ("1f1b", 3, 5)])
def test_simulation_with_measured_costs_gives_the_measured_step(
    name: str, ranks: int, microbatches: int
) -> None:
    program = build(name, ranks, microbatches)
    stages = tuple(
        StageCosts(1 + stage / 8, 1.5, 0.75, 0.5, 0.25 * stage, ranks / program.num_stages)
        for stage in range(program.num_stages)
    )
    # B of 1F1B never ran in parts: half and half is what is measured, and its sum is what counts.
    simulated = simulate(program, Costs(stages, transfer=0.125, hidden=0.75))
    trace = trace_of(simulated, program)
    timeline = timeline_of(trace)
    for got, expected in zip(timeline.rows, simulated.rows, strict=True):
        assert [span.entry for span in got] == [span.entry for span in expected]
        assert [span.end for span in got] == pytest.approx([span.end for span in expected])
    assert figures_of(timeline).hidden_comm_fraction == pytest.approx(
        figures_of(simulated).hidden_comm_fraction
    )
    assert [timeline.peak_memory(rank) for rank in range(ranks)] == [
        simulated.peak_memory(rank) for rank in range(ranks)
    ]
    again = simulate(program, measured_costs(trace))
    # Transfers share the communication lane with exchanges, so a few entries took a little longer.
    assert again.makespan == pytest.approx(simulated.makespan, rel=0.03)


def test_lanes_of_a_pipeline_rank_stand_together_and_are_named() -> None:
    twin = tuple(replace(event, rank=event.rank + 2) for event in HAND_MADE.events)
    trace = replace(HAND_MADE, events=HAND_MADE.events + twin, pp_ranks=(0, 1, 0, 1))
    timeline = timeline_of(trace)
    assert timeline.labels == ("pp 0 · dp 0", "pp 0 · dp 1", "pp 1 · dp 0", "pp 1 · dp 1")
    assert timeline.rows[0] == timeline.rows[1]
    assert measured_costs(trace) == measured_costs(HAND_MADE)


def test_a_step_of_forwards_alone_has_costs_too() -> None:
    lowered = forward_only(((0, 1),), 2)
    rows = [tuple(entry for entry in row if not is_transfer(entry)) for row in lowered.rows]
    bare = replace(lowered, rows=tuple(rows))
    events = tuple(event for event in HAND_MADE.events if event.lane == "action" and event.name[1] == "F")
    costs = measured_costs(Trace(events, bare, (0, 1)))
    assert costs.stages[0] == StageCosts(1.0, 1.0, 1.0)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace(HAND_MADE, path)
    again = read_trace(path)
    assert (again.program, again.pp_ranks, again.step) == (HAND_MADE.program, (0, 1), 7)
    key = lambda event: (event.rank, event.lane, event.start, event.name)  # noqa: E731
    assert sorted(again.events, key=key) == sorted(HAND_MADE.events, key=key)


def test_events_of_a_track_never_cross() -> None:
    events = [event for event in to_chrome(HAND_MADE)["traceEvents"] if event["ph"] == "X"]
    assert len(events) == len(HAND_MADE.events)
    for first in events:
        for second in events:
            if first is not second and (first["pid"], first["tid"]) == (second["pid"], second["tid"]):
                ends, begins = first["ts"] + first["dur"], second["ts"]
                assert first["ts"] > begins or ends <= begins


def test_chrome_form_names_processes_and_tracks() -> None:
    chrome = to_chrome(HAND_MADE)
    names = [event["args"]["name"] for event in chrome["traceEvents"] if event["name"] == "process_name"]
    assert names == ["pp 0 (rank 0)", "pp 1 (rank 1)"]
    tracks = {
        e["args"]["name"] for e in chrome["traceEvents"] if e["name"] == "thread_name" and e["pid"] == 1
    }
    assert tracks == {"actions", "exchange in flight", "exchange in flight 2", "stood still"}
    assert chrome["otherData"]["schedule"] == "1f1b" and chrome["otherData"]["placement"] == [[0, 1]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda chrome: chrome.pop("otherData"), "KeyError: 'otherData'"),
        (
            lambda chrome: chrome["otherData"].update(pp_ranks=[0, 0]),
            "pp_ranks [0, 0] for a program of 2 rows",
        ),
        (lambda chrome: chrome["otherData"].update(program="x"), "otherData.program: schedule text"),
        (
            lambda chrome: chrome["otherData"].update(program="x microbatches=1 placement=5,0\n0: 0F0\n1:"),
            "fit",
        ),
        (lambda chrome: chrome["otherData"].update(program="x microbatches=1 placement=0,1\n0:\n1:"), "fit"),
        (lambda chrome: chrome["traceEvents"][-1].update(ts="x"), "ValueError"),
        (lambda chrome: chrome["traceEvents"][-1].update(dur=float("nan")), "event {"),
        (lambda chrome: chrome["traceEvents"][-1].update(pid=9), "event {"),
        (lambda chrome: chrome.update(traceEvents=None), "TypeError"),
    ],
)
def test_a_damaged_trace_is_refused_in_one_line(change, says: str, tmp_path: Path) -> None:
    chrome = to_chrome(HAND_MADE)
    change(chrome)
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(chrome))
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and says in message and "\n" not in message


@pytest.mark.parametrize(
    ("events", "says"),
    [
        (HAND_MADE.events[1:], "pp 0: expected each entry of the program once, got no 0F0"),
        ((*HAND_MADE.events, HAND_MADE.events[0]), "got 0F0 twice"),
        ((*HAND_MADE.events, Event(0, "action", "1F1", 20.0, 21.0)), "got 1F1, not in its row"),
        ((*HAND_MADE.events[1:], Event(0, "action", "0F0", 10.0, 11.5)), "0F1 begun before 0F0 had ended"),
    ],
)
def test_a_trace_that_is_not_of_its_program_is_refused(events: tuple[Event, ...], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        timeline_of(replace(HAND_MADE, events=events))
    assert says in str(caught.value)


def test_lives_that_a_rank_counted_go_before_those_of_its_program(tmp_path: Path) -> None:
    events = [*HAND_MADE.events]
    begin = min(event.start for event in events)
    counted = [Event(0, "live", str(n), begin + n / 10, begin + n / 10) for n in (1, 2, 7)]
    trace = replace(HAND_MADE, events=(*events, *counted))
    write_trace(trace, tmp_path / "trace.json")
    again = timeline_of(read_trace(tmp_path / "trace.json"))
    unit = trace.program.num_ranks / trace.program.num_stages
    assert again.peak_memory(0) == 7 * unit
    assert again.peak_memory(1) == timeline_of(HAND_MADE).peak_memory(1)
