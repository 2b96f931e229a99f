"""The parts of `bench generate`, each measured if asked for."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from moe_runtime.cli.bench_generate.acceptance import acceptance
from moe_runtime.cli.bench_generate.against import Shapes, compare
from moe_runtime.cli.bench_generate.cache_size import cache_size
from moe_runtime.cli.bench_generate.prefix import prefix_speed
from moe_runtime.cli.bench_generate.repetition import repeating_share
from moe_runtime.cli.bench_generate.speed import cache_speed, draft_speed
from moe_runtime.cli.bench_generate.subject import Settings, Subject
from moe_runtime.cli.bench_generate.teacher_forced import teacher_forced
from moe_runtime.errors import ConfigError


def measure(settings: Settings, parts: Sequence[str], shapes: Shapes | None = None) -> dict[str, Any]:
    """Measure some parts of PARTS, and decode speed against another checkpoint if one is given.

    Returns:
        what was measured, by part, and under `subject` on what; the other checkpoint under `against`.

    Raises:
        ConfigError: no such part, or one that needs MTP modules of a model without.
    """
    for part in parts:
        if part not in PARTS:
            raise ConfigError(f"bench generate: expected --part of {', '.join(PARTS)}, got {part!r}")
    subject = Subject(settings)
    if not subject.drafts and {"drafts", "acceptance"} & set(parts):
        raise ConfigError("bench generate: expected a model with MTP modules for drafts, got mtp_depth 0")
    result: dict[str, Any] = {"subject": _describe(subject)}
    for part in parts:
        result[part] = PARTS[part](subject)
    if shapes is not None:
        result["against"] = compare(subject, shapes)
    return result


def _acceptance(subject: Subject) -> dict[str, Any]:
    settings = subject.settings
    rows = subject.rows(settings.prompts, settings.prompt_tokens + settings.tokens)
    return {
        "teacher_forced": teacher_forced(subject.model, rows),
        "sampled": acceptance(subject, temperature=1.0),
        "greedy": acceptance(subject, temperature=0.0),
        "repeating_in_the_text": repeating_share(rows[:, settings.prompt_tokens :].tolist()),
    }


def _describe(subject: Subject) -> dict[str, Any]:
    config, settings = subject.transformer.config, asdict(subject.settings)
    return {
        **{name: str(value) if name in ("path", "data") else value for name, value in settings.items()},
        "drafts": subject.drafts,
        "run": subject.name,
        "step": subject.step,
        "trained_context": subject.trained_context,
        "parameters": sum(parameter.numel() for parameter in subject.transformer.parameters()),
        "layers": config.num_layers,
        "attention": config.attention,
        "mtp_depth": config.mtp_depth,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


PARTS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "cache": cache_speed,
    "drafts": draft_speed,
    "acceptance": _acceptance,
    "size": cache_size,
    "prefix": prefix_speed,
}
