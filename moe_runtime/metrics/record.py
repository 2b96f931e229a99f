"""The one list of what a record may hold: every number of a step, with its meaning, unit and source.

Everything that reads a run reads these keys: metrics.jsonl, W&B, TensorBoard, the report, the alerts. A key
is a path: `routing/violation/max` stands in the record as `{"routing": {"violation": {"max": ...}}}`, and a
`*` stands for one name that depends on the run (a layer, a validation set). The page docs/metrics.md is
made of these tables, and a record with a key that is not in them is refused where it is written.

What was not measured has no key: a made-up zero would be worse than a gap. Apart from `layers`, how many
numbers a record has does not depend on the size of the model.
"""

from functools import cache
from typing import NamedTuple


class Metric(NamedTuple):
    """One number of a record.

    Args:
        definition: what it is, in words or as a formula.
        unit: of the number; `1` for a ratio or a share, `count`, `bytes`, `s`, `nats/token` ...
        source: the file of the package that measures it, and the equation or paper behind it.
    """

    definition: str
    unit: str
    source: str


_RECORD = "train/step_record.py"
_ROUTER = "model/router.py"
_BALANCE = "metrics/balance.py"
_ZERO = "parallel/zero.py"
_WATCH = "fp8/watch.py"

LEARNING = {
    "step": Metric("optimizer steps done, from 1", "count", _RECORD),
    "tokens": Metric("tokens trained on so far", "tokens", _RECORD),
    "loss": Metric("main cross-entropy alone, mean over the global batch", "nats/token", _RECORD),
    "loss_mtp": Metric(
        "mean cross-entropy of the MTP depths, unscaled", "nats/token", "model/mtp.py, DSV3 (24)"
    ),
    "loss_balance": Metric(
        "sequence-wise balance loss, summed over MoE layers, unscaled", "1", f"{_ROUTER}, DSV3 (17)-(20)"
    ),
    "lr": Metric("learning rate of the step", "1/step", "optim/schedule.py"),
    "batch_size": Metric("sequences of the step, all lanes together", "sequences", _RECORD),
    "epoch": Metric(
        "sequences given so far, over those that the training set has", "epochs", "data/order.py"
    ),
    "skipped": Metric(
        "true if the step changed nothing, for its gradient was not finite or the config left it out",
        "truth value",
        _ZERO,
    ),
    "skipped_steps": Metric("steps so far that changed nothing", "count", "train/guard/state.py"),
    "spike_z": Metric(
        "distance of the loss from the median of the last guard.spike_window steps, in robust deviations",
        "1",
        "train/guard/spike.py",
    ),
    "val_loss": Metric("validation cross-entropy, on evaluation steps", "nats/token", "train/validate.py"),
    "val_bpb": Metric(
        "validation loss per byte of text, on evaluation steps", "bits/byte", "train/validate.py"
    ),
    "val_sets/*/val_loss": Metric("validation cross-entropy of one set", "nats/token", "train/validate.py"),
    "val_sets/*/val_bpb": Metric(
        "validation loss of one set per byte of its text", "bits/byte", "train/validate.py"
    ),
}

