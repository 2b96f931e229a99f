"""AdamW for the flat partitions that DeepSpeed ZeRO hands to its client optimizer. Ref: DSV3 §4.2.

Under ZeRO the optimizer never sees the model: each parameter group arrives as one 1-D FP32 tensor of
any even length that cuts through parameters anywhere. DeepSpeed rebinds `param_groups` and calls
`step` once per group, reads and writes `state` behind our back (its universal checkpoints put FP32
tensors there), may share one `step` tensor between parameters, and sends what `state_dict` gives
through a cast to the parameter's type. Hence:

- nothing is kept outside `state` and the groups: no counters, nothing keyed by id;
- `step` is a tensor of each parameter and is replaced, never changed in place;
- `state_dict` gives logical values (m, v, step) in the parameter's type, whatever the storage;
  state in that form is stored anew at the top of the next step, wherever it came from (`exchange.py`);
- `native_state` and `load_native_state` carry the stored bits, for checkpoints that resume bitwise.

The noise of stochastic rounding depends on (seed, step, group_id, offset + element): a group says with
`offset` where in the whole flat group its partition begins, and so an element is rounded alike
wherever it lives. Blocks of FP8 scales do begin at the partition's start: other boundaries cost one
more rounding.

The arithmetic is that of `update.py`, by whichever implementation `step_path.py` finds, all to the same
bits; FP32 moments are left to torch's own fused kernel.

Non-finite gradients are the caller's to find (the global norm shows them): it skips the step. If it
does not, FP32 and BF16 behave as torch does; in FP8 the element's state becomes NaN, and the rest of
its block of 128 loses its moments, for the scale was taken from something infinite.
"""

from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from moe_runtime.errors import CheckpointError, ConfigError
from moe_runtime.optim.counter_rng import derive_key
from moe_runtime.optim.eager_step import eager_step, torch_step
from moe_runtime.optim.exchange import (
    LOCAL,
    STEPS,
    check_hyperparameters,
    exported_group,
    logical_state,
    own_step,
    remember_own,
    restore_own,
    steps_of,
    store_anew,
)
from moe_runtime.optim.moments import (
    STEP,
    MomentStorage,
    Noise,
    State,
    moment_storage,
)
from moe_runtime.optim.statistics import StepStatistics, blank_counters, read_counters
from moe_runtime.optim.step_path import checked_path, fused_step_for
from moe_runtime.optim.update import factors_of

STREAM_STEP, STREAM_LOAD = 0, 1
# group_id, counters, elements, 1 - beta1^t: one step of one parameter.
_Counted = tuple[int, Tensor, int, float]


class AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay and a choice of moment storage.

    Args:
        params: contiguous FP32 (or FP64) tensors of any shape, or group dicts; others must have been
            replaced by FP32 masters before the first step, as ZeRO does. A group may set any keyword
            below, and `group_id` (default: its position) and `offset` (default 0), see above; several
            parameters of a group count as laid out one after the other from `offset`.
        lr: a float; schedulers write floats into the groups.
        betas: decay of m and of v.
        eps: added to sqrt(v), bias-corrected.
        weight_decay: parameters shrink by lr x weight_decay each step.
        moments: `fp32`, `bf16` or `fp8`.
        seed: of the rounding noise.
        step_path: `auto`, `eager` or `compiled`; see step_path.py.

    Attributes:
        collect_statistics: set it, and steps with FP8 moments count what `take_statistics` gives. Off at
            first, for counting takes time (on a GPU some per cent). Only what is not taken is kept.

    Raises:
        ConfigError: a value out of range; at a step, a parameter of another type.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        moments: str = "fp32",
        seed: int = 0,
        step_path: str = "auto",
    ) -> None:
        self.collect_statistics = False
        self._step_path = checked_path(step_path)
        self._counted: list[_Counted] = []
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "moments": moments,
            "seed": seed,
            "offset": 0,
        }
        self._all_groups: list[dict[str, Any]] = []
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After a copy, and after torch has loaded a state_dict: the groups are other dicts then."""
        super().__setstate__(state)
        self._all_groups = list(self.param_groups)
        for name, value in (("collect_statistics", False), ("_step_path", "auto"), ("_counted", [])):
            self.__dict__.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check a group and add it; called by the constructor too."""
        param_group.setdefault("group_id", len(self.param_groups))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_group(group)
        remember_own(group)
        self._all_groups.append(group)  # the dicts themselves: DeepSpeed shows one of them at a time

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; those without keep their state untouched."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._settle_all()
        for group in self.param_groups:
            offset = int(group["offset"])
            for param in group["params"]:
                if param.grad is not None:
                    self._step_one(param, group, offset)
                offset += param.numel()
        return loss

    def take_statistics(self) -> dict[int, StepStatistics]:
        """By group_id, what steps counted since the last call, which forgets it; waits for the device."""
        taken: dict[int, StepStatistics] = {}
        for group_id, counters, elements, mean_correction in self._counted:
            found = read_counters(counters, elements, mean_correction)
            taken[group_id] = taken.get(group_id, StepStatistics()) + found
        self._counted.clear()
        return taken

    def state_dict(self) -> dict[str, Any]:
        """torch's form, with logical `exp_avg` and `exp_avg_sq` in the parameter's type and shape."""
        packed = super().state_dict()
        names = [name for group in packed["param_groups"] for name in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        owners = dict(zip(names, params, strict=True))
        packed["state"] = {
            name: logical_state(owners[name], state) for name, state in packed["state"].items()
        }
        steps = steps_of(self.param_groups, self.state)
        packed["param_groups"] = [exported_group(group, steps) for group in packed["param_groups"]]
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take logical state, also that of torch.optim.AdamW, and store it in this optimizer's form.

        What describes this run's layout and storage (`moments`, `offset`, `group_id`) stays as it was
        constructed; hyper-parameters and `seed` are those loaded.
        """
        before = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, before, strict=True):
            group.update({key: own[key] for key in LOCAL if key in own})
            group.setdefault("seed", own["seed"])
            group.pop(STEPS, None)
        self._settle_all(spoil=False)  # these tensors may still be the caller's

    def restore_hyperparameters(self) -> None:
        """Give every group the lr, betas, eps and weight decay back that it was made with.

        For ZeRO stage 3 after a universal checkpoint, which gives all groups those of the first. Learning
        rates keep the progress of their schedule: the first group's loaded rate over its own.
        """
        restore_own(self.param_groups)

    def logical_state(self, param: Tensor) -> State:
        """`step`, `exp_avg` and `exp_avg_sq` as numbers in the parameter's type and shape, copies.

        Args:
            param: as in `param_groups`; under ZeRO a flat partition. Empty before its first step.
        """
        return {key: value.clone() for key, value in logical_state(param, self.state.get(param, {})).items()}

    def native_state(self, param: Tensor) -> State:
        """The state of `param` as stored: `step` and the tensors of its storage, not copies.

        Empty before the first step. Restoring it in the same layout resumes bit for bit.
        """
        return dict(self.state[param]) if self.state.get(param) else {}

    def load_native_state(self, param: Tensor, native: State) -> None:
        """Copy what `native_state` gave into the state of `param`.

        Raises:
            CheckpointError: it is of another moment storage or another length.
        """
        if not native:
            self.state.pop(param, None)
            return
        storage = moment_storage(self._group_of(param)["moments"])
        expected = storage.blank(param.detach())
        if {STEP, *expected} != set(native) or not storage.holds(native, param):
            found = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in native.items()}
            raise CheckpointError(
                f"optimizer state: expected {storage.kind} moments of {param.numel()} elements, got {found}; "
                "resume with the same optim.moments and layout, or load logical state"
            )
        self.state[param] = {STEP: native[STEP].detach().clone().cpu()} | {
            name: native[name].detach().clone().to(param.device) for name in expected
        }

    @torch.no_grad()
    def load_moments(self, param: Tensor, step: int, windows: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Store moments that come as numbers, in this optimizer's own form.

        Args:
            param: as in `param_groups`; under ZeRO a flat partition.
            step: steps done.
            windows: (m, v) of consecutive elements of the flattened parameter, FP32; of each window but the
                last the length is a multiple of 128.

        Raises:
            CheckpointError: they are not as many as the parameter has elements.
        """
        group = self._group_of(param)
        storage = moment_storage(group["moments"])
        state = {STEP: torch.tensor(float(step))} | storage.blank(param.detach())
        key = derive_key(group["seed"], step, group["group_id"], STREAM_LOAD)
        noise, start = Noise(key, self._offset_of(param, group)), 0
        for mean, square in windows:
            storage.write(state, start, mean.to(param.device), square.to(param.device), noise)
            start += mean.numel()
        if start != param.numel():
            raise CheckpointError(
                f"optimizer state: expected moments of {param.numel()} elements, got {start}"
            )
        self.state[param] = state

    def _offset_of(self, param: Tensor, group: dict[str, Any]) -> int:
        """Place of a parameter's first element in the whole flat group."""
        before = takewhile(lambda other: other is not param, group["params"])
        return int(group["offset"]) + sum(other.numel() for other in before)

    def _group_of(self, param: Tensor) -> dict[str, Any]:
        for group in self._all_groups:
            if any(param is own for own in group["params"]):
                return group
        raise CheckpointError("optimizer state: this parameter is in no group of the optimizer")

    def _settle_all(self, spoil: bool = True) -> None:
        """Store anew what came in from outside, in all groups at once.

        Not group by group: after the first group's step DeepSpeed takes views of whatever then lies under
        `exp_avg` in the state of the others.
        """
        check_hyperparameters(self.param_groups)
        for group in self._all_groups:
            storage, offset = moment_storage(group["moments"]), int(group["offset"])
            for param in group["params"]:
                state = self.state.get(param)
                if state and not storage.holds(state, param):
                    state[STEP] = own_step(group, state)
                    key = derive_key(group["seed"], int(state[STEP]), group["group_id"], STREAM_LOAD)
                    store_anew(storage, state, param, Noise(key, offset), spoil)
                offset += param.numel()

    def _settle(self, param: Tensor, group: dict[str, Any]) -> tuple[MomentStorage, State]:
        """Make the state of `param` exist."""
        storage = moment_storage(group["moments"])
        state = self.state[param]
        if not state:
            state[STEP] = torch.tensor(0.0)
            state.update(storage.blank(param))
        return storage, state

    def _step_one(self, param: Tensor, group: dict[str, Any], offset: int) -> None:
        _check_master(param)
        storage, state = self._settle(param, group)
        # A new tensor, for DeepSpeed may have given one to many parameters; on the CPU, to be read at once.
        state[STEP] = torch.as_tensor(state[STEP], dtype=torch.float32, device="cpu") + 1
        step = int(state[STEP])
        noise = Noise(derive_key(group["seed"], step, group["group_id"], STREAM_STEP), offset)
        values, grads = param.view(-1), param.grad.reshape(-1).contiguous()  # type: ignore[union-attr]
        if storage.is_direct:
            torch_step(values, grads, state, group, step)
            return
        factors = factors_of(group, step)
        counters = None
        if self.collect_statistics and storage.kind == "fp8":
            counters = blank_counters(param.device)
            counted = (group["group_id"], counters, param.numel(), factors.mean_correction)
            self._counted.append(counted)
        fused = fused_step_for(self._step_path, storage, param)
        if fused is None:
            eager_step(values, grads, storage, state, factors, noise, counters)
        else:
            fused(values, grads, state, factors, noise, counters=counters)


def _check_group(group: dict[str, Any]) -> None:
    moment_storage(group["moments"])
    numbers = [group[key] for key in ("lr", "eps", "weight_decay")]
    if len(group["betas"]) != 2 or not all(isinstance(x, float | int | Tensor) for x in numbers):
        raise ConfigError(
            "optim: expected numbers for lr, eps and weight_decay and two betas, "
            f"got {numbers} and {group['betas']}"
        )
    beta1, beta2 = group["betas"]
    if not (group["lr"] >= 0 and group["eps"] >= 0 and group["weight_decay"] >= 0):
        found = {key: group[key] for key in ("lr", "eps", "weight_decay")}
        raise ConfigError(f"optim: expected lr, eps and weight_decay of at least 0, got {found}")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ConfigError(f"optim.betas: expected two numbers in [0, 1), got {(beta1, beta2)}")


def _check_master(param: Tensor) -> None:
    """At the step, not before: DeepSpeed makes a client over the model's weights, then gives it masters."""
    if param.dtype not in (torch.float32, torch.float64) or not param.is_contiguous():
        raise ConfigError(
            f"optim: expected contiguous float32 or float64 master weights, got {param.dtype} "
            f"{list(param.shape)}; give the optimizer the FP32 masters, not the working copy"
        )
