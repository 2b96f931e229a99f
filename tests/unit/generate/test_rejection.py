"""Rejection sampling keeps the target's distribution, whatever the draft; a wrong rule would not."""

import pytest
import torch
from torch import Tensor

from moe_runtime.generate.draws import Draws
from moe_runtime.generate.rejection import verify
from moe_runtime.generate.sampling import pick
from tests.unit.generate.goodness_of_fit import g_test_p_value

ROWS = 20_000
# Of some 60 tests of fit with fixed seeds, none may fall below; a wrong rule falls below 1e-6 by far.
LEAST_P = 1e-4


def numbers(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=generator)


def random_probs(generator: torch.Generator, *shape: int, zeros: float = 0.0) -> Tensor:
    probs = torch.softmax(1.5 * torch.randn(*shape, generator=generator), dim=-1)
    probs = probs * (torch.rand(*shape, generator=generator) >= zeros)
    probs[..., 0] += 1e-3
    return probs / probs.sum(dim=-1, keepdim=True)


def one_step(p: Tensor, q: Tensor, generator: torch.Generator, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """The first token of each row, and how many drafts stood."""
    draft = q.expand(rows, 1, -1)
    drafted = pick(draft[:, 0], numbers(generator, rows)).unsqueeze(1)
    accepted, token = verify(
        p.expand(rows, 2, -1), draft, drafted, numbers(generator, rows, 1), numbers(generator, rows)
    )
    return torch.where(accepted > 0, drafted[:, 0], token), accepted


CASES = {
    "any": lambda g: (random_probs(g, 12), random_probs(g, 12)),
    "zeros in both": lambda g: (random_probs(g, 12, zeros=0.5), random_probs(g, 12, zeros=0.5)),
    "disjoint": lambda g: (torch.tensor([0.3, 0.7, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.9, 0.1])),
    "one-hot draft": lambda g: (random_probs(g, 12), torch.eye(12)[3]),
    "one-hot target": lambda g: (torch.eye(12)[5], random_probs(g, 12)),
    "equal": lambda g: (random_probs(g, 12),) * 2,
    "nearly equal": lambda g: (
        torch.full((64,), 1 / 64),
        torch.softmax(1e-7 * torch.randn(64, generator=g), 0),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(6))
def test_the_first_token_is_distributed_as_the_target(case: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = CASES[case](generator)
    tokens, accepted = one_step(p, q, generator)
    counts = torch.bincount(tokens, minlength=len(p))
    assert g_test_p_value(counts, p.double() / p.double().sum()) > LEAST_P
    # Standard error of the rate: at most 0.5 / sqrt(rows) = 0.0035; 0.015 is four of them.
    assert abs(float(accepted.double().mean()) - float(torch.minimum(p, q).sum())) < 0.015


def test_equal_rows_always_stand_and_disjoint_ones_never() -> None:
    generator = torch.Generator().manual_seed(0)
    p = random_probs(generator, 30)
    assert bool((one_step(p, p, generator)[1] == 1).all())
    assert bool((one_step(*CASES["disjoint"](generator), generator)[1] == 0).all())


def test_one_hot_rows_are_greedy_decoding() -> None:
    generator = torch.Generator().manual_seed(1)
    best, drafted = (torch.randint(0, 3, (500, n), generator=generator) for n in (5, 4))
    eye = torch.eye(3)
    accepted, token = verify(
        eye[best], eye[drafted], drafted, numbers(generator, 500, 4), numbers(generator, 500)
    )
    for row in range(500):
        agreeing = 0
        while agreeing < 4 and drafted[row, agreeing] == best[row, agreeing]:
            agreeing += 1
        assert int(accepted[row]) == agreeing and token[row] == best[row, agreeing]


def test_no_drafts_draw_from_the_target() -> None:
    generator = torch.Generator().manual_seed(2)
    target, u = random_probs(generator, 7, 1, 5), numbers(generator, 7)
    nothing = torch.zeros(7, 0, 5), torch.zeros(7, 0, dtype=torch.int64), torch.zeros(7, 0).double()
    accepted, token = verify(target, *nothing, u)
    assert accepted.tolist() == [0] * 7 and torch.equal(token, pick(target[:, 0], u))


class Chain:
    """Speculation over three tokens of a Markov chain, numbers looked up by token as a decoder does."""

    TOKENS = 3

    def __init__(self, target: Tensor, draft: Tensor, depth: int, seed: int) -> None:
        self.target, self.draft, self.depth = target, draft, depth
        generator = torch.Generator().manual_seed(seed)
        length = self.TOKENS + depth + 1
        self.u = {name: numbers(generator, ROWS, length) for name in ("draft", "accept", "pick")}

    def run(self, accept_all: bool = False) -> Tensor:
        """int64 [rows, 3], all sequences after token 0."""
        tokens = torch.zeros(ROWS, 1 + self.TOKENS + self.depth + 1, dtype=torch.int64)
        length = torch.zeros(ROWS, dtype=torch.int64)
        rows = torch.arange(ROWS)
        while int(length.min()) < self.TOKENS:
            start = length.clamp(max=self.TOKENS)  # rows that are done make their last token again, unread
            last = tokens[rows, start]
            drafted, drafts, place = [], [], start.unsqueeze(1) + torch.arange(self.depth + 1)
            for depth in range(self.depth):
                drafts.append(self.draft[last])
                last = pick(drafts[-1], self.u["draft"][rows, start + depth])
                drafted.append(last)
            chosen = torch.stack(drafted, dim=1)
            before = torch.cat([tokens[rows, start].unsqueeze(1), chosen], dim=1)
            accept_u = self.u["accept"].gather(1, place[:, :-1]) * (not accept_all)
            target = self.target[before]
            accepted, token = verify(
                target, torch.stack(drafts, 1), chosen, accept_u, self.u["pick"].gather(1, place)
            )
            new = torch.cat([chosen, token.unsqueeze(1)], dim=1).scatter(
                1, accepted.unsqueeze(1), token.unsqueeze(1)
            )
            is_open = (length < self.TOKENS).unsqueeze(1)
            written = is_open & (torch.arange(self.depth + 1) <= accepted.unsqueeze(1))
            slots = place + 1
            tokens.scatter_(1, slots, torch.where(written, new, tokens.gather(1, slots)))
            length = torch.where(is_open.squeeze(1), length + accepted + 1, length)
        return tokens[:, 1 : 1 + self.TOKENS]

    def p_value(self, tokens: Tensor) -> float:
        """Of the joint counts of three tokens against the target chain."""
        p = self.target.double()
        joint = p[0][:, None, None] * p[:, :, None] * p[None]
        size = p.shape[0]
        cells = (tokens[:, 0] * size + tokens[:, 1]) * size + tokens[:, 2]
        return g_test_p_value(torch.bincount(cells, minlength=size**3), joint.flatten() / joint.sum())


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("zeros", [0.0, 0.4])
def test_three_tokens_from_a_wrong_draft_have_the_joint_distribution_of_the_target(
    depth: int, zeros: float
) -> None:
    generator = torch.Generator().manual_seed(depth)
    target, draft = (random_probs(generator, 4, 4, zeros=zeros) for _ in range(2))
    chain = Chain(target, draft, depth, seed=depth)
    assert chain.p_value(chain.run()) > LEAST_P


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_accepting_every_draft_is_found_out(depth: int) -> None:
    generator = torch.Generator().manual_seed(depth)
    target, draft = (random_probs(generator, 4, 4) for _ in range(2))
    chain = Chain(target, draft, depth, seed=depth)
    assert chain.p_value(chain.run(accept_all=True)) < 1e-6


def test_a_row_comes_out_the_same_alone_and_in_a_batch() -> None:
    generator = torch.Generator().manual_seed(4)
    target, draft = random_probs(generator, 6, 4, 50), random_probs(generator, 6, 3, 50)
    drafted = pick(draft.flatten(0, 1), numbers(generator, 18)).view(6, 3)
    index = torch.arange(6).unsqueeze(1) * 10 + torch.arange(4)

    def verdict(rows: list[int]) -> tuple[Tensor, Tensor]:
        draws, places = Draws(rows), index[rows]
        accept_u, pick_u = draws.at("accept", places[:, :-1]), draws.at("pick", places)
        return verify(target[rows], draft[rows], drafted[rows], accept_u, pick_u)

    together = verdict(list(range(6)))
    for rows in ([3], [5, 0], [2, 4, 1]):
        for part, whole in zip(verdict(rows), together, strict=True):
            assert torch.equal(part, whole[rows])