# What is measured of every MoE layer, and the name under which its spread over the layers stands, if it has
# one. The load of an expert is the number of tokens that chose it in the step's first forward pass.
_OF_A_LAYER = {
    "load_max": Metric("load of the busiest expert over the mean load", "1", _BALANCE),
    "load_min": Metric("load of the idlest expert over the mean load", "1", _BALANCE),
    "violation": Metric("(max load - mean) / mean", "1", f"{_BALANCE}, arXiv 2408.15664 (4)"),
    "violation_global": Metric(
        "(max load - mean) / mean of loads summed over the last metrics.window steps",
        "1",
        f"{_BALANCE}, arXiv 2408.15664",
    ),
    "load_entropy": Metric("H(p) / ln E of the shares p of the E experts; 1 is even", "1", _BALANCE),
    "dead_experts": Metric("experts with less than 1% of a fair share", "count", _BALANCE),
    "starved_steps": Metric(
        "steps in a row in which one and the same expert had less than 1% of a fair share though its bias "
        "was not above the layer's mean, which would bring it back; of the expert with most",
        "steps",
        _BALANCE,
    ),
    "unchecked_violation": Metric(
        "violation_global where the bias of the busiest expert is not below the layer's mean, else 0; from "
        "the first full window on",
        "1",
        _BALANCE,
    ),
    "bias_min": Metric("smallest routing bias after the step", "1", _ROUTER),
    "bias_max": Metric("largest routing bias after the step", "1", _ROUTER),
    "bias_std": Metric("standard deviation of the routing biases after the step", "1", _ROUTER),
    "bias_range": Metric("bias_max - bias_min; affinities are never further apart than 1", "1", _ROUTER),
    "bias_reach": Metric("largest |bias| after the step; affinities lie between 0 and 1", "1", _ROUTER),
    "logit_rms": Metric("root mean square of the router's logits", "1", "model/router_meter.py"),
    "z_loss": Metric(
        "mean over tokens of (ln sum exp logits)^2; not part of the objective",
        "1",
        "model/router_meter.py, arXiv 2202.08906 (5)",
    ),
    "top_k_margin": Metric(
        "mean over tokens of the distance between the last expert chosen and the first one not chosen, of "
        "those in the groups kept, in biased affinity",
        "1",
        "model/router_meter.py",
    ),
    "nodes_per_token": Metric(
        "mean over tokens of the nodes that hold its experts", "nodes", "model/router_meter.py"
    ),
}
SPREAD = (
    "violation",
    "violation_global",
    "load_entropy",
    "dead_experts",
    "starved_steps",
    "unchecked_violation",
    "bias_std",
    "bias_range",
    "bias_reach",
    "logit_rms",
    "z_loss",
    "top_k_margin",
    "nodes_per_token",
)
_PLACES = {
    "min": "smallest over the MoE layers",
    "p50": "median over the MoE layers",
    "max": "largest over the MoE layers",
}

ROUTING = {
    "max_violation": Metric(
        "mean over MoE layers of (max load - mean) / mean", "1", f"{_BALANCE}, arXiv 2408.15664 (4)"
    ),
    "rank_load_ratio": Metric(
        "largest over MoE layers of (rows of the busiest expert-parallel rank / mean over ranks)",
        "1",
        _BALANCE,
    ),
    "worst_layer": Metric("prefix of the layer with the largest violation", "name", _BALANCE),
    **{
        f"routing/{name}/{place}": Metric(f"{words}: {metric.definition}", metric.unit, metric.source)
        for name, metric in _OF_A_LAYER.items()
        if name in SPREAD
        for place, words in _PLACES.items()
    },
    **{f"layers/*/{name}": metric for name, metric in _OF_A_LAYER.items()},
}

