"""`moe-runtime generate`: continue prompts from a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_runtime.cli.prefix_options import DEFAULT_CACHE_SIZE, CacheDir, CacheSize, bytes_of
from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from moe_runtime.cli.generation.open import Generator

DTYPES = ("fp32", "bf16")


Prompts = Annotated[list[str] | None, typer.Option(help="text to continue; repeatable")]
PromptFiles = Annotated[list[Path] | None, typer.Option(help="file whose text is a prompt; repeatable")]
PromptIds = Annotated[list[str] | None, typer.Option(help="prompt as token ids: 5,17,9; repeatable")]
Interactive = Annotated[bool, typer.Option("--interactive", help="read prompts, one a line")]
TopP = Annotated[float, typer.Option(help="draw from the likeliest tokens that hold this share")]
Seed = Annotated[
    int,
    typer.Option(min=0, max=2**62, help="same seed, same text; prompt i has seed + i"),
]
Stops = Annotated[list[str] | None, typer.Option(help="text that ends a continuation; repeatable")]
Speculate = Annotated[
    bool | None, typer.Option(help="draft with the MTP modules; by default where the model has some")
]
TokenizerName = Annotated[
    str | None, typer.Option(help="byte, deepseek or a tokenizer.json; otherwise the checkpoint's own")
]


def generate(
    path: Annotated[Path, typer.Argument(help="run folder (its last good checkpoint) or checkpoint folder")],
    prompt: Prompts = None,
    prompt_file: PromptFiles = None,
    prompt_ids: PromptIds = None,
    interactive: Interactive = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="at most so many new tokens")] = 200,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token")] = 0.8,
    top_k: Annotated[int, typer.Option(help="draw from so many likeliest tokens; 0: from all")] = 0,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    stop: Stops = None,
    speculate: Speculate = None,
    drafts: Annotated[int, typer.Option(min=1, max=16, help="tokens drafted a pass")] = 2,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = DEFAULT_CACHE_SIZE,
    tokenizer: TokenizerName = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16; otherwise as trained")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    ep: Annotated[int, typer.Option(min=1, help="processes that share the experts")] = 1,
    ema: Annotated[bool, typer.Option("--ema", help="the average of the weights over steps")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object at the end")] = False,
) -> None:
    """Continue prompts; text goes to the standard output as it comes, figures to the standard error."""
    _check(temperature, top_k, top_p, dtype)
    prompts = read_prompts(prompt or [], prompt_file or [], prompt_ids or [], interactive)
    if interactive and as_json:
        raise ConfigError("--interactive: expected no --json, for it prints as it goes; leave one of them")
    size = bytes_of(cache_size)
    # Imported here: torch takes seconds, and a wrong option should be told at once.
    from moe_runtime.cli.generation.answer import Answering, answer_all
    from moe_runtime.cli.generation.open import Opening, open_generator
    from moe_runtime.cli.generation.talk import talk
    from moe_runtime.generate.sampling import SamplingParams
    from moe_runtime.generate.stop import check_stops

    check_device(device)
    stops = tuple(stop or ())
    check_stops(stops)
    opening = Opening(
        path=path,
        device=device,
        dtype=dtype,
        ema=ema,
        tokenizer=tokenizer,
        speculate=speculate,
        drafts=drafts,
        cache_dir=cache_dir,
        cache_size=size,
        keeps_prompts=interactive,
        ep=ep,
    )
    params = SamplingParams(temperature, top_k, top_p, seed)
    with open_generator(opening) as generator:
        answering = Answering(max_tokens, params, stops)
        if interactive:
            talk(generator, answering)
        else:
            answer_all(generator, answering, _ids_of(generator, prompts), as_json)


def read_prompts(
    texts: list[str], files: list[Path], ids: list[str], interactive: bool
) -> list[str | list[int]]:
    """Prompts as text or as ids: texts first, then files, then ids.

    Raises:
        ConfigError: there is none, or one cannot be read.
    """
    prompts: list[str | list[int]] = [*texts, *map(_text_of, files), *map(_ids_from, ids)]
    if interactive and prompts:
        raise ConfigError("--interactive: expected no prompts as options, got some; leave one of them")
    if not prompts and not interactive:
        raise ConfigError("generate: expected --prompt, --prompt-file, --prompt-ids or --interactive")
    return prompts


def _text_of(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"--prompt-file {file}: expected a text file, got: {reason}") from None


def _ids_from(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise ConfigError(f"--prompt-ids: expected token ids such as 5,17,9, got {text!r}")
    return [int(word) for word in words]


def _ids_of(generator: "Generator", prompts: list[str | list[int]]) -> list[tuple[str, list[int]]]:
    return [(one, generator.encode(one)) if isinstance(one, str) else generator.told(one) for one in prompts]


def _check(temperature: float, top_k: int, top_p: float, dtype: str | None) -> None:
    if not 0.0 <= temperature < float("inf"):
        raise ConfigError(f"--temperature: expected 0 or more, got {temperature}")
    if top_k < 0:
        raise ConfigError(f"--top-k: expected 0 (all tokens) or more, got {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise ConfigError(f"--top-p: expected above 0 and at most 1, got {top_p}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype}")


def check_device(name: str) -> None:
    """Refuse a device that is not here.

    Raises:
        ConfigError: says what was expected.
    """
    import torch

    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device: expected cpu or cuda, got {name}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: expected a CUDA device, got none; use --device cpu")
