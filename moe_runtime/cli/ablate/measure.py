"""What a finished run is worth: one result, all of it from its records and its last checkpoint.

    records       loss and violation over tokens, seconds of training
    checkpoint    loss over the whole validation split, where its tokens are routed, what drafts are worth

Violation is (busiest expert's load - mean) / mean. A step's is that of its global batch, the largest over
the layers; that of the text counts the whole validation split at once, which is what an expert's machine
sees in the long run. An expert is dead if it gets less than a hundredth of its fair share there, starved if
less than a tenth.

Nodes are the routing groups as the published model lays them out: each node holds a whole number of them.
Here it is `NODES` nodes of as many consecutive experts, whether the router is limited to groups or not, so
that both kinds are counted on the same machine. A token's own node is any of them with equal chance.
"""

import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_runtime.checkpoint.folder import open_checkpoint
from moe_runtime.checkpoint.load import config_of, model_from
from moe_runtime.cli.bench_generate.teacher_forced import teacher_forced
from moe_runtime.config.counts import cache_elements, count_parameters
from moe_runtime.config.schema import RunConfig
from moe_runtime.data.loader import VALIDATION_SEED, BatchLoader
from moe_runtime.data.shards import TokenDataset
from moe_runtime.errors import ConfigError
from moe_runtime.evaluation.loss import evaluate
from moe_runtime.metrics.files import METRICS_FILE
from moe_runtime.metrics.jsonl import read_jsonl
from moe_runtime.model.inference import InferenceModel
from moe_runtime.model.router import Router
from moe_runtime.model.targets import token_ids
from moe_runtime.model.transformer import Transformer
from moe_runtime.planner.flops import token_flops

NODES = 4
DEAD, STARVED = 0.01, 0.1  # of a fair share
BATCH_ROWS = 16
FP32_BYTES = 4
DRAFTED_ROWS = 64
CURVE_POINTS = 40


def measure_run(run_dir: Path) -> dict[str, Any]:
    """The result of a run that has ended.

    Returns:
        seed, steps, tokens, train_s, machine, data (fingerprint), config (without defaults), measures,
        curves.
    """
    checkpoint = open_checkpoint(run_dir)
    config = config_of(checkpoint)
    records = list(read_jsonl(run_dir / METRICS_FILE))
    model = model_from(checkpoint)
    if config.data.path is None:
        raise ConfigError(f"{run_dir}: expected a run on one set (data.path), got one on data.mixture")
    dataset = TokenDataset.open(config.data.path, "validation")
    tokens = records[-1]["tokens"]
    measures = _size(config, tokens) | _violation(records) | _on_text(model, dataset, config)
    if config.model.mtp_depth:
        measures |= _drafts(model, dataset, config)
    return {
        "seed": config.seed,
        "steps": records[-1]["step"],
        "tokens": tokens,
        "train_s": round(sum(record["step_s"] for record in records), 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}",
        "data": dataset.manifest.fingerprint[:16],
        "config": config.model_dump(
            mode="json", exclude_defaults=True, exclude={"name", "out_dir", "metrics"}
        ),
        "measures": measures,
        "curves": _curves(records, config),
    }


def _size(config: RunConfig, tokens: int) -> dict[str, float]:
    counts = count_parameters(config.model)
    return {
        "params_total": counts.total / 1000,
        "params_active": counts.active / 1000,
        "flops": token_flops(config.model, config.batch.seq_len).total * tokens / 1e12,
        "flops_main": token_flops(config.model, config.batch.seq_len).main * tokens / 1e12,
        "cache_bytes": FP32_BYTES * cache_elements(config.model, drafts=False),
    }


