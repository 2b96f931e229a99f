"""State on its way out of the optimizer and back in, past what DeepSpeed's checkpoints do to it.

DeepSpeed knows three doors. `state_dict` and `load_state_dict`, for checkpoints of the same number of
ranks. Universal checkpoints, for any other: files made from what `state_dict` gave, cut anew and written
straight into `state` as FP32 tensors, while the keys of saved parameter groups are written over those of
the groups at hand. And views: it keeps slices of what it finds under `exp_avg` to answer
`safe_get_full_optimizer_state`. Three things then go wrong that an optimizer can mend or at least see:

- stage 3 gives all partitions the step of the first group. So every group that leaves carries the steps of
  all groups (`STEPS`), and a partition that comes back looks up its own;
- stage 3 gives all groups the hyper-parameters of the first, weight decay included. Each group keeps those
  it was made with under a key that never leaves (`OWN`); groups made different that come back alike are
  refused, until `restore_hyperparameters` or the user says what they are;
- its views are of tensors that the next step encodes and drops, and would go on answering with old values:
  what is dropped is filled with NaN.

What belongs to this run and not to the checkpoint (`LOCAL`: storage, place in the flat group, number of the
group) does not leave either, so no file can change it.
"""

from typing import Any

import torch
from torch import Tensor

from moe_runtime.errors import CheckpointError
from moe_runtime.optim.moments import BLOCK, MEAN, SQUARE, STEP, Fp8Moments, MomentStorage, Noise, State

OWN, STEPS = "made_with", "steps_of_groups"
# The very object under STEPS whose load was looked into: another load brings another.
CHECKED = "checked_load"
LOCAL = ("moments", "offset", "group_id", OWN, CHECKED)
# Elements decoded or encoded at a time.
_WINDOW = 8192 * BLOCK
_HYPER = ("lr", "betas", "eps", "weight_decay")

Group = dict[str, Any]


def remember_own(group: Group) -> None:
    """Keep what a group was made with; called once, when it is added."""
    group[OWN] = {key: group[key] for key in _HYPER}


def exported_group(group: Group, steps: dict[int, list[float]]) -> Group:
    """What of a packed group may leave."""
    return {key: value for key, value in group.items() if key not in LOCAL} | {STEPS: steps}


def steps_of(groups: list[Group], state: Any) -> dict[int, list[float]]:
    """Steps done by every parameter that has state, by `group_id`."""
    return {
        int(group["group_id"]): [float(state[p][STEP]) for p in group["params"] if state.get(p)]
        for group in groups
    }


def check_hyperparameters(groups: list[Group]) -> None:
    """Refuse groups that were made different and came back from a checkpoint alike; once for each load.

    Raises:
        CheckpointError: says what was lost and how to set it.
    """
    if len(groups) < 2 or not all(STEPS in group and OWN in group for group in groups):
        return
    if all(group.get(CHECKED) is group[STEPS] for group in groups):
        return  # schedules may make them alike later
    for key in _HYPER:
        made, found = [group[OWN][key] for group in groups], [group[key] for group in groups]
        if any(value != made[0] for value in made) and all(value == found[0] for value in found):
            raise CheckpointError(
                f"optimizer state: DeepSpeed gave all groups the {key} of the first, {found[0]}, expected "
                f"{made} as they were made; call optimizer.restore_hyperparameters() after load_checkpoint"
            )
    for group in groups:
        group[CHECKED] = group[STEPS]


def restore_own(groups: list[Group]) -> None:
    """Every group's own hyper-parameters again; learning rates keep the progress of the first group's."""
    progress = groups[0]["lr"] / groups[0][OWN]["lr"] if groups and groups[0][OWN]["lr"] else 1.0
    for group in groups:
        group.update(group[OWN])
        group["lr"] = group["lr"] * progress
        group[CHECKED] = group.get(STEPS)


def own_step(group: Group, state: State) -> Tensor:
    """The step of a partition that came in from outside.

    Raises:
        CheckpointError: the partitions of its group had done different numbers of steps, and which of them
            this one is cannot be known.
    """
    steps = group.get(STEPS, {}).get(int(group["group_id"]), [])
    found = torch.as_tensor(state[STEP], dtype=torch.float32).clone().cpu()
    if not steps or (float(found) in steps and len(set(steps)) == 1):
        return found
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"optimizer state: partitions of group {group['group_id']} had done {sorted(set(steps))} steps, "
            "and a universal checkpoint keeps one number for all; save when all parameters have had "
            "gradients equally often, or resume on the number of ranks that saved"
        )
    return torch.tensor(steps[0])


def logical_state(param: Tensor, state: State) -> State:
    """`step`, m and v of one parameter in its own type and shape; an empty state stays empty."""
    if not state:
        return {}
    if MEAN in state:
        mean, square = state[MEAN], state[SQUARE]
    else:
        mean, square = (param.new_empty(param.numel()) for _ in range(2))
        for start in range(0, param.numel(), _WINDOW):
            stop = min(start + _WINDOW, param.numel())
            mean[start:stop], square[start:stop] = Fp8Moments().read(state, start, stop)
    return {STEP: state[STEP].clone()} | {
        name: value.to(param.dtype).view(param.shape) for name, value in ((MEAN, mean), (SQUARE, square))
    }


def store_anew(storage: MomentStorage, state: State, param: Tensor, noise: Noise, spoil: bool) -> None:
    """Replace logical tensors in `state` by those of `storage`.

    Args:
        spoil: fill the logical tensors with NaN afterwards, for DeepSpeed may keep views of them.

    Raises:
        CheckpointError: they are not there, or of another length.
    """
    mean, square = state.get(MEAN), state.get(SQUARE)
    fits = mean is not None and square is not None and mean.is_floating_point()
    if not fits or mean.numel() != param.numel() or square.numel() != param.numel():  # type: ignore[union-attr]
        found = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in state.items()}
        raise CheckpointError(
            f"optimizer state: expected exp_avg and exp_avg_sq of {param.numel()} values for "
            f"{storage.kind} moments, got {found}; was optim.moments changed?"
        )
    step = state[STEP]
    state.clear()
    state.update({STEP: step} | storage.blank(param))
    for start in range(0, param.numel(), _WINDOW):
        window = slice(start, start + _WINDOW)
        means, squares = (moment.reshape(-1)[window].to(param.dtype) for moment in (mean, square))  # type: ignore[union-attr]
        storage.write(state, start, means, squares, noise)
    if spoil:
        mean.fill_(torch.nan)  # type: ignore[union-attr]
        square.fill_(torch.nan)  # type: ignore[union-attr]
