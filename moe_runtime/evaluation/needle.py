"""Needle retrieval: does a model find a value that a line far back gave to a key?

    ... text ...
    kvprqx = 'mwtcazlo'        the needle, planted at a depth: 0 at the start of the text, 1 at its end
    ... text ...
    kvprqx = '                 the question, at the end of a context of the given length

Key and value are letters drawn at random, so nothing but the needle tells the value. A model that is too
small for that may be taught an easier form (`FORMS`): the key always the same, the value one capital letter
repeated. Two scores:

    preferred   the model finds the true value likelier than each of several drawn alike that stand nowhere;
                chance is known, 1 / choices
    returned    greedy decoding behind the question writes the value, letter by letter; chance is nil

The first sees a weak memory, which a small model has, the second a working one. Both count for each length
and depth on its own, for a mean over depths hides that only near needles are found.

Distractors that stand in the text under other keys would ask for more: to tell one key from another, not
only a new line from one seen. Models of this size fail that at any length, which tells nothing of context.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_runtime.data.shards import TokenDataset
from moe_runtime.data.vocabulary import Tokenizer
from moe_runtime.errors import ConfigError
from moe_runtime.generate.engine import Engine
from moe_runtime.generate.request import Request
from moe_runtime.generate.sampling import SamplingParams
from moe_runtime.model.inference import InferenceModel

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CAPITALS = LETTERS.upper()
CLOSING = "'"  # ends a value: a value that another one begins with is told from it


@dataclass(frozen=True)
class NeedleForm:
    """What needles look like.

    Args:
        line: of the needle, with {key} and {value}.
        question: what comes last, with {key}; the value is to follow.
        key_letters, value_letters: how long they are, where drawn.
        choices: values to choose from, the true one among them.
        key: of every needle; None: drawn anew for each.
        one_letter: a value is one capital letter repeated, so that there are 26 of them.
    """

    line: str = "{key} = '{value}'\n"
    question: str = "\n{key} = '"
    key_letters: int = 6
    value_letters: int = 8
    choices: int = 10
    key: str | None = None
    one_letter: bool = False

    def draw_key(self, random: np.random.Generator) -> str:
        """The key of a needle."""
        return self.key if self.key is not None else _word(random, self.key_letters)

    def draw_values(self, random: np.random.Generator, count: int) -> list[str]:
        """Values of needles; those of one letter all differ, and are 26 at most."""
        if self.one_letter:
            letters = random.permutation(len(CAPITALS))[:count]
            return [CAPITALS[place] * self.value_letters for place in letters]
        return [_word(random, self.value_letters) for _ in range(count)]


FORMS = {"random": NeedleForm(), "taught": NeedleForm(key="needle", value_letters=4, one_letter=True)}


@dataclass(frozen=True)
class Trial:
    """One question.

    Args:
        prompt: text, needle and question.
        values: tokens of each value to choose from, closed; the true one first.
    """

    prompt: list[int]
    values: list[list[int]]


class Haystack:
    """Makes questions out of the text of a split.

    Args:
        dataset: where the text comes from.
        form: of the needles.
        seed: the same seed makes the same questions, whatever the model.
    """

    def __init__(self, dataset: TokenDataset, form: NeedleForm, seed: int = 0) -> None:
        self.dataset, self._form, self._seed = dataset, form, seed
        self._tokenizer: Tokenizer = dataset.load_tokenizer()
        self._line_ends = np.array([piece.endswith(b"\n") for piece in self._tokenizer.id_bytes])

    def trials(self, length: int, depth: float, count: int) -> list[Trial]:
        """Questions that are `length` tokens long with the value.

        Args:
            depth: 0 plants the needle at the start of the text, 1 at its end; at the nearest line start.

        Raises:
            ConfigError: no text fits beside needle and question.
        """
        random = np.random.default_rng([self._seed, length, round(depth * 1000)])
        return [self._trial(length, depth, random) for _ in range(count)]

    def _trial(self, length: int, depth: float, random: np.random.Generator) -> Trial:
        form = self._form
        key = form.draw_key(random)
        values = form.draw_values(random, form.choices)
        needle = self._encode(form.line.format(key=key, value=values[0]))
        question = self._encode(form.question.format(key=key))
        closed = [self._encode(value + CLOSING) for value in values]
        room = length - len(needle) - len(question) - len(closed[0])
        if room < 1:
            taken = f"above {length - room} tokens, which needle, question and value take"
            raise ConfigError(f"lengths: expected {taken}, got {length}")
        text = self.dataset.read(int(random.integers(self.dataset.num_tokens)), room)
        cut = self._line_start(text.tolist(), depth)
        return Trial([*text[:cut].tolist(), *needle, *text[cut:].tolist(), *question], closed)

    def _line_start(self, text: list[int], depth: float) -> int:
        """Where a line begins in `text` nearest to `depth`; its start and its end count as such."""
        ends = [0, *(1 + place for place, token in enumerate(text) if self._ends_line(token)), len(text)]
        return min(ends, key=lambda place: abs(place - depth * len(text)))

    def _ends_line(self, token: int) -> bool:
        return bool(self._line_ends[token])

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).tolist()


@dataclass(frozen=True)
class Found:
    """What became of each question of a length and depth.

    Args:
        preferred: the true value is the likeliest, one a question.
        returned: greedy decoding gave it.
    """

    preferred: list[bool]
    returned: list[bool]


def ask(model: InferenceModel, trials: Sequence[Trial], batch: int = 16) -> Found:
    """Put questions to a model, `batch` at a time."""
    preferred: list[bool] = []
    for first in range(0, len(trials), batch):
        scores = value_scores(model, trials[first : first + batch])
        preferred += [bool(row[0] > row[1:].max()) for row in scores]
    # Greedily, and the closing mark too: a longer word that begins like the value is not the value.
    requests = [
        Request(trial.prompt, len(trial.values[0]), SamplingParams(temperature=0.0)) for trial in trials
    ]
    engine, returned = Engine(model), []
    for first in range(0, len(trials), batch):
        some = engine.generate(requests[first : first + batch])
        pairs = zip(some, trials[first : first + batch], strict=True)
        returned += [one.tokens == trial.values[0] for one, trial in pairs]
    return Found(preferred, returned)


@torch.no_grad()
def value_scores(model: InferenceModel, trials: Sequence[Trial]) -> Tensor:
    """Log-likelihood of each value behind its prompt, in nats: float64 [trials, choices].

    A prompt is read once; its latents are then copied for each value.
    """
    prompts, counts = _padded([trial.prompt for trial in trials])
    values, lengths = _padded([value for trial in trials for value in trial.values])
    choices = len(trials[0].values)
    cache = model.new_cache(len(trials), int(counts.max()) + values.shape[1])
    hidden = model.read(cache, prompts.to(model.device), counts)
    last = hidden[(counts.cumsum(0) - 1).to(hidden.device)].repeat_interleave(choices, dim=0)
    cache.keep(torch.arange(len(trials)).repeat_interleave(choices))
    behind = model.read(cache, values.to(model.device), lengths)
    # A token of a value is told by what stands before it: the end of the prompt, then the value's own.
    pieces = behind.split(lengths.tolist())
    before = [torch.cat((end.unsqueeze(0), piece[:-1])) for end, piece in zip(last, pieces, strict=True)]
    logits = model.logits(torch.cat(before)).double().log_softmax(1).cpu()
    there = torch.arange(values.shape[1]) < lengths.unsqueeze(1)
    nats = logits.gather(1, values[there].unsqueeze(1)).squeeze(1)
    return torch.stack([one.sum() for one in nats.split(lengths.tolist())]).view(len(trials), choices)


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows side by side, zeros at their ends, int64 [rows, longest], and their lengths, int64 [rows]."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = torch.tensor(row)
    return padded, lengths


def _word(random: np.random.Generator, letters: int) -> str:
    return "".join(LETTERS[place] for place in random.integers(len(LETTERS), size=letters))
