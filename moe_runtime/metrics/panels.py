"""The one list of pictures of a run: what stands beside what, in which order, and how to read it.

The W&B workspace and the report are both made from this list, so a person finds the same picture under the
same title in either.
"""

from moe_runtime.metrics.panel import (
    ALERTS,
    HEATMAP,
    LEARNING,
    NUMERICS,
    PERFORMANCE,
    RELIABILITY,
    ROUTING,
    SAMPLES,
    TIMELINE,
    Panel,
)


def _over_layers(name: str) -> tuple[str, ...]:
    """Keys of a number that is summed up over the MoE layers."""
    return tuple(f"routing/{name}/{each}" for each in ("min", "p50", "max"))


_LEARNING = (
    Panel(
        LEARNING,
        "Loss",
        ("loss", "loss_mtp", "val_loss"),
        "nats/token",
        "Falls fast, then slowly. Validation that rises while training falls: the text is read too often.",
    ),
    Panel(
        LEARNING,
        "Validation, bits per byte",
        ("val_bpb", "val_sets/*/val_bpb"),
        "bits/byte",
        "Comparable between tokenizers. One set that stays behind the others wants a larger weight.",
    ),
    Panel(
        LEARNING,
        "Validation loss of each set",
        ("val_sets/*/val_loss",),
        "nats/token",
        "What each part of a mixture learns.",
    ),
    Panel(
        LEARNING,
        "Gradient norm",
        ("grad_norm",),
        "",
        "Settles after the warm-up. A slow rise foretells a spike: lower the learning rate.",
        log=True,
    ),
    Panel(
        LEARNING,
        "Learning rate",
        ("lr",),
        "",
        "As the recipe says: warm-up, constant, cosine, tail.",
    ),
    Panel(
        LEARNING, "Sequences a step", ("batch_size",), "sequences", "Grows over the ramp, if there is one."
    ),
    Panel(LEARNING, "Tokens trained on", ("tokens",), "tokens", "A straight line, but for the ramp."),
    Panel(LEARNING, "Epochs", ("epoch",), "", "Above 4, more passes over the same text teach little."),
    Panel(
        LEARNING,
        "Spikes of the loss",
        ("spike_z",),
        "robust z",
        "Within 3 of 0. Above guard.spike_z it is a spike, and guard.spike_action says what follows.",
    ),
    Panel(
        LEARNING,
        "Skipped steps",
        ("skipped_steps",),
        "steps",
        "Stays flat. Each step up is a gradient that was not finite; events.jsonl names the parameter.",
    ),
    Panel(
        LEARNING, "Balance loss", ("loss_balance",), "", "Small beside the loss, or balance_alpha is high."
    ),
    Panel(
        LEARNING,
        "Samples",
        (SAMPLES,),
        "",
        "What the model writes after train.sample_prompt, step by step.",
        kind="table",
    ),
)

_ROUTING = (
    Panel(
        ROUTING,
        "Expert load, layer by expert",
        (HEATMAP,),
        "load over fair share",
        "Even colour is good. A dark column is a dead expert, a bright one holds up its rank.",
        kind="image",
    ),
    Panel(
        ROUTING,
        "Load violation",
        ("max_violation", *_over_layers("violation")),
        "(max - mean) / mean",
        "Of each batch. Falls below 1 in a good run; a rise means that the bias no longer follows.",
    ),
    Panel(
        ROUTING,
        "Load violation over a window",
        _over_layers("violation_global"),
        "(max - mean) / mean",
        "Of the counts of the last steps together: chance is averaged out, so this is the bias at work.",
    ),
    Panel(
        ROUTING,
        "Entropy of the load",
        _over_layers("load_entropy"),
        "H(p) / ln E",
        "1 is even. A layer far below the others routes all tokens to few experts.",
    ),
    Panel(
        ROUTING,
        "Dead experts",
        _over_layers("dead_experts"),
        "experts",
        "0 after the warm-up. An expert that stays dead is wasted memory: raise recipe.bias_gamma.",
    ),
    Panel(
        ROUTING,
        "Load of expert-parallel ranks",
        ("rank_load_ratio",),
        "busiest / mean",
        "1 is even. The step waits for the busiest rank, so 1.2 costs up to a fifth of the experts' time.",
    ),
    Panel(
        ROUTING,
        "Spread of the routing bias",
        _over_layers("bias_std"),
        "",
        "Grows, then settles. Never settling: bias_gamma is too large or the data changes.",
    ),
    Panel(
        ROUTING,
        "Experts that nothing brings back",
        _over_layers("starved_steps"),
        "steps in a row",
        "Balancing raises the bias of a starved expert; one that starves without it is lost.",
    ),
    Panel(
        ROUTING,
        "Load violation that is not balanced",
        _over_layers("unchecked_violation"),
        "(max - mean) / mean",
        "Above 0: the busiest expert is not held back by its bias.",
    ),
    Panel(
        ROUTING,
        "Reach of the routing bias",
        (*_over_layers("bias_reach"), *_over_layers("bias_range")),
        "max |bias|; max - min",
        "Beyond 1 the bias decides more than the scores, which lie between 0 and 1.",
    ),
    Panel(
        ROUTING,
        "Router logits",
        _over_layers("logit_rms"),
        "RMS",
        "A steady climb saturates the sigmoid, and the router stops learning.",
    ),
    Panel(
        ROUTING, "Router z-loss", _over_layers("z_loss"), "", "Measured, not trained on; climbs with logits."
    ),
    Panel(
        ROUTING,
        "Margin of the last expert chosen",
        _over_layers("top_k_margin"),
        "score",
        "Near 0 the choice is a coin toss, which changes with rounding.",
    ),
    Panel(
        ROUTING,
        "Nodes a token is sent to",
        _over_layers("nodes_per_token"),
        "nodes",
        "At most model.num_groups_kept. Each costs bytes on the slow link.",
    ),
)

