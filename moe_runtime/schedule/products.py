"""What actions make, need and carry: the edges of a program's dependency graph.

Two kinds of tensor tie stages together: the activation that a stage puts out, and the gradient of the
input that it took in. Both are named by the stage that *makes* them, so the sender's and the
receiver's word for the same message (`2SA5` and `3RA5`) come down to one value.
"""

from typing import NamedTuple

from moe_runtime.schedule.action import Action, Entry, Kind, Program, actions_of


class Product(NamedTuple):
    """A tensor that one stage makes and its neighbour needs.

    Args:
        is_gradient: gradient of the stage's input, needed by stage - 1; else the stage's activation,
            needed by stage + 1.
        stage: the stage that makes it.
    """

    is_gradient: bool
    stage: int
    microbatch: int
    direction: int

    def __str__(self) -> str:
        what = "gradient" if self.is_gradient else "activation"
        prime = "'" * self.direction
        return f"the {what} of stage {self.stage}, microbatch {self.microbatch}{prime}"


def made_by(action: Action) -> Product | None:
    """What a computation makes for a neighbour stage; None for W and for transfers."""
    if action.kind is Kind.FORWARD:
        return Product(False, action.stage, action.microbatch, action.direction)
    if action.kind in (Kind.BACKWARD, Kind.INPUT_GRAD):
        return Product(True, action.stage, action.microbatch, action.direction)
    return None


def needed_by(action: Action, num_stages: int) -> Product | None:
    """What a computation needs from a neighbour stage; None at the ends, for W and for transfers."""
    if action.kind is Kind.FORWARD and action.stage > 0:
        return Product(False, action.stage - 1, action.microbatch, action.direction)
    if action.kind in (Kind.BACKWARD, Kind.INPUT_GRAD) and action.stage < num_stages - 1:
        return Product(True, action.stage + 1, action.microbatch, action.direction)
    return None


def carried_by(transfer: Action) -> Product:
    """The tensor that a send or a receive moves."""
    maker = {Kind.RECV_ACT: -1, Kind.RECV_GRAD: 1}.get(transfer.kind, 0)
    is_gradient = transfer.kind in (Kind.SEND_GRAD, Kind.RECV_GRAD)
    return Product(is_gradient, transfer.stage + maker, transfer.microbatch, transfer.direction)


def holder_of(program: Program, product: Product) -> int:
    """The pipeline rank that makes a product."""
    return program.placement[product.direction][product.stage]


def user_of(program: Program, product: Product) -> int | None:
    """The pipeline rank of the neighbour stage that needs a product; None past either end."""
    stage = product.stage + (-1 if product.is_gradient else 1)
    return program.placement[product.direction][stage] if 0 <= stage < program.num_stages else None


def remote_needs(program: Program, rank: int, entry: Entry) -> tuple[Product, ...]:
    """What an entry of `rank` needs from stages on other ranks, the forward's need first."""
    needs = (needed_by(action, program.num_stages) for action in actions_of(entry))
    return tuple(need for need in needs if need is not None and holder_of(program, need) != rank)
