"""DeepSpeed's ZeRO optimizer, fed by our executor: the only file that imports DeepSpeed.

Partitioning, reduction, the gradient norm, clipping, the step and the all-gather of weights are
DeepSpeed's. What is overridden here is where its assumptions about a training loop do not hold:

- It hooks autograd and reduces whenever a gradient arrives. Our gradients arrive from schedules that
  defer them, so there are no hooks; parameters are fed when the adapter says so.
- It takes FP32 gradients from `param.grad_accum` for BF16 models at stage 1 only; at stage 2 it would
  take BF16 gradients from `param.grad`, and for FP32 models either stage does. Here it is always
  `grad_accum`, and the owner always sums in one flat FP32 partition, whatever the model's dtype.
- It adds up the norm over the pipeline group by group, which hangs when pipeline ranks have different
  numbers of groups (a stage without experts). Here every rank finishes its own stages first, then
  one number is added over the pipeline. The result is compared with the adapter's before it is used.
- It links the client optimizer's state to parameters by shape, so `safe_get_full_optimizer_state`
  would hand out raw FP8 codes as if they were numbers. Not linked; asking for it fails loudly.
"""

import importlib
import warnings
from collections.abc import Callable, Iterable

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import compiler
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.timer import NoopTimer
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

NormCheck = Callable[[float], None]


def join_process_group() -> None:
    """Let DeepSpeed use the existing default process group, compiling nothing; repeated calls are free."""
    if deepspeed.comm.is_initialized():
        return
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:  # CPU only: it would be compiled at the first call, for most of a minute
        deepspeed.ops.__compatible_ops__[builder.NAME] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    # DeepSpeed calls it at every step; torch 2.13 has renamed it.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    _import_muon()


def _import_muon() -> None:
    """Import the optimizer that DeepSpeed looks for at each reduction, without its compiled kernels.

    They pull in torch's whole compiler, a second or more of every rank's start, and are not used.
    """
    compiled = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compiled


class ZeroEngine(DeepSpeedZeroOptimizer):
    """Stage 1 or 2 over flat groups; see the top of this file for what differs from DeepSpeed.

    Args:
        client: optimizer over parameter groups whose `params` are the model's; expert groups carry
            `moe=True` and a `name`. Afterwards each group holds this rank's flat FP32 partition.
        names: the name of every parameter.
        dp_group: ranks that average dense gradients.
        expert_groups: for each expert group's name, (expert-parallel, expert-data-parallel) groups.
        norm_group: ranks that together hold every stage once.
        stage: 1 or 2.
        grad_clip: largest global gradient norm; 0 turns clipping off.
        accum_dtype: dtype of accumulated gradients, of their transport and of the owner's sum.
        bucket_elements: gradients put together before they travel.
        to_owners: send each gradient to its owner alone, in one message per owner, instead of
            all-reducing the bucket: half the bytes, more messages.
    """

    def __init__(
        self,
        client: Optimizer,
        names: dict[Parameter, str],
        *,
        dp_group: dist.ProcessGroup,
        expert_groups: dict[str, tuple[dist.ProcessGroup, dist.ProcessGroup]],
        norm_group: dist.ProcessGroup,
        stage: int,
        grad_clip: float,
        accum_dtype: torch.dtype,
        bucket_elements: int,
        to_owners: bool,
    ) -> None:
        self.norm_group = norm_group
        self.norm_check: NormCheck | None = None
        super().__init__(
            client,
            names,
            NoopTimer(),
            {},
            dp_process_group=dp_group,
            expert_parallel_group={name: pair[0] for name, pair in expert_groups.items()},
            expert_data_parallel_group={name: pair[1] for name, pair in expert_groups.items()},
            has_moe_layers=bool(expert_groups),
            partition_grads=stage == 2,
            clip_grad=grad_clip,
            gradient_accumulation_dtype=accum_dtype,
            communication_data_type=accum_dtype,
            reduce_bucket_size=bucket_elements,
            use_multi_rank_bucket_allreduce=not to_owners,
            contiguous_gradients=True,
            overlap_comm=False,
            check_grad_overflow=False,  # the adapter has looked already, in the same pass as its norm
            verbose=False,
        )
        self.use_grad_accum_attribute = True
        self._hp_optimizer_states_linked = True
        self._group_of = {id(p): i for i, group in enumerate(self.bit16_groups) for p in group}

    def create_gradient_handling_hooks(self) -> None:
        """No hooks: gradients are fed, not caught."""
        self._remaining_grad_acc_hooks = 0

    def _use_compact_grad_partition_buffer(self, group_idx: int) -> bool:
        return True

    def feed(self, params: Iterable[Parameter]) -> None:
        """Put gradients on their way to their owners, and let go of the accumulators.

        All ranks of the data-parallel group must feed the same parameters in the same order.
        """
        (bucket,) = self.ipg_buckets.values()
        for param in params:
            assert param.grad is None, f"{self.param_names[param]}: a gradient in .grad would be lost"
            if not bucket.buffer:
                size, dtype = self.reduce_bucket_size, self.communication_data_type
                bucket.buffer.append(torch.empty(size, dtype=dtype, device=self.device))
                bucket.index = 0
            if bucket.params and getattr(param, "is_tied", False):
                # Alone in its bucket: where it begins decides in which order ranks are added up, and the two
                # stages that hold a copy must come to the same bits.
                self.reduce_ipg_grads()
            self.reduce_ready_partitions_and_remove_grads(param, self._group_of[id(param)])
            if param.numel() > self.reduce_bucket_size:
                self.reduce_ipg_grads()  # it did not fit into the bucket, so it goes alone, now
            param.grad_accum = None  # type: ignore[attr-defined]

    def flush(self) -> None:
        """Finish what was fed: owners hold the sum, nobody holds a bucket."""
        self.overlapping_partition_gradients_reduce_epilogue()

    def reduced(self, group_idx: int) -> Tensor:
        """This rank's partition of the averaged gradients of one group, flat, padding zero."""
        return self._get_compact_grad_partition_buffer(group_idx).flat_partition

    def drop_gradients(self) -> None:
        """Forget all gradients, fed or not."""
        for bucket in self.ipg_buckets.values():
            bucket.clear()
        self.extra_large_param_to_reduce.clear()
        self.params_already_reduced: list[bool] = [False] * len(self.param_dict)
        self._release_ipg_buffers()
        self.averaged_gradients: dict[int, list[Tensor] | None] = {}
        self.zero_grad(set_to_none=True)

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """DeepSpeed's norm of this rank's stages, then joined over the pipeline and checked."""
        total = super().scaled_global_norm(norm_type)
        if dist.get_world_size(self.norm_group) > 1:
            total = total.square()
            dist.all_reduce(total, group=self.norm_group)
            total = total.sqrt()
        if self.norm_check is not None:
            self.norm_check(float(total))
        return total
