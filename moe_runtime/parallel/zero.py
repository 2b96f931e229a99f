"""From accumulated gradients to updated weights: DeepSpeed ZeRO stages 1 and 2 behind a small door.

    schedule -> param.grad_accum -> reduce -> owners' flat FP32 partitions -> norm, clip
             -> the client optimizer on each owner's FP32 master slice -> weights to everyone

Our executor runs all backward passes itself, out of order, two stages at once, with weight gradients
deferred. So DeepSpeed's optimizer is built directly. The usual door, `deepspeed.initialize`, was
rejected: it wants to run forward and backward, for BF16 weights with FP32 accumulation it silently
takes another optimizer that all-reduces whole gradients, it recognises experts only in its own MoE
layer, it broadcasts the model on its own, and its settings travel through a JSON file with defaults
that change results (clipping at 1.0). What users of DeepSpeed lose is its engine and its checkpoint
format (pickles; ours are safetensors); `deepspeed.utils.safe_get_full_fp32_param` keeps working.

What is averaged over what. Each microbatch's loss is divided by the number of microbatches that this
row runs in its direction. Dense gradients are then averaged over all ranks that hold the stage, the
mirrored row of a bidirectional schedule included. An expert sees the tokens of its whole
expert-parallel group, so its gradients are summed over the ranks that hold it and divided by the
size of that same large group, not of the small one: both are then gradients of one mean over tokens.

Two norms. Clipping needs the true global norm: each distinct parameter once, over pipeline rows,
mirrored rows and experts. A wrong group or flag makes it silently wrong, so it is computed twice, by
DeepSpeed from its lists of parameters and here from the partitions, and the two must agree.
"""

import importlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from moe_runtime.errors import CheckpointError, ConfigError, NumericsError
from moe_runtime.optim.classes import CLASSES
from moe_runtime.parallel.by_class import UpdateSample, add_squares, runs_of
from moe_runtime.parallel.nonfinite import Culprit, GradientPart, find_culprits
from moe_runtime.parallel.zero_groups import check_replicas, complete_groups, make_client, owners_of
from moe_runtime.parallel.zero_partition import Partition, lay_out

