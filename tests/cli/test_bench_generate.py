"""`bench generate`: its measures against answers that are known, and the whole of it on a small model."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moe_runtime.checkpoint.folder import TOKENIZER_FILE
from moe_runtime.checkpoint.store import CheckpointStore, Contribution, Saved, SaveMeta
from moe_runtime.checkpoint.weights import weights_to_save
from moe_runtime.cli.app import app
from moe_runtime.cli.bench_generate.acceptance import shuffled_control
from moe_runtime.cli.bench_generate.against import Shapes, contender
from moe_runtime.cli.bench_generate.cache_size import cache_size
from moe_runtime.cli.bench_generate.chance import chance_of
from moe_runtime.cli.bench_generate.measure import measure
from moe_runtime.cli.bench_generate.repetition import period_of_end, repeating_share
from moe_runtime.cli.bench_generate.speed import cache_speed, leading_equal
from moe_runtime.cli.bench_generate.subject import Settings, Subject
from moe_runtime.cli.bench_generate.teacher_forced import teacher_forced
from moe_runtime.cli.bench_generate.turns import in_turn
from moe_runtime.config.schema import RunConfig
from moe_runtime.data.prepare import prepare
from moe_runtime.data.task import Request
from moe_runtime.data.vocabulary import ByteTokenizer
from moe_runtime.errors import ConfigError
from moe_runtime.generate.decode_reference import generate
from moe_runtime.generate.engine import Engine
from moe_runtime.model.latent_cache import LatentCache
from moe_runtime.model.transformer import Transformer
from moe_runtime.parallel.peers import Peers
from tests.unit.checkpoint.models import CONFIG

MODEL = CONFIG.model.model_dump() | {"vocab_size": 264, "mtp_depth": 2, "init_std": 0.2}
RUN = RunConfig.model_validate(CONFIG.model_dump() | {"model": MODEL})

MHA = {"attention": "mha"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of random models with two MTP modules, one without latents, and prepared data."""
    folder = tmp_path_factory.mktemp("bench_generate")
    (folder / "texts").mkdir()
    for number in range(20):
        words = "".join(f"line {n * number % 17} of document {number}\n" for n in range(30))
        (folder / "texts" / f"{number}.txt").write_text(words)
    prepare(Request(f"dir:{folder / 'texts'}", "byte", 0, 0.0, 0.3), folder / "data")
    save_run(RUN, folder / "run")
    save_run(RunConfig.model_validate(RUN.model_dump() | {"model": MODEL | MHA}), folder / "mha")
    return folder


def save_run(config: RunConfig, folder: Path) -> None:
    model = Transformer(config.model)
    model.init_weights(1)
    meta = SaveMeta(tokens=16, config=config.model_dump(mode="json"), layout={"pp": 1, "dp": 1})
    extras = {TOKENIZER_FILE: ByteTokenizer().to_json().encode()}
    weights = weights_to_save(model.state_dict(), 0, Peers())
    store = CheckpointStore(folder, Peers(), 2)
    assert isinstance(store.save(1, Contribution(weights, extras=extras), meta), Saved)


@pytest.fixture
def subject(made: Path) -> Subject:
    return Subject(Settings(made / "run", made / "data", prompts=8, prompt_tokens=8, tokens=40, threads=1))


@pytest.mark.parametrize(
    ("tokens", "period"),
    [
        ([7] * 100, 1),
        ([*range(90), *[1, 2, 3] * 30], 3),
        ([*[1, 2, 3] * 30, 4], None),  # it has left the loop
        (list(range(40)) * 3, 40),
        (list(range(40)) * 2, None),  # twice is a repeated line, not a loop
        ([7] * 63, None),
        (list(range(70)) * 4, None),  # longer than what is looked for
        ([], None),
    ],
)
def test_the_end_repeats_with_its_smallest_period(tokens: list[int], period: int | None) -> None:
    assert period_of_end(tokens) == period


def test_the_share_of_repeating_continuations() -> None:
    assert repeating_share([[1] * 99, list(range(99)), [1, 2] * 50, [3]]) == 0.5
    assert math.isnan(repeating_share([]))


def test_random_tokens_do_not_repeat() -> None:
    tokens = torch.randint(2, (300, 256), generator=torch.Generator().manual_seed(0)).tolist()
    assert repeating_share(tokens) == 0


