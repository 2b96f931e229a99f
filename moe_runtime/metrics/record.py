"""The record of one step: the keys that it may have, and its line of JSON.

Everything that reads a run reads these keys, so they are listed here once, with their meaning. What was
not measured has no key: a made-up zero would be worse than a gap. A number that was measured and is not
finite becomes `null`, for JSON has no word for it.
"""

import math
from collections.abc import Mapping
from typing import Any

KEYS = {
    "step": "optimizer steps done, from 1",
    "tokens": "tokens trained on so far",
    "loss": "main cross-entropy alone, nats a token, mean over the global batch",
    "loss_mtp": "mean cross-entropy of the MTP depths, unscaled",
    "loss_balance": "sequence-wise balance loss, summed over MoE layers, unscaled",
    "grad_norm": "global norm of the gradient before clipping",
    "lr": "learning rate of the step",
    "batch_size": "sequences of the step",
    "skipped": "true if the step changed nothing, for its gradient was not finite",
    "tokens_per_s": "of the whole run, over this step",
    "step_s": "wall time of the step, seconds",
    "bubble_fraction": "share of the step that ranks wait for their pipeline neighbours, mean over ranks",
    "exposed_comm_fraction": "share of the step that ranks wait for dispatch and combine, mean over ranks",
    "hidden_comm_fraction": "of the time that exchanges fly, the share in which no rank waits for them",
    "comm_bytes_inter": "expert-parallel bytes sent between nodes, all ranks together, metadata too",
    "comm_bytes_intra": "expert-parallel bytes sent between ranks of a node, likewise",
    "comm_meta_bytes_inter": "of comm_bytes_inter: expert ids, gate weights and padding beside the rows",
    "comm_meta_bytes_intra": "of comm_bytes_intra: the same",
    "comm_rows_inter": "rows sent between nodes; in two_hop a token counts once for each node",
    "comm_rows_intra": "rows sent between ranks of a node; in two_hop a token counts once for each rank",
    "comm_rows_self": "rows that stayed on their rank",
    "straggler_ratio": "own work of the slowest rank over that of its peers, median of the last steps",
    "max_violation": "mean over MoE layers of (max load - mean) / mean",
    "optim_numerics": "FP8 moments by parameter group, on reporting steps: see NUMERICS_KEYS",
    "layers": "per MoE layer, by its canonical prefix: see LAYER_KEYS",
    "val_loss": "validation cross-entropy, nats a token; on evaluation steps",
    "val_bpb": "validation bits per byte; on evaluation steps",
    "val_sets": "of a mixture, by the name of the set: val_loss and val_bpb; on evaluation steps",
}

_NESTED = ("optim_numerics", "layers", "val_sets")

LAYER_KEYS = {
    "load_max": "load of the busiest expert over the mean load",
    "load_min": "load of the idlest expert over the mean load",
    "violation": "(max load - mean) / mean",
    "bias_min": "smallest routing bias after the step",
    "bias_max": "largest routing bias after the step",
}

NUMERICS_KEYS = {
    "zeros": "share of elements whose sqrt(v) is stored as zero",
    "underflows": "share of elements whose v is not zero but stored so",
    "saturated": "share of elements whose m / sqrt(v) is at the largest code",
    "stalled": "share of elements whose v changed and whose code did not; high is normal, 1 is not",
    "nonfinite": "share of elements whose v is stored as NaN",
    "min_scale": "smallest exponent of a block's scale, over blocks that are not all zero",
    "max_scale": "largest such exponent",
    "largest_update": "largest update of an element, in learning rates, weight decay apart",
}


def to_line(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as strict JSON: no key unknown, no value unmeasured.

    Args:
        record: some of `KEYS`; `step`, `tokens` and `loss` among them. None: not measured.
    """
    unknown = record.keys() - KEYS.keys()
    assert not unknown, f"metrics.record.KEYS does not know {sorted(unknown)}"
    line = _measured({key: value for key, value in record.items() if key not in _NESTED})
    for key in _NESTED:
        parts = {name: _measured(detail) for name, detail in (record.get(key) or {}).items()}
        line |= {key: parts} if parts else {}
    return line


def _measured(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: finite_or_none(value) for key, value in values.items() if value is not None}


def finite_or_none(value: Any) -> Any:
    """NaN and the infinities become None; everything else stays."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