# Both norms are sums of the same squares; DeepSpeed rounds them to FP32 a few times on the way.
_NORM_TOLERANCE = 1e-5
# DeepSpeed adds up squares in FP32: beyond this they overflow, and the gradient is not usable.
_LARGEST_SQUARE_SUM = 1e38
# Elements from which a message to each owner is quicker than one all-reduce of twice the bytes:
# measured on gloo, 4 ranks: 30% slower at 2^16, 25% quicker at 2^20.
_OWNER_MESSAGE = 2**18


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Args:
        grad_norm: global norm before clipping; may be inf or NaN when skipped.
        clipped: gradients were scaled down.
        skipped: gradients were not finite, or the caller wanted no update; nothing was changed, on no rank.
        culprits: where this rank's gradients are not finite; empty on a rank that is not to blame.
        grad_norms: the same norm of each class of parameters that the model has.
        updates: rms(update) / rms(weights from before) of each class, from a sample; None if not asked for,
            or nothing was changed.
        sampling_s: host time that this sample took, without the reduction.
    """

    grad_norm: float
    clipped: bool
    skipped: bool
    culprits: tuple[Culprit, ...] = ()
    grad_norms: dict[str, float] = field(default_factory=dict)
    updates: dict[str, float] | None = None
    sampling_s: float = 0.0


class ZeroOptimizer:
    """Owns gradient accumulators, FP32 masters and the client optimizer of this rank.

    A step is: backward passes add to `param.grad_accum`; `end_microbatch()` after each; `step(lr)`.
    At stage 1 every parameter always has a zeroed accumulator. At stage 2 there are none between
    microbatches: whoever adds makes one when it is missing, and an absent one counts as zero.

    Args:
        named_params: this rank's parameters in ascending order of stage id, the same order on every
            rank that holds them; frozen ones are left alone. A second copy of a parameter has
            `ds_pipe_replicated = True`.
        groups: parameter groups with `params`, hyper-parameters and a `name`; a group holds experts
            (`param.is_expert`) only, or none. Empty ones are left out.
        make_optimizer: builds the client optimizer from the groups; it will see one flat FP32 tensor
            per group, and one `step()` per group. Groups carry `offset`, where that tensor begins in
            the whole flat group, and `group_id`, the group's place in `groups`.
        dp_group: ranks that average dense gradients (both mirrored rows).
        expert_dp_group: ranks that hold the same experts; None without experts.
        ep_group: the expert-parallel group; None without experts.
        norm_group: ranks that together hold every distinct stage once.
        stage: 1 partitions optimizer states, 2 also gradients.
        grad_clip: largest global gradient norm; 0 turns clipping off.
        bucket_elements: gradients put together before they travel; bounds the memory of a reduction.
        weights_written: called when the model's weights have changed: what was made of them is stale.

    Raises:
        ConfigError: stage 2 over several pipeline ranks, or a rank without parameters.
        NumericsError: replicas hold other weights, or another order of parameters, than this rank.
    """

    def __init__(
        self,
        named_params: Sequence[tuple[str, Parameter]],
        *,
        groups: Sequence[dict[str, Any]],
        make_optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        dp_group: dist.ProcessGroup,
        norm_group: dist.ProcessGroup,
        expert_dp_group: dist.ProcessGroup | None = None,
        ep_group: dist.ProcessGroup | None = None,
        stage: Literal[1, 2] = 1,
        grad_clip: float = 0.0,
        bucket_elements: int = 2**24,
        weights_written: Callable[[], None] = lambda: None,
    ) -> None:
        self._named = [(name, param) for name, param in named_params if param.requires_grad]
        if not self._named:
            raise ConfigError("layout.layers_per_stage: a pipeline rank holds no parameter; give it a layer")
        if stage == 2 and dist.get_world_size(norm_group) > 1:
            raise ConfigError("layout.zero_stage: 2 needs layout.pp 1; use zero_stage 1 with a pipeline")
        self._weights_written = weights_written
        names = {param: name for name, param in self._named}
        self._groups = complete_groups(groups, names)
        self._accum_dtype = torch.promote_types(self._named[0][1].dtype, torch.float32)
        # FP64 models exist to be compared, not trained: reduced and normed, but never partitioned.
        self._partitions_grads = stage == 2 and self._accum_dtype == torch.float32
        self._dp_group, self._norm_group, self._grad_clip = dp_group, norm_group, grad_clip
        self._members = [list(group["params"]) for group in self._groups]
        self._owners = [owners_of(group, dp_group, expert_dp_group) for group in self._groups]
        for group, params, owners in zip(self._groups, self._members, self._owners, strict=True):
            check_replicas(group["name"], params, names, owners)
        self.client = make_client(make_optimizer, self._groups)
        largest = max(sum(p.numel() for p in params) for params in self._members)
        bucket = min(bucket_elements, largest)
        self._engine = _load_engine().ZeroEngine(
            self.client,
            names,
            dp_group=dp_group,
            expert_groups={g["name"]: (ep_group, expert_dp_group) for g in self._groups if g["moe"]},
            norm_group=norm_group,
            stage=2 if self._partitions_grads else 1,
            grad_clip=grad_clip,
            accum_dtype=self._accum_dtype,
            bucket_elements=bucket,
            to_owners=_all_agree(
                min(bucket, largest // dist.get_world_size(dp_group)) >= _OWNER_MESSAGE,
                norm_group,
                self._named[0][1].device,
            ),
        )
        self._partitions = [self._describe(i, lay_out(ps, names)) for i, ps in enumerate(self._members)]
        for own, partition in zip(self.client.param_groups, self._partitions, strict=True):
            own["offset"] = partition.start  # stochastic rounding counts elements of the whole flat group
        self._tell_classes_apart()
        self._released: set[int] = set()
        self._grad_norm: float | None = None
        self._grad_norms: dict[str, float] = {}
        self._flat_accums: list[Tensor] = []
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget all gradients. At stage 1 every parameter has a zeroed accumulator afterwards."""
        self._engine.drop_gradients()
        self._released.clear()
        self._grad_norm = None
        if self._partitions_grads:
            return
        if not self._flat_accums:
            self._flat_accums = [
                torch.empty(sum(p.numel() for p in ps), dtype=self._accum_dtype, device=ps[0].device)
                for ps in self._members
            ]
        for params, flat in zip(self._members, self._flat_accums, strict=True):
            parts = flat.zero_().split([p.numel() for p in params])
            for param, part in zip(params, parts, strict=True):
                param.grad_accum = part.view(param.shape)  # type: ignore[attr-defined]

    def release(self, params: Iterable[Parameter]) -> None:
        """Stage 2: these gradients are complete for this microbatch; reduce them and free the memory.

        Optional, to hold one block's gradients at a time instead of the whole model's. All ranks of
        the data-parallel group must release the same parameters in the same order.
        """
        if not self._partitions_grads:
            return
        params = list(params)
        for param in params:
            if getattr(param, "grad_accum", None) is None:  # idle here, busy on another rank
                param.grad_accum = torch.zeros_like(param, dtype=self._accum_dtype)  # type: ignore[attr-defined]
            self._engine.feed((param,))
        self._released.update(map(id, params))

    def end_microbatch(self) -> None:
        """Stage 2: add this microbatch to the owners' partitions, keep nothing else. Stage 1: nothing."""
        if not self._partitions_grads:
            return
        self.release(p for params in self._members for p in params if id(p) not in self._released)
        self._engine.flush()
        self._released.clear()

    def reduce(self) -> float:
        """Average the gradients over data-parallel ranks and give their global norm, before clipping.

        `step` calls it; calling it before is allowed. In FP64 for FP64 models.
        """
        if self._grad_norm is None:
            if self._partitions_grads:
                waiting = [name for name, p in self._named if p.grad_accum is not None]  # type: ignore[attr-defined]
                assert not waiting, f"end_microbatch was not called after a gradient of {waiting[0]}"
            else:
                for params in self._members:
                    self._engine.feed(params)
                self._engine.flush()
            self._grad_norm = math.sqrt(sum(squares := self._square_sums()))
            self._grad_norms = self._by_class(map(math.sqrt, squares))
        return self._grad_norm

    def step(self, lr: float, apply: bool = True, measures_updates: bool = False) -> StepResult:
        """Reduce, clip by the global norm, step the client optimizer, gather the updated weights.

        Gradients that are not finite are dropped and nothing is changed; all ranks decide alike.

        Args:
            lr: learning rate.
            apply: False drops the gradients all the same.
            measures_updates: the result says how far weights moved; alike on every rank.

        Raises:
            ConfigError: the model is FP64, for which there are no masters.
            NumericsError: DeepSpeed's norm and ours disagree.
        """
        if self._accum_dtype != torch.float32:
            raise ConfigError("precision: fp64 models can be compared but not stepped; use bf16 or fp32")
        norm = self.reduce()
        is_usable = norm * norm < _LARGEST_SQUARE_SUM  # not when NaN
        culprits = () if is_usable else tuple(find_culprits(self.gradients()))
        updates, norms, sampling_s = None, self._grad_norms, 0.0
        if is_usable and apply:
            sample = UpdateSample(self._partitions, self._copies) if measures_updates else None
            self._engine.norm_check = lambda theirs: _compare_norms(norm, theirs)
            self._engine.set_lr(lr)
            self._engine.step()
            self._weights_written()
            if sample is not None:
                updates, sampling_s = self._update_sizes(sample), sample.seconds
        self.zero_grad()
        skipped = not (is_usable and apply)
        clipped = not skipped and 0.0 < self._grad_clip < norm + 1e-6
        return StepResult(norm, clipped, skipped, culprits, norms, updates, sampling_s)

    def gradients(self) -> Iterator[GradientPart]:
        """This rank's gradients by parameter, until the step ends.

        At stage 1 they are its own, also after `reduce`. At stage 2 they are what it owns of the sums over
        ranks, complete after the last `end_microbatch`: who brought what can no longer be told.
        """
        if not self._partitions_grads:
            names = {id(param): name for name, param in self._named}
            for params, flat in zip(self._members, self._flat_accums, strict=True):
                parts = flat.split([param.numel() for param in params])
                for param, part in zip(params, parts, strict=True):
                    yield GradientPart(names[id(param)], 0, part)
            return
        for idx, partition in enumerate(self._partitions):
            flat = self._engine.reduced(idx)
            for piece in partition.pieces():
                yield GradientPart(piece.name, piece.begin, flat.narrow(0, piece.local, piece.numel))

    def partitions(self) -> list[Partition]:
        """What this rank owns, one entry per group; masters are live tensors."""
        return list(self._partitions)

    def spoil(self) -> None:
        """This rank's gradients are worth nothing: let the norm tell all ranks, which then drop theirs."""
        flat = self._engine.reduced(0) if self._partitions_grads else self._flat_accums[0]
        flat[:1] = math.nan

    def flat_weights(self) -> list[Tensor]:
        """The model's weights as flat groups, padding included, live; one for each partition, in order."""
        return list(self._engine.bit16_groups_flat)

    def load_partition(self, group: str, master: Tensor, native: Any) -> None:
        """Restore one group bit for bit; call `refresh_weights` when all are restored.

        Args:
            group: the partition's name.
            master: FP32 [end - start], as `Partition.master` was.
            native: what the client's `native_state(param)` gave; None leaves its state as it is.

        Raises:
            CheckpointError: no such group, or another size or dtype.
        """
        found = next((part for part in self._partitions if part.group == group), None)
        if found is None:
            known = [part.group for part in self._partitions]
            raise CheckpointError(f"optimizer state: group {group!r} is unknown, this rank has {known}")
        own = found.master
        if master.shape != own.shape or master.dtype != own.dtype:
            got, want = f"{list(master.shape)} {master.dtype}", f"{list(own.shape)} {own.dtype}"
            raise CheckpointError(f"optimizer state: {group} has {got}, expected {want}; same layout?")
        with torch.no_grad():
            own.copy_(master)
        if native is not None:
            self.client.load_native_state(own, native)  # type: ignore[attr-defined]

    def refresh_weights(self) -> None:
        """Write all masters, rounded, into the model's weights on every rank; a collective call."""
        self._engine.update_lp_params()
        self._weights_written()

    def _square_sums(self) -> list[float]:
        """Squares of every distinct parameter of the model, summed by class, the same on all ranks."""
        sums = torch.zeros(len(CLASSES), dtype=torch.float64, device=self._named[0][1].device)
        for idx, runs in enumerate(self._runs):
            add_squares(sums, self._engine.reduced(idx), runs)
        return self._summed(sums).tolist()  # type: ignore[no-any-return]

    def _update_sizes(self, sample: UpdateSample) -> dict[str, float]:
        moved, weights = self._summed(sample.sums(self._named[0][1].device)).tolist()
        pairs = zip(moved, weights, strict=True)
        return self._by_class(math.sqrt(square / whole) if whole else 0.0 for square, whole in pairs)

    def _tell_classes_apart(self) -> None:
        """Where in the partitions parameters of each class lie, and of which ones some rank holds any."""
        # Another pipeline rank counts its copy of these.
        self._copies = frozenset(n for n, p in self._named if getattr(p, "ds_pipe_replicated", False))
        self._runs = [runs_of(partition, self._copies) for partition in self._partitions]
        held = torch.zeros(len(CLASSES), dtype=torch.float64, device=self._named[0][1].device)
        held[[run.row for runs in self._runs for run in runs]] = 1.0
        self._classes = frozenset(
            name for name, ranks in zip(CLASSES, self._summed(held).tolist(), strict=True) if ranks
        )

    def _by_class(self, values: Iterable[float]) -> dict[str, float]:
        return {name: value for name, value in zip(CLASSES, values, strict=True) if name in self._classes}

    def _summed(self, sums: Tensor) -> Tensor:
        """Over all ranks that hold something else."""
        for group in (self._dp_group, self._norm_group):
            if dist.get_world_size(group) > 1:
                dist.all_reduce(sums, group=group)
        return sums

    def _describe(self, idx: int, layout: tuple[Any, ...]) -> Partition:
        group, owners = self._groups[idx], self._owners[idx]
        master = self._engine.single_partition_of_fp32_groups[idx]
        rank, size = dist.get_rank(owners), master.numel()
        return Partition(
            group=group["name"],
            is_expert=group["moe"],
            layout=layout,
            start=rank * size,
            end=(rank + 1) * size,
            owner_rank=rank,
            num_owners=dist.get_world_size(owners),
            master=master,
        )


def _all_agree(verdict: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    """True if it is true on every rank of the group.

    Stages must reduce in one way: another adds up in another order, and the two copies of a tied embedding
    would no longer be the same bits.
    """
    flag = torch.tensor([int(verdict)], device=device)
    if dist.get_world_size(group) > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=group)
    return bool(flag.item())


def _compare_norms(ours: float, theirs: float) -> None:
    if not math.isclose(ours, theirs, rel_tol=_NORM_TOLERANCE, abs_tol=1e-18):
        raise NumericsError(
            f"gradient norm: DeepSpeed has {theirs!r}, its partitions give {ours!r}; "
            "a parameter is counted twice or not at all"
        )


def _load_engine() -> Any:
    """Import DeepSpeed now: it takes seconds, and reads DS_ACCELERATOR while it is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    engine = importlib.import_module("moe_runtime.parallel.zero_engine")
    engine.join_process_group()
    return engine
