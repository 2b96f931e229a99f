"""What strikes where: the one door between the fault injector and a running step."""

from moe_runtime.train.fault import Fault
from moe_runtime.train.guard.poison import poison
from moe_runtime.train.guard.upset import upset_bias, upset_casts, upset_tokens
from moe_runtime.train.step import TrainStep


def spoil(step: TrainStep, fault: Fault) -> None:
    """Let a fault with a target strike this rank's part of a run."""
    if fault.target == "bias":
        upset_bias(fault, step.runtime, step.integrity)
    elif fault.target == "casts":
        upset_casts(step.runtime)
    elif fault.target == "tokens":
        upset_tokens(step.loader, step.runtime.config.model.vocab_size, fault.step)
    else:
        poison(step.runtime, step.optimizer, fault.kind, fault.target)