PERFORMANCE = {
    "tokens_per_s": Metric("tokens of the step over its wall time, whole run", "tokens/s", _RECORD),
    "tokens_per_s_rank": Metric("tokens_per_s over the number of ranks", "tokens/s", _RECORD),
    "step_s": Metric("wall time of the step", "s", "train/step.py"),
    "step_s_p50": Metric("median of step_s over the last metrics.window steps", "s", "metrics/window.py"),
    "step_s_p99": Metric(
        "99th percentile of step_s over the last metrics.window steps", "s", "metrics/window.py"
    ),
    "flops_per_token": Metric(
        "operations of forward and backward per token, recomputation not counted",
        "FLOP/token",
        "planner/flops.py",
    ),
    "mfu": Metric(
        "model FLOP utilisation: flops_per_token x tokens_per_s_rank over the peak of a rank's device",
        "1",
        "metrics/utilisation.py",
    ),
    "bubble_fraction": Metric(
        "share of the step that ranks wait for their pipeline neighbours, mean over ranks",
        "1",
        "parallel/clock.py",
    ),
    "bubble_fraction_ideal": Metric(
        "what bubble_fraction would be if every entry of the program took its mean time and messages none: "
        "simulated in the first steps and every metrics.window steps, and kept in between",
        "1",
        "train/meters/ideal_bubble.py",
    ),
    "exposed_comm_fraction": Metric(
        "share of the step that ranks wait for dispatch and combine, mean over ranks",
        "1",
        "parallel/clock.py",
    ),
    "exposed_comm_s": Metric(
        "time that a rank waits for dispatch and combine, mean over ranks", "s", "parallel/clock.py"
    ),
    "hidden_comm_fraction": Metric(
        "of the time that exchanges fly, the share in which no rank waits for them", "1", "parallel/clock.py"
    ),
    "dispatch_gb_s_inter": Metric("comm_bytes_inter over the time that exchanges fly", "GB/s", _RECORD),
    "dispatch_gb_s_intra": Metric("comm_bytes_intra over the time that exchanges fly", "GB/s", _RECORD),
    "comm_bytes_inter": Metric(
        "expert-parallel bytes sent between nodes, all ranks together, metadata too",
        "bytes",
        "moe_comm/traffic.py",
    ),
    "comm_bytes_intra": Metric(
        "expert-parallel bytes sent between ranks of a node, all ranks together, metadata too",
        "bytes",
        "moe_comm/traffic.py",
    ),
    "comm_meta_bytes_inter": Metric(
        "of comm_bytes_inter: expert ids, gate weights and padding beside the rows",
        "bytes",
        "moe_comm/traffic.py",
    ),
    "comm_meta_bytes_intra": Metric(
        "of comm_bytes_intra: expert ids, gate weights and padding beside the rows",
        "bytes",
        "moe_comm/traffic.py",
    ),
    "comm_rows_inter": Metric(
        "rows sent between nodes; in two_hop a token counts once for each node", "rows", "moe_comm/traffic.py"
    ),
    "comm_rows_intra": Metric(
        "rows sent between ranks of a node; in two_hop a token counts once for each rank",
        "rows",
        "moe_comm/traffic.py",
    ),
    "comm_rows_self": Metric("rows that stayed on their rank", "rows", "moe_comm/traffic.py"),
    "data_wait_s": Metric("time to read the tokens of the step, slowest rank", "s", "train/step.py"),
    "straggler_ratio": Metric(
        "own work of the slowest rank over that of its peers, median of the last steps",
        "1",
        "train/straggler.py",
    ),
    "straggler_rank": Metric("the rank that straggler_ratio is of", "rank", "train/straggler.py"),
    "memory_peak_gb": Metric(
        "most memory held since the process began, worst rank: of the device on a GPU, resident on a CPU",
        "GB",
        "metrics/memory.py",
    ),
    "alloc_retries": Metric(
        "times that the GPU allocator had to free its cache and try again, all ranks, so far",
        "count",
        "metrics/memory.py",
    ),
    "meters_s": Metric(
        "time that measuring took since the last record, worst rank; the one reduction that carries all "
        "numbers, which the loss needs too, is not in it",
        "s",
        "train/step_record.py",
    ),
}

