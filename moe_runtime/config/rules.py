"""Rules between sections, in one place. Rules within a section are that section's own `findings`."""

from collections.abc import Callable, Mapping
from typing import Any

from moe_runtime.config.finding import Finding
from moe_runtime.config.fit import layout_findings
from moe_runtime.config.fp8 import Fp8Config
from moe_runtime.config.schema import BatchConfig, ModelConfig, RecomputeConfig, RunConfig, TrainConfig


def cross_findings(parts: Mapping[str, Any]) -> list[Finding]:
    """Everything that is wrong between the parts of a run.

    Args:
        parts: the validated values of `RunConfig`, by key; those that did not validate are left out,
            and the rules that need them wait, so that one pass over a bad file tells all it can.
    """
    return [
        finding
        for needed, rule in _RULES
        if all(name in parts for name in needed)
        for finding in rule(*(parts[name] for name in needed))
    ]


def parts_of(config: RunConfig) -> dict[str, Any]:
    """The parts of a whole run, for `cross_findings`."""
    return {name: getattr(config, name) for name in RunConfig.model_fields}


def _training_ends(train: TrainConfig) -> list[Finding]:
    if train.total_steps is not None or train.total_tokens is not None:
        return []
    return [Finding("train.total_steps", "set total_steps or total_tokens, else training would never end")]


def _fp64_stays_on_cpu(precision: str, device: str) -> list[Finding]:
    if precision != "fp64" or device != "cuda":
        return []
    return [Finding("device", "precision fp64 is for proofs on the CPU; set device cpu, or precision bf16")]


def _fp8_is_on(precision: str, fp8: Fp8Config) -> list[Finding]:
    """A key of `fp8` that nothing reads would be a wish not heard."""
    if precision == "fp8":
        return []
    set_keys = [key for key in Fp8Config.model_fields if getattr(fp8, key) != getattr(Fp8Config(), key)]
    text = f"has no effect under precision {precision}; set precision fp8, or leave it out"
    return [Finding(f"fp8.{key}", text) for key in set_keys]


def _fp8_layers_exist(model: ModelConfig, fp8: Fp8Config) -> list[Finding]:
    return fp8.unknown_layers(model.num_layers, model.mtp_depth)


def _context_fits(model: ModelConfig, batch: BatchConfig) -> list[Finding]:
    if model.yarn is None:
        return []
    longest = int(model.yarn.factor * model.yarn.original_seq_len)
    if batch.seq_len <= longest:
        return []
    wanted = f"at most factor x original_seq_len = {longest} of model.yarn"
    return [Finding.expected("batch.seq_len", wanted, batch.seq_len)]


def _mha_is_plain(model: ModelConfig, recompute: RecomputeConfig, precision: str) -> list[Finding]:
    """What rests on latents, or was made for them alone, is for MLA."""
    if model.attention != "mha":
        return []
    found = []
    if recompute.mla_up:
        text = "model.attention mha has no latents to make queries, keys and values from; set it false"
        found.append(Finding("recompute.mla_up", text))
    if precision == "fp8":
        found.append(Finding("precision", "fp8 is for model.attention mla, got mha; set bf16"))
    return found


_RULES: tuple[tuple[tuple[str, ...], Callable[..., list[Finding]]], ...] = (
    (("train",), _training_ends),
    (("precision", "device"), _fp64_stays_on_cpu),
    (("precision", "fp8"), _fp8_is_on),
    (("model", "fp8"), _fp8_layers_exist),
    (("model", "batch"), _context_fits),
    (("model", "recompute", "precision"), _mha_is_plain),
    (("model", "layout", "batch"), layout_findings),
)
