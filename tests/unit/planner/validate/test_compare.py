"""A plan beside a run: bytes to the byte, a run that went as planned, and what cannot be compared."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.config.layout import check_layout
from moe_runtime.config.load import load_config
from moe_runtime.errors import ConfigError
from moe_runtime.planner.hardware.load import load_cluster
from moe_runtime.planner.host.observed import Observed, observe
from moe_runtime.planner.host.step import host_step
from moe_runtime.planner.validate.bytes import exchanged_bytes, expected_bytes
from moe_runtime.planner.validate.compare import Comparison, compare
from tests.unit.planner.host.machine import made_up, run_of

# Rows and bytes that runs of this config have recorded for a step, and what was set in them.
RECORDED = [
    ((), 81004, 83114584),
    (("layout.dp=4", "layout.ep=4"), 122168, 125357808),
    (("layout.pp=2", "layout.schedule=dualpipe"), 79476, 81546856),
]


@pytest.mark.parametrize(("overrides", "rows", "sent"), RECORDED)
def test_bytes_are_those_that_dispatchers_counted(overrides: tuple[str, ...], rows: int, sent: int) -> None:
    config = load_config("calibrate", overrides)
    layout = check_layout(config)
    record = {"comm_rows_inter": 0, "comm_rows_intra": rows}
    assert exchanged_bytes(config, layout, record, layout.world_size) == {"inter": 0, "intra": sent}
    assert expected_bytes(config, layout, layout.world_size)["intra"] == pytest.approx(sent, rel=0.05)


def as_recorded(run: Observed) -> Observed:
    """With what exchanges of the shipped config counted."""
    _, rows, sent = RECORDED[0]
    counted: dict[str, Any] = {"comm_rows_inter": 0, "comm_rows_intra": rows, "comm_bytes_inter": 0}
    counted |= {"comm_bytes_intra": sent, "bubble_fraction": 0.0, "exposed_comm_fraction": 0.1}
    return replace(run, records=tuple({**record, **counted} for record in run.records))


def errors(found: Comparison) -> dict[str, float | None]:
    return {line.name: line.error for line in found.lines}


def test_a_run_that_went_as_planned_shows_no_error() -> None:
    cluster = made_up()
    run = run_of((), cluster, apart=False)
    step_s = host_step(run.config, cluster).step_s
    went = as_recorded(replace(run, records=tuple({**each, "step_s": step_s} for each in run.records)))
    found = errors(compare(went, cluster))
    assert found["step"] == found["throughput"] == 0
    assert found["exchanged within nodes, from its rows"] == 0
    assert {"forward", "input grad", "weight grad", "exchange wait", "update"} <= found.keys()
    slower = replace(went, records=tuple({**each, "step_s": 2 * step_s} for each in went.records))
    assert errors(compare(slower, cluster))["step"] == pytest.approx(-0.5)


def test_backwards_that_were_never_parted_are_compared_whole() -> None:
    cluster = made_up()
    found = errors(compare(as_recorded(run_of((), cluster, apart=True)), cluster))
    assert "backward" in found and "weight grad" not in found


def test_what_cannot_be_compared_is_said() -> None:
    cluster = made_up()
    bare = replace(run_of((), cluster, apart=True), trace=None)
    said = " ".join(compare(bare, cluster).missing)
    assert all(word in said for word in ("memory", "trace_step", "no rows", "bubble_fraction"))
    elsewhere = compare(as_recorded(bare), load_cluster("h800"))
    assert "no section host" in " ".join(elsewhere.missing)
    assert errors(elsewhere)["exchanged within nodes, from its rows"] == 0


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a run folder"):
        observe(tmp_path)
    (tmp_path / "config.yaml").write_text("name: x\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: expected records"):
        observe(tmp_path)