_PERFORMANCE = (
    Panel(
        PERFORMANCE,
        "Speed",
        ("tokens_per_s", "tokens_per_s_rank"),
        "tokens/s",
        "Flat. A drop that stays: look at the straggler and at exposed communication.",
    ),
    Panel(PERFORMANCE, "Model FLOPs utilisation", ("mfu",), "share of peak", "Only where the peak is known."),
    Panel(PERFORMANCE, "Work of a token", ("flops_per_token",), "FLOP", "Constant for a model."),
    Panel(
        PERFORMANCE,
        "Time of a step",
        ("step_s", "step_s_p50", "step_s_p99"),
        "s",
        "p99 far above p50: something disturbs some steps, a save or a neighbour.",
    ),
    Panel(
        PERFORMANCE,
        "Pipeline bubble",
        ("bubble_fraction", "bubble_fraction_ideal"),
        "share of the step",
        "Measured close to ideal is good. A gap is imbalance of the stages, or a slow link.",
    ),
    Panel(
        PERFORMANCE,
        "Exposed and hidden communication",
        ("exposed_comm_fraction", "hidden_comm_fraction"),
        "share",
        "Exposed near 0 and hidden near 1: exchanges fly under computation (layout.overlap).",
    ),
    Panel(PERFORMANCE, "Exposed communication", ("exposed_comm_s",), "s", "What overlap could still gain."),
    Panel(
        PERFORMANCE,
        "Expert-parallel bytes",
        ("comm_bytes_inter", "comm_bytes_intra", "comm_meta_bytes_inter", "comm_meta_bytes_intra"),
        "bytes/step",
        "Between nodes should be far below within a node (layout.dispatcher=two_hop).",
        log=True,
    ),
    Panel(
        PERFORMANCE,
        "Expert-parallel rows",
        ("comm_rows_inter", "comm_rows_intra", "comm_rows_self"),
        "rows/step",
        "Rows that stay on their rank cost nothing.",
    ),
    Panel(
        PERFORMANCE,
        "Speed of exchanges",
        ("dispatch_gb_s_inter", "dispatch_gb_s_intra"),
        "GB/s",
        "Close to the link's own speed for large messages.",
    ),
    Panel(
        PERFORMANCE, "Wait for data", ("data_wait_s",), "s", "Near 0. Else the disk is slower than the model."
    ),
    Panel(
        PERFORMANCE,
        "Slowest rank",
        ("straggler_ratio",),
        "own work over its peers'",
        "1 is even. Above reliability.straggler_ratio the rank is named in events.jsonl.",
    ),
    Panel(
        PERFORMANCE,
        "Which rank is the slowest",
        ("straggler_rank",),
        "rank",
        "Chance picks another one each time; a rank that stays has a slow core, GPU or link.",
    ),
    Panel(
        PERFORMANCE,
        "Peak memory of the worst rank",
        ("memory_peak_gb",),
        "GB",
        "Flat after the first steps. A slow rise is a leak.",
    ),
    Panel(
        PERFORMANCE,
        "Allocator retries",
        ("alloc_retries",),
        "",
        "0. Else memory is nearly full: a GPU waits.",
    ),
    Panel(PERFORMANCE, "Time of the meters", ("meters_s",), "s", "What measuring all this costs a step."),
    Panel(
        PERFORMANCE,
        "Pipeline timeline of one step",
        (TIMELINE,),
        "",
        "Gaps within a row are waits. metrics.trace_step chooses the step.",
        kind="image",
    ),
)

