"""What was meant by a key, a section or a word that is not there."""

import random

import pytest

from moe_runtime.config.closest import closest, slips
from moe_runtime.config.other_names import OTHER_NAMES
from moe_runtime.config.suggest import key_paths, section_at, suggest_key
from tests.unit.config.samples import slips_of, typos_of


def _slow_slips(word: str, other: str) -> int:
    """The definition, without a table."""
    if not word or not other:
        return len(word) + len(other)
    fewest = min(
        _slow_slips(word[:-1], other) + 1,
        _slow_slips(word, other[:-1]) + 1,
        _slow_slips(word[:-1], other[:-1]) + (word[-1] != other[-1]),
    )
    if len(word) > 1 and len(other) > 1 and word[-2:] == other[-1] + other[-2]:
        fewest = min(fewest, _slow_slips(word[:-2], other[:-2]) + 1)
    return fewest


def test_slips_are_counted_as_they_are_defined() -> None:
    draw = random.Random(0)
    for _ in range(60):
        word, other = ("".join(draw.choices("abc", k=draw.randrange(6))) for _ in range(2))
        assert slips(word, other) == _slow_slips(word, other), (word, other)


def suggest_override(key: str) -> str:
    """The hint for `key=1`: of the first part of it that is not there."""
    words = key.split(".")
    for length, word in enumerate(words, start=1):
        section = section_at(tuple(words[: length - 1]))
        if section is None:
            return "no section"
        if word not in section.model_fields:
            value: object = 1
            for inner in reversed(words[length:]):
                value = {inner: value}
            return suggest_key(tuple(words[:length]), value)
    return "a key"


def _missed(typos: list[tuple[tuple[str, ...], str]]) -> list[str]:
    """Typos for which not the right key, alone, is suggested."""
    hints = [(path, typo, suggest_key((*path[:-1], typo))) for path, typo in typos]
    return [
        f"{'.'.join(path)} as {typo}{hint}"
        for path, typo, hint in hints
        if hint != f"; did you mean {'.'.join(path)}?"
    ]


def test_of_200_keys_with_one_slip_at_least_95_percent_are_recognised() -> None:
    draw = random.Random(200)
    keys = list(key_paths())
    typos = [(path, draw.choice(typos_of(path))) for path in draw.choices(keys, k=200)]
    missed = _missed(typos)
    assert len(missed) <= 10, missed


def test_of_300_overrides_with_one_slip_anywhere_95_percent_lead_to_the_whole_key() -> None:
    draw = random.Random(300)
    keys = [".".join(path) for path in key_paths() if not {"NAME", "N"} & set(path)]
    leaves = [key for key in keys if section_at(tuple(key.split("."))) is None]
    missed = []
    for key in draw.choices(leaves, k=300):
        typo = draw.choice(sorted(slips_of(key, draw) - set(keys)))
        if "" in typo.split("."):  # told as no key at all
            continue
        hint = suggest_override(typo)
        if not hint.startswith(f"; did you mean {key}") or hint[15 + len(key)] not in "?, ":
            missed.append(f"{typo}{hint}")
    assert len(missed) <= 15, missed


@pytest.mark.slow
def test_of_all_slips_in_all_keys_95_percent_are_recognised() -> None:
    typos = []
    for path in key_paths():
        section = section_at(path[:-1])
        assert section is not None
        words = slips_of(path[-1], random.Random(path[-1])) - set(section.model_fields)
        typos += [(path, word) for word in words]
    missed = _missed(typos)
    assert len(typos) > 4000 and len(missed) <= 0.05 * len(typos), missed


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("optm", {"peak_lr": 1}, "optim.peak_lr"),
        ("optm", {"peak_lrr": 1}, "optim.peak_lr"),
        ("optm", {"peak_lr": 1, "eps": 1}, "optim"),
        ("modle", {"yarn": {"factor": 2}}, "model.yarn.factor"),
        ("lerts", {"violation": {"action": 1}}, "alerts.violation.action"),
        ("optim.numrics", {"warn": {"saturated": 1}}, "optim.numerics.warn.saturated"),
        ("optimnumerics", {"stop": {"nonfinite": 1}}, "optim.numerics.stop.nonfinite"),
        ("metricsheatmap-every", 1, "metrics.heatmap_every"),
        ("layoutcosts", 1, "layout.costs"),
        ("data.mixtur", {"web": {"weight": 2}}, "data.mixture.web.weight"),
        ("Layout", {"PP": 2}, "layout.pp"),
        ("optim.peak-lr", 1, "optim.peak_lr"),
        ("lr", 1, "optim.peak_lr"),
        ("optim.learning_rate", 1, "optim.peak_lr"),
        ("model.num_hidden_layers", 1, "model.num_layers"),
        ("n_routed_experts", 1, "model.num_experts"),
        ("max_steps", 1, "train.total_steps"),
        ("layout.tensor_parallel_size", 1, None),
    ],
)
def test_a_section_another_order_or_another_programs_name_leads_to_the_key(
    key: str, value: object, meant: str | None
) -> None:
    hint = suggest_key(tuple(key.split(".")), value)
    assert hint == f"; did you mean {meant}?" if meant else "did you mean" not in hint


def test_keys_that_are_as_likely_are_all_named() -> None:
    assert suggest_key(("layout", "p")) == "; did you mean layout.dp, layout.ep or layout.pp?"


def test_where_nothing_comes_near_the_keys_of_the_section_are_named() -> None:
    assert suggest_key(("recompute", "qqqq")) == "; keys of recompute: norm, swiglu, mla_up"


def test_names_of_other_programs_lead_to_keys_and_are_none_themselves() -> None:
    keys = {".".join(path) for path in key_paths()}
    assert set(OTHER_NAMES.values()) <= keys
    assert not set(OTHER_NAMES) & keys


def test_a_choice_far_from_the_word_is_none() -> None:
    assert closest("checkpoint", ["train", "plan"]) == []
    assert closest("trian", ["train", "plan"]) == ["train"]
