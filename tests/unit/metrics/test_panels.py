"""The list of panels: every number that is recorded is shown, and nothing else."""

from moe_runtime.metrics.panel import ALERTS, HEATMAP, PER_LAYER, SAMPLES, SECTIONS, TIMELINE, flat_values
from moe_runtime.metrics.panels import PANELS, panel_of, panels_of
from moe_runtime.metrics.record import METRICS, metric_of

# Recorded for those that read the file: the axis of every picture, what another key counts, and a name.
UNDRAWN = {"step", "skipped", "worst_layer"}


def test_every_number_of_a_record_has_a_panel_but_those_of_single_layers() -> None:
    wanted = {path.replace("*", "x") for path in METRICS if not path.startswith(f"{PER_LAYER}/")}
    assert {path for path in wanted if panel_of(path) is None} == UNDRAWN


def test_every_key_of_a_panel_of_lines_is_documented() -> None:
    keys = [key for panel in PANELS if panel.kind == "lines" for key in panel.keys]
    assert [key for key in keys if metric_of(key.replace("*", "x")) is None] == []
    assert len(set(keys)) == len(keys), "a number is shown once"


def test_titles_are_unique_and_every_panel_says_how_to_read_it() -> None:
    assert len({panel.title for panel in PANELS}) == len(PANELS)
    assert all(panel.hint.endswith(".") for panel in PANELS)
    assert [panel for section in SECTIONS for panel in panels_of(section)] == list(PANELS)
    media = {panel.keys[0] for panel in PANELS if panel.kind != "lines"}
    assert media == {SAMPLES, HEATMAP, TIMELINE, ALERTS}


def test_a_record_becomes_flat_keys_without_single_layers_and_without_gaps() -> None:
    record = {
        "loss": 1.5,
        "lr": None,
        "routing": {"violation": {"min": 0.0, "max": None}},
        "layers": {"layers.3": {"violation": 0.5}},
    }
    assert flat_values(record) == {"loss": 1.5, "routing/violation/min": 0.0}


def test_a_pattern_finds_its_keys_and_does_not_reach_over_a_slash() -> None:
    panel = panel_of("val_sets/books/val_bpb")
    assert panel is not None and panel.title == "Validation, bits per byte"
    emitted = ["val_sets/web/val_bpb", "val_bpb", "loss", "val_sets/books/val_bpb"]
    assert panel.lines(emitted) == ["val_bpb", "val_sets/books/val_bpb", "val_sets/web/val_bpb"]
    assert panel_of("val_sets/a/b/val_bpb") is None and panel_of("made_up") is None
