"""Calibrates: probes, four short runs, and the cluster file that they give."""

from pathlib import Path

from moe_runtime.cli.calibrate.runs import Setting, train_run
from moe_runtime.cli.probe.measure import probe
from moe_runtime.config.layout import check_layout
from moe_runtime.config.load import load_config
from moe_runtime.planner.hardware.cluster import Cluster
from moe_runtime.planner.host.calibrate import Pair, calibrate

CONFIG = "calibrate"
# So small that only the framework's way to its kernels is left.
FLOOR = (
    *("model.hidden_size=16", "model.ffn_size=16", "model.expert_ffn_size=8", "batch.seq_len=8"),
    *("model.q_lora_rank=8", "model.kv_lora_rank=8"),
    *("model.qk_nope_head_dim=2", "model.qk_rope_head_dim=2", "model.v_head_dim=2"),
)
APART, TOGETHER = "layout.overlap=false", "layout.overlap=true"


def calibrate_machine(config: str, folder: Path, name: str = "local") -> Cluster:
    """Measure this machine; about a minute.

    Args:
        config: run config of the layout and shape to calibrate on.
        folder: where the short runs are made and stay.
        name: of the cluster.

    Raises:
        ConfigError: a run failed, or has more ranks than there are cores.
    """
    ranks = check_layout(load_config(config)).world_size
    folder.mkdir(parents=True, exist_ok=True)

    def pair(word: str, overrides: tuple[str, ...]) -> Pair:
        apart, together = (
            train_run(config, Setting(f"{word}-{way}", (*overrides, how)), folder, ranks)
            for way, how in (("apart", APART), ("together", TOGETHER))
        )
        return Pair(apart, together)

    return calibrate(probe(), pair("floor", FLOOR), pair("shape", ()), name)
