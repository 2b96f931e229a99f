"""Bytes that FP8 saves: activations of a block between forward and backward, and the whole training state.

    python benchmarks/fp8_memory.py            # two tables
    python benchmarks/fp8_memory.py --json

Activations: one block in DeepSeek-V3's proportions at a seventh of its width, 512 tokens; every storage that
is alive after its forward counts, but weights and their casts. State: a small model and its real ZeRO
optimizer on one rank, after two steps; all that is alive counts, divided by the number of parameters.
"""

import argparse
import gc
import json
import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from moe_comm.local import LocalDispatcher
from torch import Tensor

from moe_runtime.build import build_mesh, build_optimizer, build_runtime
from moe_runtime.config.layout import check_layout
from moe_runtime.config.schema import ModelConfig, RecomputeConfig, RunConfig
from moe_runtime.fp8.policy import Policy
from moe_runtime.fp8.weight_casts import WeightCasts
from moe_runtime.model.fp8_model import use_fp8
from moe_runtime.model.transformer import Transformer
from moe_runtime.parallel.mesh import open_groups
from moe_runtime.train.step import objective_weights, split_microbatches
from tests.dist.live_bytes import LiveBytes

TOKENS = 512
# Widths of DeepSeek-V3 over 7; a token's rows are those of 8 experts of 2048.
BLOCK: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 1024,
    "num_layers": 1,
    "num_dense_layers": 1,
    "ffn_size": 2688,
    "num_heads": 18,
    "q_lora_rank": 224,
    "kv_lora_rank": 80,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_experts": 16,
    "top_k": 8,
    "expert_ffn_size": 292,
    "mtp_depth": 0,
    "init_std": 0.02,
}
STATE = BLOCK | {"hidden_size": 256, "num_layers": 3, "ffn_size": 640, "num_heads": 4, "mtp_depth": 1}
RECOMPUTES = {"nothing": {}, "norm, swiglu, mla_up": {"norm": True, "swiglu": True, "mla_up": True}}


def held(precision: str, is_moe: bool, recompute: dict[str, bool]) -> float:
    """Bytes a token that one block keeps for its backward."""
    model = Transformer(
        ModelConfig(**BLOCK | {"num_dense_layers": int(not is_moe)}),
        has_head=False,
        recompute=RecomputeConfig(**recompute),
        dtype=torch.bfloat16,
        dispatcher=LocalDispatcher(BLOCK["num_experts"], keep_tiles=precision == "fp8"),
    )
    model.init_weights(1)
    casts = WeightCasts()
    if precision == "fp8":
        use_fp8(model, Policy(), casts)
    (block,) = model.blocks()
    resid = torch.randn(1, TOKENS, BLOCK["hidden_size"], dtype=torch.bfloat16)
    run_block(model, resid)
    ignored = [*model.parameters(), *model.buffers(), *casts.tensors(), resid]
    with LiveBytes(ignored) as meter:
        out = run_block(model, resid)
        bytes_held = meter.now - sum(x.nbytes for x in out)
    assert all(x.requires_grad for x in out), f"{block.name}: nothing was kept for a backward"
    return bytes_held / TOKENS


def run_block(model: Transformer, resid: Tensor) -> list[Tensor]:
    """The streams after the block's forward; its input, which the layer before keeps or made, is `resid`."""
    phases = [phase for phase in model.phases() if phase.name != "embed"]
    state = {"tokens": torch.zeros(1, TOKENS + 1, dtype=torch.int64), "resid": resid}
    model.run_phases(tuple(phases), state)
    return [state["resid"]]


def state_bytes(precision: str, moments: str) -> dict[str, float]:
    """Bytes a parameter of everything that is alive between two steps, and of weight casts within one."""
    gc.collect()
    before = _alive_bytes()
    config = RunConfig.model_validate(
        {
            "model": STATE,
            "batch": {"seq_len": 32, "global_batch_size": 1},
            "precision": precision,
            "optim": {"moments": moments},
            "data": {"path": "none"},
            "train": {"total_steps": 1},
        }
    )
    layout = check_layout(config, 1)
    mesh = build_mesh(layout, 0)
    runtime = build_runtime(config, layout, mesh, open_groups(mesh), torch.device("cpu"), ranks_per_node=1)
    optimizer = build_optimizer(runtime)
    tokens = torch.randint(STATE["vocab_size"], (1, 32 + 2))
    casts = 0
    for _ in range(2):
        optimizer.zero_grad()
        weights = objective_weights(runtime, 1, 0.3)
        runtime.executor.run(runtime.program(1), split_microbatches(tokens, 1, 1), weights)
        casts = runtime.weight_casts.nbytes
        optimizer.step(1e-3)
    gc.collect()
    params = sum(param.numel() for _, param in runtime.named_params)
    return {"state": (_alive_bytes() - before) / params, "casts": casts / params, "parameters": params}


def _alive_bytes() -> int:
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type != "meta"
    }
    return sum(storages.values())


def measure() -> dict[str, Any]:
    """All figures."""
    blocks = [
        {
            "block": kind,
            "recompute": name,
            **{p: held(p, kind == "MoE", recompute) for p in ("bf16", "fp8")},
        }
        for kind in ("dense", "MoE")
        for name, recompute in RECOMPUTES.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        states = [
            {"precision": precision, "moments": moments, **state_bytes(precision, moments)}
            for precision, moments in (("bf16", "fp32"), ("bf16", "bf16"), ("bf16", "fp8"), ("fp8", "fp8"))
        ]
        dist.destroy_process_group()
    return {"blocks": blocks, "states": states}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    found = measure()
    if args.json:
        print(json.dumps(found))
        return
    print("activations kept by a block, bytes a token and unit of hidden width")
    print("block  recompute               BF16    FP8  ratio")
    for line in found["blocks"]:
        bf16, fp8 = (line[key] / BLOCK["hidden_size"] for key in ("bf16", "fp8"))
        print(f"{line['block']:6} {line['recompute']:21} {bf16:6.1f} {fp8:6.1f}  {fp8 / bf16:.3f}")
    print("training state, bytes a parameter (weights, FP32 gradients and masters, moments)")
    print("products moments   state   weight casts within a step")
    for line in found["states"]:
        print(f"{line['precision']:8} {line['moments']:7} {line['state']:7.3f}   {line['casts']:.3f}")


if __name__ == "__main__":
    main()