def test_chance_is_the_rate_and_spread_of_independent_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    drafts = torch.randint(5, (400,), generator=generator).square()
    outputs = torch.randint(4, (300,), generator=generator).square()
    chance = chance_of(drafts.tolist(), outputs.tolist())
    draws = drafts[torch.randint(400, (4000, 300), generator=generator)]
    rates = (draws == outputs).double().mean(dim=1)
    # 4,000 repetitions: the mean is good to 0.016 standard errors, the spread to 1.1%; four times that.
    assert abs(chance.deviation(float(rates.mean()))) < 0.07
    assert float(rates.std()) == pytest.approx(chance.standard_error, rel=0.05)


def test_chance_of_drafts_that_never_or_always_agree() -> None:
    assert (chance_of([1], [2, 3]).rate, chance_of([1], [1, 1]).rate) == (0, 1)
    assert chance_of([1], [1]).deviation(1.0) == 0 and chance_of([1], [1]).deviation(0.5) == -math.inf


def test_contenders_take_turns_and_are_compared_within_a_round() -> None:
    now, order = 0.0, []

    def contender(name: str, seconds: list[float]):  # type: ignore[no-untyped-def]
        def work(turn: int) -> int:
            nonlocal now
            order.append(name)
            now += seconds[turn]
            return 12

        return work

    # Both are twice as slow in the second round and four times in the third.
    contenders = {"base": contender("base", [2, 4, 8]), "fast": contender("fast", [1, 2, 4])}
    found = in_turn(contenders, "base", 3, clock=lambda: now)
    assert found["base"] | {"ratio": None} == {
        "tokens_per_s": 3,
        "tokens_per_s_range": [1.5, 6],
        "ratio": None,
        "ratio_range": [1, 1],
    }
    assert (found["fast"]["ratio"], found["fast"]["ratio_range"]) == (2, [2, 2])
    assert order == ["base", "fast", *("base", "fast"), *("fast", "base"), *("base", "fast")]


def test_leading_equal_tokens_are_counted() -> None:
    assert leading_equal([1, 2, 3], [1, 2, 4]) == 2
    assert leading_equal([1, 2], [1, 2, 3]) == 2


def test_teacher_forced_acceptance_is_that_of_the_training_forward(subject: Subject) -> None:
    rows, model, drafts = subject.rows(6, 30), subject.transformer, []
    for mtp in model.mtp.values():
        mtp.norm.register_forward_hook(
            lambda _, __, output: drafts.append(model.head(output).softmax(dim=-1))
        )
    with torch.no_grad():
        main = model(rows).softmax(dim=-1)  # at position i: of token i + 1
        model.losses(rows)  # depth k at position i: of token i + 2 + k
    found, places = teacher_forced(subject.model, rows), 30 - 1 - 2
    both = [(draft, main[:, 1 + depth :][:, :places]) for depth, draft in enumerate(drafts)]
    greedy = torch.stack([(q.argmax(-1) == p.argmax(-1)).double() for q, p in both])
    sampled = torch.stack([torch.minimum(q, p).sum(-1).double() for q, p in both])
    text = torch.stack(
        [(q.argmax(-1) == rows[:, 2 + d :][:, :places]).double() for d, (q, _) in enumerate(both)]
    )
    assert found["positions"] == 6 * places
    for name, stands in (("greedy", greedy), ("sampled", sampled), ("label", text)):
        # Probabilities of two ways of computing differ by 1e-6; no argmax of these rows is as close.
        assert found[name] == pytest.approx(stands.cumprod(0).mean(dim=(1, 2)).tolist(), abs=1e-5), name


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_shuffled_drafts_stand_as_often_as_chance_says(subject: Subject, temperature: float) -> None:
    requests = subject.requests(40, temperature)
    outputs = [token for one in Engine(subject.model).generate(requests) for token in one.tokens]
    control = shuffled_control(subject, requests, outputs)
    assert control["trials"] > 200 and control["chance"] > 0
    assert abs(control["deviation"]) < 3