_NUMERICS = (
    Panel(
        NUMERICS,
        "Gradient norm by class",
        ("grad_norms/*",),
        "",
        "One class that leaves the others shows where a spike begins.",
        log=True,
    ),
    Panel(
        NUMERICS,
        "Update over parameter",
        ("updates/*",),
        "RMS / RMS",
        "About 1e-3. Far above: the learning rate is high for this class; far below: it stands still.",
        log=True,
    ),
    Panel(NUMERICS, "Gradients not finite", ("nonfinite",), "parameters", "0."),
    Panel(
        NUMERICS,
        "FP8 underflow and saturation",
        ("fp8/*/underflow", "fp8/*/saturation"),
        "share of elements",
        "Saturation is 0 with tile scales; underflow of gradients up to a few percent is normal.",
    ),
    Panel(NUMERICS, "FP8 largest magnitude", ("fp8/*/amax",), "", "A jump comes before a spike.", log=True),
    Panel(
        NUMERICS, "FP8 scales", ("fp8/*/scale_min", "fp8/*/scale_max"), "", "How wide tiles range.", log=True
    ),
    Panel(NUMERICS, "FP8 product against BF16", ("fp8_error",), "relative error", "A few percent, and flat."),
    Panel(
        NUMERICS,
        "FP8 moments: shares",
        tuple(
            f"optim_numerics/*/{name}"
            for name in ("zeros", "underflows", "saturated", "stalled", "nonfinite")
        ),
        "share of elements",
        "optim.numerics warns above its limits.",
    ),
    Panel(
        NUMERICS,
        "FP8 moments: scales and largest update",
        tuple(f"optim_numerics/*/{name}" for name in ("min_scale", "max_scale", "largest_update")),
        "",
        "The largest update is in learning rates; above 10 it is told.",
    ),
)

_RELIABILITY = (
    Panel(
        RELIABILITY, "Effective training time", ("ettr",), "share", "1 less all that faults and saves cost."
    ),
    Panel(
        RELIABILITY,
        "Time of the run, and of it in steps that count",
        ("run_s", "train_s"),
        "s",
        "The lines part by starts, restarts, saves and steps that were done again.",
    ),
    Panel(
        RELIABILITY,
        "Restarts and lost steps",
        ("restarts", "lost_steps"),
        "",
        "Lost steps a restart are at most train.checkpoint_every.",
    ),
    Panel(RELIABILITY, "Mean time to repair", ("mttr_s",), "s", "From a fault to the next step done."),
    Panel(
        RELIABILITY,
        "Age of the newest checkpoint",
        ("checkpoint_age",),
        "steps",
        "A saw-tooth. A climb without end: checkpoints fail, see events.jsonl.",
    ),
    Panel(
        RELIABILITY,
        "Last verified checkpoint",
        ("verified_step",),
        "step",
        "What a restart would go on from; read back and found whole.",
    ),
    Panel(
        RELIABILITY,
        "Time of a checkpoint",
        ("checkpoint_s", "checkpoint_blocked_s"),
        "s",
        "Blocked is what training waits; the rest is written behind it.",
    ),
    Panel(RELIABILITY, "Replicas that differ", ("digest_mismatches",), "", "0. Else bits changed unbidden."),
    Panel(
        RELIABILITY,
        "Alerts",
        (ALERTS,),
        "",
        "What the limits of the section alerts have found.",
        kind="table",
    ),
)

PANELS: tuple[Panel, ...] = (*_LEARNING, *_ROUTING, *_PERFORMANCE, *_NUMERICS, *_RELIABILITY)


def panel_of(key: str) -> Panel | None:
    """The first panel that shows a flat key; None: it is recorded, and no picture shows it."""
    return next((panel for panel in PANELS if panel.lines((key,))), None)


def panels_of(section: str) -> tuple[Panel, ...]:
    """The panels of a section, in order."""
    return tuple(panel for panel in PANELS if panel.section == section)
