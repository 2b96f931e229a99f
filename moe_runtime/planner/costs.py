"""What the actions of a program cost: the numbers that a simulation, a search and a drawing start from.

One unit throughout, seconds or any other. A stage has a cost of its own for each kind of action, the
computation and the expert exchange (dispatch and combine) apart, because an overlapped pair hides the
one under the other:

    F alone      forward + forward_comm                  the exchange is waited for
    B alone      input_grad + weight_grad + backward_comm
    I, W         input_grad + backward_comm, weight_grad
    F&B          the computation of both, plus what of their exchanges no computation hides

To compare schedules that cut the model differently, start from the cost of the whole model and
`split` it: a schedule with twice the stages has stages of half the cost, and of half the memory.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_runtime.schedule.action import Action, Entry, Kind, Overlap


@dataclass(frozen=True, slots=True)
class StageCosts:
    """What one microbatch costs in one stage.

    Args:
        forward, input_grad, weight_grad: computation of F, I and W; a B computes I and W.
        forward_comm, backward_comm: expert exchange of an F, and of a B or I.
        live: memory of one live microbatch, in units of a stage that is one P-th of the model.
    """

    forward: float
    input_grad: float
    weight_grad: float
    forward_comm: float = 0.0
    backward_comm: float = 0.0
    live: float = 1.0


@dataclass(frozen=True, slots=True)
class Costs:
    """The costs of every stage of a program.

    Args:
        stages: one for each stage, in order.
        transfer: time that a boundary tensor takes from rank to rank.
        hidden: of the exchange that an overlapped pair could hide, the share that it does, 0 to 1.
        pairs: known time of the pair (stage of F, stage of B), instead of the rule.
        pair_compute: of those, what is computation, where it is not that of both actions alone.
        alone: known time of an action by itself, (kind, stage), whose own computation hides exchange.
    """

    stages: tuple[StageCosts, ...]
    transfer: float = 0.0
    hidden: float = 1.0
    pairs: Mapping[tuple[int, int], float] = field(default_factory=dict)
    pair_compute: Mapping[tuple[int, int], float] = field(default_factory=dict)
    alone: Mapping[tuple[Kind, int], float] = field(default_factory=dict)

    @classmethod
    def split(
        cls,
        model: StageCosts,
        num_ranks: int,
        num_stages: int,
        transfer: float = 0.0,
        hidden: float = 1.0,
    ) -> "Costs":
        """A model cut into equal stages.

        Args:
            model: costs of one P-th of the model, P being `num_ranks`; its `live` is 1.
            num_stages: of the schedule, a multiple of num_ranks or num_ranks itself.
        """
        share = num_ranks / num_stages
        stage = StageCosts(
            model.forward * share,
            model.input_grad * share,
            model.weight_grad * share,
            model.forward_comm * share,
            model.backward_comm * share,
            model.live * share,
        )
        return cls((stage,) * num_stages, transfer, hidden)

    def compute(self, entry: Entry) -> float:
        """Time that an entry computes; transfers none."""
        if isinstance(entry, Overlap):
            known = self.pair_compute.get((entry.forward.stage, entry.backward.stage))
            return self.compute(entry.forward) + self.compute(entry.backward) if known is None else known
        stage = self.stages[entry.stage]
        match entry.kind:
            case Kind.FORWARD:
                return stage.forward
            case Kind.BACKWARD:
                return stage.input_grad + stage.weight_grad
            case Kind.INPUT_GRAD:
                return stage.input_grad
            case Kind.WEIGHT_GRAD:
                return stage.weight_grad
        return 0.0

    def comm(self, entry: Entry) -> float:
        """Time that the expert exchanges of an entry fly."""
        if isinstance(entry, Overlap):
            return self.comm(entry.forward) + self.comm(entry.backward)
        if entry.kind is Kind.FORWARD:
            return self.stages[entry.stage].forward_comm
        if entry.kind in (Kind.BACKWARD, Kind.INPUT_GRAD):
            return self.stages[entry.stage].backward_comm
        return 0.0

    def duration(self, entry: Entry) -> float:
        """Time from an entry's start to its end when nothing from outside holds it up."""
        compute, comm = self.compute(entry), self.comm(entry)
        if not isinstance(entry, Overlap):
            return self.alone.get((entry.kind, entry.stage), compute + comm)
        measured = self.pairs.get((entry.forward.stage, entry.backward.stage), math.nan)
        if not math.isnan(measured):
            return measured
        return compute + comm - self.hidden * min(compute, comm)

    def live(self, action: Action) -> float:
        """Memory that a microbatch holds in the action's stage from its F to the end of its B or W."""
        return self.stages[action.stage].live