def test_the_whole_is_measured_and_told(made: Path) -> None:
    options = ["--rounds", 1, "--prompts", 3, "--prompt-tokens", 8, "--tokens", 24, "--threads", 1]
    parts = [word for part in ("drafts", "acceptance", "size") for word in ("--part", part)]
    arguments = ["bench", "generate", made / "run", "--data", made / "data", *options, *parts]
    call = [str(argument) for argument in arguments]
    found = json.loads(CliRunner().invoke(app, [*call, "--json"], catch_exceptions=False).output)
    assert list(found["drafts"]["results"]) == ["0 drafts", "1 drafts", "2 drafts"]
    for way in ("sampled", "greedy"):
        one = found["acceptance"][way]
        assert one["tokens"] == 3 * 24 and len(one["rate"]) == 2 and 1 <= one["tokens_per_pass"] <= 3
    assert found["size"]["ours"] == found["size"]["formula"]
    text = CliRunner().invoke(app, call, catch_exceptions=False).output
    assert "2 drafts" in text and "shuffled drafts" in text and "cache, bytes a token and layer" in text


def test_the_cache_agrees_with_its_peers(made: Path) -> None:
    settings = Settings(made / "run", made / "data", rounds=1, prompt_tokens=8, threads=1)
    found = cache_speed(Subject(settings), tokens=12)
    assert found["agreeing"] == {"no cache": 12, "transformers, cached": 12}
    assert all(one["tokens_per_s"] > 0 for one in found["results"].values())


def test_multi_head_attention_is_measured_without_transformers(made: Path) -> None:
    subject = Subject(Settings(made / "mha", made / "data", rounds=1, prompt_tokens=8, threads=1))
    assert cache_speed(subject, tokens=12)["agreeing"] == {"no cache": 12}
    config = subject.transformer.config
    heads = config.num_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    assert cache_size(subject) == {"ours": 4 * heads, "formula": 4 * heads}


def test_two_checkpoints_decode_in_turn(made: Path) -> None:
    options = ["--rounds", 1, "--tokens", 2, "--threads", 1, "--context", 9, "--batch", 1, "--batch", 3]
    arguments = [made / "run", "--data", made / "data", "--against", made / "mha", *options]
    call = ["bench", "generate", *(str(argument) for argument in arguments)]
    found = json.loads(CliRunner().invoke(app, [*call, "--json"], catch_exceptions=False).output)
    assert set(found) == {"subject", "against"}
    this, other = (found["against"]["checkpoints"][name] for name in ("this", "against"))
    assert [one["attention"] for one in (this, other)] == ["mla", "mha"]
    # 3 layers and 2 MTP modules: latent and rotary key, or values and keys of two heads.
    assert (this["cache_bytes_per_token"], other["cache_bytes_per_token"]) == (4 * 5 * 12, 4 * 5 * 2 * 12)
    shapes = found["against"]["shapes"]
    assert [(shape["context"], shape["batch"]) for shape in shapes] == [(9, 1), (9, 3)]
    assert all(one["tokens_per_s"] > 0 for shape in shapes for one in shape["results"].values())
    text = CliRunner().invoke(app, call, catch_exceptions=False).output
    assert "mha, 0.0" in text and "cache 480 bytes a token" in text


def test_decoding_is_timed_anew_after_the_same_context(subject: Subject) -> None:
    context, seen = subject.rows(3, 10), []
    decode = contender(subject.model, context, tokens=4)
    read = subject.model.read

    def watched(cache: LatentCache, ids: torch.Tensor) -> torch.Tensor:
        seen.append((cache.lengths.tolist(), ids.tolist()))
        return read(cache, ids)

    subject.model.read = watched  # type: ignore[method-assign, assignment]
    assert decode(0) == decode(1) == 12
    assert seen[:4] == seen[4:] and [lengths for lengths, _ in seen[:4]] == [[n] * 3 for n in range(10, 14)]
    wanted = generate(subject.transformer, context[1].tolist(), 4)
    assert [ids[1][0] for _, ids in seen[:4]] == wanted


def test_what_cannot_be_measured_is_refused_in_one_line(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(made / "run", made / "data", threads=1)
    with pytest.raises(ConfigError, match=r"expected --part of cache, drafts, .*, got 'speed'$"):
        measure(settings, ["speed"])
    with pytest.raises(ConfigError, match=r"^--batch: expected at most the \d+ rows of 64 held-out"):
        measure(settings, [], Shapes(made / "mha", contexts=[64], batches=[10_000]))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"^bench: compares with transformers, which is not installed; pip"):
        measure(settings, ["size"])
