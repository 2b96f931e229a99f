"""What changes in the course of a run, as pure functions of how far it is. Ref: DSV3 §4.2.

`step` and `tokens` are those finished before the step that the value is for: both 0 for the first.
So a resumed run needs nothing but the step number, and every layout computes the same. The batch
ramp, which tells how many tokens a step has, is in `moe_runtime.config.derive`.
"""

import math

from moe_runtime.config.schema import RecipeConfig


def lr_at(recipe: RecipeConfig, peak_lr: float, step: int, tokens: int) -> float:
    """Learning rate of the step after `step` steps and `tokens` tokens.

    Five segments: linear warm-up by steps (the last of `warmup_steps` runs at the peak), constant,
    half a cosine down to `min_lr_ratio`, constant, and `final_lr_ratio` to the end. Should warm-up
    reach into a later segment, the two factors multiply. Ref: DSV3 §4.2
    """
    warmup = min(1.0, (step + 1) / recipe.warmup_steps) if recipe.warmup_steps else 1.0
    return peak_lr * warmup * _decay_at(recipe, tokens)


def bias_gamma_at(recipe: RecipeConfig, tokens: int) -> float:
    """Step of the routing bias: `bias_gamma`, and 0 from `bias_until_tokens` on. Ref: DSV3 §4.2"""
    return recipe.bias_gamma if _is_before(tokens, recipe.bias_until_tokens) else 0.0


def mtp_lambda_at(recipe: RecipeConfig, tokens: int) -> float:
    """Weight of the MTP loss: `mtp_lambda`, then `mtp_lambda_final`. Ref: DSV3 §4.2"""
    return recipe.mtp_lambda if _is_before(tokens, recipe.mtp_switch_tokens) else recipe.mtp_lambda_final


def _decay_at(recipe: RecipeConfig, tokens: int) -> float:
    """Fraction of the peak that the token count leaves."""
    if _is_before(tokens, recipe.constant_until_tokens):
        return 1.0
    into_cosine = tokens - (recipe.constant_until_tokens or 0)
    if into_cosine < recipe.cosine_tokens:
        height = (1 + math.cos(math.pi * into_cosine / recipe.cosine_tokens)) / 2
        return recipe.min_lr_ratio + (1 - recipe.min_lr_ratio) * height
    if into_cosine < recipe.cosine_tokens + recipe.tail_tokens:
        return recipe.min_lr_ratio
    return recipe.final_lr_ratio


def _is_before(tokens: int, limit: int | None) -> bool:
    """True up to `limit`; None is a limit never reached."""
    return limit is None or tokens < limit
