"""Needles: where they are planted, what is scored, and that the cache scores as a whole forward does."""

import pytest
import torch

from moe_runtime.data.prepare import prepare
from moe_runtime.data.shards import TokenDataset
from moe_runtime.data.task import Request
from moe_runtime.errors import ConfigError
from moe_runtime.evaluation.needle import FORMS, Haystack, NeedleForm, Trial, ask, value_scores
from moe_runtime.generate.decode_reference import generate
from moe_runtime.model.inference import InferenceModel
from moe_runtime.model.transformer import Transformer
from tests.unit.model.samples import F64, draw_tokens, small_config, small_model

FORM = NeedleForm()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    folder = tmp_path_factory.mktemp("needle")
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"document {number}\n" + "def fox(x):\n    return x\n" * 20)
    prepare(Request(f"dir:{folder}", "byte", 0, 0.0, 0.3), folder / "data")
    return TokenDataset.open(folder / "data", "validation")


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_a_needle_stands_once_on_a_line_of_its_own_at_its_depth(text: TokenDataset, depth: float) -> None:
    for trial in Haystack(text, FORM).trials(200, depth, 8):
        prompt = bytes(token for token in trial.prompt if token < 256).decode()
        value = bytes(trial.values[0]).decode()
        assert len(trial.prompt) + len(trial.values[0]) == 200
        assert prompt.count(value) == 1
        key = prompt.rpartition("\n")[2]
        before, _, after = prompt.partition(f"{key}{value}\n")
        assert before == "" or before.endswith("\n") or len(before) >= 150 or depth == 1.0
        share = len(before) / (len(before) + len(after) - len(key) - 1)
        assert abs(share - depth) <= 0.1  # to the nearest line start, and lines here are 24 of 200 long


def test_values_are_alike_and_only_the_true_one_is_in_the_prompt(text: TokenDataset) -> None:
    (trial,) = Haystack(text, FORM).trials(120, 0.5, 1)
    prompt = bytes(token for token in trial.prompt if token < 256)
    assert len({tuple(value) for value in trial.values}) == FORM.choices == len(trial.values)
    assert [bytes(value) in prompt for value in trial.values] == [True] + [False] * (FORM.choices - 1)


def test_taught_needles_have_one_key_and_values_of_one_letter_that_differ(text: TokenDataset) -> None:
    form = FORMS["taught"]
    for trial in Haystack(text, form).trials(120, 0.5, 20):
        prompt = bytes(token for token in trial.prompt if token < 256).decode()
        values = [bytes(value).decode() for value in trial.values]
        assert f"needle = '{values[0]}\n" in prompt and prompt.endswith("\nneedle = '")
        assert prompt.count("needle") == 2
        assert all(value == f"{value[0] * 4}'" and value[0].isupper() for value in values)
        assert len(set(values)) == form.choices


def test_the_same_seed_makes_the_same_questions_and_another_one_others(text: TokenDataset) -> None:
    first, again = (Haystack(text, FORM, 1).trials(120, 0.5, 3) for _ in range(2))
    assert first == again
    assert Haystack(text, FORM, 2).trials(120, 0.5, 3) != first


def test_a_length_without_room_for_text_is_refused(text: TokenDataset) -> None:
    with pytest.raises(ConfigError, match="above 40"):
        Haystack(text, FORM).trials(40, 0.5, 1)


@torch.no_grad()
def test_scores_and_greedy_answers_are_those_of_whole_forwards() -> None:
    config = small_config(yarn={"factor": 4.0, "original_seq_len": 16})
    model = small_model(config, dtype=F64)
    trials = _ragged_trials(model)
    scores = value_scores(InferenceModel(model), trials)
    for trial, row in zip(trials, scores, strict=True):
        for value, score in zip(trial.values, row, strict=True):
            assert score.item() == pytest.approx(_likelihood(model, trial.prompt, value), rel=1e-10)
    found = ask(InferenceModel(model), trials, batch=2)
    assert found.preferred == [int(row.argmax()) == 0 for row in scores]
    answers = [generate(model, trial.prompt, len(trial.values[0])) for trial in trials]
    assert found.returned == [one == trial.values[0] for one, trial in zip(answers, trials, strict=True)]
    assert found.returned == [False, False, True]


def _ragged_trials(model: Transformer) -> list[Trial]:
    """Prompts and values of unlike lengths; the true value of the last is what the model says by itself."""
    prompts = [draw_tokens(model.config, 1, length, seed=length)[0].tolist() for length in (40, 23, 31)]
    values = [
        [draw_tokens(model.config, 1, 3 + one, seed=9 * number + one)[0].tolist() for one in range(3)]
        for number in range(3)
    ]
    values[2][0] = generate(model, prompts[2], 4)
    return [Trial(prompt, some) for prompt, some in zip(prompts, values, strict=True)]


def _likelihood(model: Transformer, prompt: list[int], value: list[int]) -> float:
    whole = torch.tensor([prompt + value])
    logs = model(whole[:, :-1]).log_softmax(2).gather(2, whole[:, 1:, None])
    return float(logs[0, len(prompt) - 1 :].sum())
