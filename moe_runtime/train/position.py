"""What a manifest says for people: layout, the schedules' values at the next step, what randomness hangs on.

Nothing of it is needed to resume. Schedules follow from config and position, and no random number depends on
earlier ones of another step: each use hashes the seed with what it is used for.
"""

from moe_runtime.config.layout import ResolvedLayout
from moe_runtime.config.schema import RunConfig
from moe_runtime.optim.schedule import bias_gamma_at, lr_at, mtp_lambda_at

_COUNTED_BY = {
    "data_order": "epoch and position",
    "initial_weights": "name of the parameter",
    "rounding_of_moments": "step, parameter group and element",
    "samples": "token; each sample begins anew",
}


def layout_facts(layout: ResolvedLayout) -> dict[str, int | str]:
    """How ranks share the model."""
    return {
        "pp": layout.pp,
        "dp": layout.dp,
        "ep": layout.ep,
        "world_size": layout.world_size,
        "schedule": layout.schedule,
    }


def schedules_at(config: RunConfig, step: int, tokens: int) -> dict[str, float]:
    """Values with which the step after `step` steps and `tokens` tokens runs."""
    return {
        "lr": lr_at(config.recipe, config.optim.peak_lr, step, tokens),
        "bias_gamma": bias_gamma_at(config.recipe, tokens),
        "mtp_lambda": mtp_lambda_at(config.recipe, tokens),
    }


def rng_facts(config: RunConfig) -> dict[str, int | str]:
    """The seed, and beside each use of randomness what it is counted by."""
    return {"seed": config.seed, **_COUNTED_BY}