NUMERICS = {
    "grad_norm": Metric("global norm of the gradient before clipping", "1", _ZERO),
    "grad_norms/*": Metric(
        "the same norm of one class of parameters: router, experts, attention, ffn (dense FFNs, shared "
        "experts, MTP's projection), embedding, head, norms (gains); squares add up to that of grad_norm",
        "1",
        "parallel/by_class.py",
    ),
    "updates/*": Metric(
        "rms(update) / rms(weights before it) of one class, over at most 2^14 elements of each piece of a "
        "parameter; every metrics.numerics_every steps that changed something",
        "1",
        "parallel/by_class.py",
    ),
    "nonfinite": Metric("parameters with a gradient that was not finite", "count", "parallel/nonfinite.py"),
    "fp8/*/amax": Metric(
        "largest magnitude of a class of operands (input, weight, gradient) before it is cast to FP8, over "
        "the first 128 rows of each matrix; every metrics.numerics_every steps",
        "1",
        _WATCH,
    ),
    "fp8/*/underflow": Metric("share of these elements that are not zero but cast so", "1", _WATCH),
    "fp8/*/saturation": Metric(
        "share of these elements cast to the largest code, 448; about 0.001 where scales are right",
        "1",
        _WATCH,
    ),
    "fp8/*/scale_min": Metric(
        "smallest scale of a tile or block, value over code, of those that are not all zero", "1", _WATCH
    ),
    "fp8/*/scale_max": Metric("largest such scale", "1", _WATCH),
    "fp8_error": Metric(
        "|y_fp8 - y| / |y| of the first 128 rows of what linears give, y multiplied in the weights' dtype; "
        "about 0.03 where casts are right; every metrics.numerics_every steps",
        "1",
        _WATCH,
    ),
    "optim_numerics/*/zeros": Metric(
        "share of elements whose sqrt(v) is stored as zero", "1", "optim/statistics.py"
    ),
    "optim_numerics/*/underflows": Metric(
        "share of elements whose v is not zero but stored so", "1", "optim/statistics.py"
    ),
    "optim_numerics/*/saturated": Metric(
        "share of elements whose m / sqrt(v) is at the largest code", "1", "optim/statistics.py"
    ),
    "optim_numerics/*/stalled": Metric(
        "share of elements whose v changed and whose code did not; high is normal, 1 is not",
        "1",
        "optim/statistics.py",
    ),
    "optim_numerics/*/nonfinite": Metric(
        "share of elements whose v is stored as NaN", "1", "optim/statistics.py"
    ),
    "optim_numerics/*/min_scale": Metric(
        "smallest exponent of a block's scale, over blocks that are not all zero", "1", "optim/statistics.py"
    ),
    "optim_numerics/*/max_scale": Metric("largest exponent of a block's scale", "1", "optim/statistics.py"),
    "optim_numerics/*/largest_update": Metric(
        "largest update of an element, in learning rates, weight decay apart",
        "learning rates",
        "optim/statistics.py",
    ),
}

_LEDGER = "metrics/ledger.py"
RELIABILITY = {
    "run_s": Metric(
        "time that launchers have been at work on the run: from the start of ranks on, restarts counted, "
        "from the end of one launcher to the next one not",
        "s",
        _LEDGER,
    ),
    "train_s": Metric("time of it in steps that count: not skipped, not done again", "s", _LEDGER),
    "ettr": Metric("effective training time ratio: train_s / run_s", "1", f"{_LEDGER}, arXiv 2410.21680"),
    "restarts": Metric("times that ranks were started again after a failure", "count", _LEDGER),
    "lost_steps": Metric("steps that were recorded and had to be done again", "count", _LEDGER),
    "mttr_s": Metric("mean time from a failure as told to the first step after it", "s", _LEDGER),
    "checkpoint_age": Metric("steps since the newest checkpoint that is complete", "steps", _LEDGER),
    "checkpoint_s": Metric("time from the beginning of the newest save to its end", "s", _LEDGER),
    "checkpoint_blocked_s": Metric("time of it in which training stood still", "s", _LEDGER),
    "verified_step": Metric(
        "step of the newest checkpoint; every save reads back and checks what it has written",
        "steps",
        _LEDGER,
    ),
    "digest_mismatches": Metric(
        "times that state was found changed or replicas to differ", "count", "train/guard/integrity.py"
    ),
}

GROUPS = {
    "Learning": LEARNING,
    "Routing": ROUTING,
    "Performance": PERFORMANCE,
    "Numerics": NUMERICS,
    "Reliability": RELIABILITY,
}
METRICS: dict[str, Metric] = {path: metric for group in GROUPS.values() for path, metric in group.items()}
KEYS = tuple(dict.fromkeys(path.split("/")[0] for path in METRICS))  # what stands at the top of a record
LAYER_KEYS = tuple(_OF_A_LAYER)
NUMERICS_KEYS = tuple(path.split("/")[-1] for path in METRICS if path.startswith("optim_numerics/"))


@cache
def metric_of(path: str) -> Metric | None:
    """The description of a number by its path, `layers/layers.3/violation`; None if there is none."""
    if path in METRICS:
        return METRICS[path]
    parts = path.split("/")
    for pattern, metric in METRICS.items():
        names = pattern.split("/")
        if len(names) == len(parts) and all(
            name in ("*", part) for name, part in zip(names, parts, strict=True)
        ):
            return metric
    return None