def _violation(records: list[dict[str, Any]]) -> dict[str, float]:
    """Of the second half of training, when the router has settled."""
    late = [_step_violation(record) for record in records[len(records) // 2 :]]
    if any(value is None for value in late):
        return {}
    values = [value for value in late if value is not None]
    return {"violation": statistics.fmean(values), "violation_largest": max(values)}


def _step_violation(record: dict[str, Any]) -> float | None:
    """Of the layer that is worst; None without MoE layers."""
    layers = record.get("layers", {})
    return max((layer["violation"] for layer in layers.values()), default=None)


def _on_text(model: Transformer, dataset: TokenDataset, config: RunConfig) -> dict[str, float]:
    """Loss of every token of the validation split, and where the routers of the main model send them."""
    watches = [RouterWatch(moe.router) for _, moe in model.moe_layers()]
    loader = BatchLoader(dataset, config.batch.seq_len, config.model.mtp_depth, VALIDATION_SEED)
    result = evaluate(model, loader, loader.samples_per_epoch, BATCH_ROWS).result()
    seen = [watch for watch in watches if watch.tokens]  # MTP modules are not run
    found = {"val_loss": result.loss, "val_bpb": result.bits_per_byte}
    return found | (routing_figures(seen, config.model.num_experts) if seen else {})


class RouterWatch:
    """Counts where one router sends tokens."""

    def __init__(self, router: Router) -> None:
        self.counts = torch.zeros(router.weight.shape[0], dtype=torch.int64)
        self.nodes = self.tokens = 0
        router.register_forward_hook(self._see)

    def _see(self, _: nn.Module, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        ids = output[1]
        self.counts += torch.bincount(ids.flatten(), minlength=len(self.counts))
        self.nodes += nodes_reached(ids, len(self.counts))
        self.tokens += ids.shape[0]


def nodes_reached(expert_ids: Tensor, num_experts: int) -> int:
    """Sum over tokens of the nodes on which int64 `expert_ids` [tokens, top_k] lie, each counted once."""
    nodes = expert_ids // (num_experts // NODES)
    return int(torch.zeros(len(nodes), NODES).scatter_(1, nodes, 1.0).sum())


def routing_figures(seen: list[RouterWatch], num_experts: int) -> dict[str, float]:
    """Violation, shares of dead and starved experts in percent, nodes and copies, over what was seen."""
    loads = torch.stack([one.counts / one.counts.double().mean() for one in seen])
    nodes = sum(one.nodes for one in seen) / sum(one.tokens for one in seen)
    found = {
        "violation_text": float(loads.max()) - 1.0,
        "dead_experts": 100 * float((loads < DEAD).double().mean()),
        "starved_experts": 100 * float((loads < STARVED).double().mean()),
    }
    if num_experts % NODES == 0:
        found |= {"nodes_reached": nodes, "copies_between_nodes": nodes * (NODES - 1) / NODES}
    return found


def _drafts(model: Transformer, dataset: TokenDataset, config: RunConfig) -> dict[str, float]:
    """How often drafts of the MTP modules stand on the validation text, in percent."""
    loader = BatchLoader(dataset, config.batch.seq_len, config.model.mtp_depth, VALIDATION_SEED)
    found = teacher_forced(InferenceModel(model), token_ids(loader.sequences(0, DRAFTED_ROWS)))
    named = {"accepted_sampled": found["sampled"][0], "accepted_greedy": found["greedy"][0]}
    if config.model.mtp_depth > 1:
        named["second_sampled"] = found["sampled"][1]
    return {name: 100 * share for name, share in named.items()}


def _curves(records: list[dict[str, Any]], config: RunConfig) -> dict[str, list[list[float]]]:
    """Validation loss where it was taken; loss and violation as means of equal stretches."""
    stretch = max(1, len(records) // CURVE_POINTS)
    parts = [records[first : first + stretch] for first in range(0, len(records), stretch)]
    curves = {
        "val_loss": [[r["tokens"], round(r["val_loss"], 5)] for r in records if "val_loss" in r],
        "loss": [[part[-1]["tokens"], _mean(r["loss"] for r in part)] for part in parts],
    }
    if config.model.num_dense_layers < config.model.num_layers:
        worst = [[part[-1]["tokens"], _mean(_step_violation(r) or 0.0 for r in part)] for part in parts]
        curves["violation"] = worst
    return curves


def _mean(values: Any) -> float:
    return round(statistics.fmean(values), 5)


def write_result(run_dir: Path, file: Path) -> None:
    """`measure_run` into a JSON file, whole or not at all."""
    half = file.with_suffix(".half")
    half.write_text(json.dumps(measure_run(run_dir)))
    half.replace(file)
