"""What one call of the benchmark measures: given on the command line, carried to every rank as JSON."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from moe_runtime.config.layout import check_layout
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError


@dataclass(frozen=True)
class Contender:
    """One way to run a step.

    Args:
        name: as the user says it.
        family: "ours", "torch" or "deepspeed": who runs it.
        schedule: the family's word for it.
        overlap: exchanges fly under computation; only ours can.
        chunks: stages that each pipeline rank holds of one direction; two make a V.
    """

    name: str
    family: str
    schedule: str
    overlap: bool = False
    chunks: int = 1


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("dualpipe", "ours", "dualpipe", overlap=True),
        Contender("dualpipe-off", "ours", "dualpipe"),
        Contender("dualpipev", "ours", "dualpipev", overlap=True, chunks=2),
        Contender("dualpipev-off", "ours", "dualpipev", chunks=2),
        Contender("zbv", "ours", "zbv", overlap=True, chunks=2),
        Contender("zbv-off", "ours", "zbv", chunks=2),
        Contender("1f1b", "ours", "1f1b", overlap=True),
        Contender("1f1b-off", "ours", "1f1b"),
        Contender("searched", "ours", "searched", overlap=True, chunks=2),
        Contender("searched-off", "ours", "searched", chunks=2),
        Contender("torch-1f1b", "torch", "1F1B"),
        Contender("torch-zbv", "torch", "ZBVZeroBubble", chunks=2),
        Contender("torch-dualpipev", "torch", "DualPipeV", chunks=2),
        Contender("deepspeed-1f1b", "deepspeed", "1F1B"),
        Contender("deepspeed-dualpipev", "deepspeed", "DualPipeV", chunks=2),
    )
}
CALIBRATED_WITH = ("dualpipe-off", "1f1b-off")  # the first that can run


@dataclass(frozen=True)
class Settings:
    """One measurement.

    Args:
        pp: pipeline ranks.
        ep: lanes, which share the experts.
        has_links: each rank has a network namespace; else all are on loopback.
        rate_mbit: of every link, each way, in 10^6 bit/s; None: where there are links, the rate at which
            exchanges take as long as computation.
        cores: share of the processor of each rank; None: no share is set.
        microbatches: of each lane in a step.
        rounds: times that each contender is measured, in turn.
        contenders: names of CONTENDERS.
        layers, hidden, expert_width, num_experts, top_k, vocab: of the model, whose layers are all MoE.
        seq_len: tokens of a sequence; a microbatch is one sequence.
        seed: of weights and tokens.

    Raises:
        ConfigError: an unknown contender, or too few microbatches.
    """

    pp: int = 2
    ep: int = 2
    has_links: bool = True
    rate_mbit: int | None = None
    cores: float | None = None
    microbatches: int = 16
    rounds: int = 5
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    layers: int = 8
    hidden: int = 256
    expert_width: int = 768
    num_experts: int = 8
    top_k: int = 4
    vocab: int = 512
    seq_len: int = 256
    seed: int = 1

    def __post_init__(self) -> None:
        unknown = [name for name in self.contenders if name not in CONTENDERS]
        if unknown:
            raise ConfigError(
                f"bench pipeline: expected contenders of {', '.join(CONTENDERS)}, got {unknown[0]!r}"
            )
        if self.microbatches % 2 or self.microbatches < 2 * self.pp:
            raise ConfigError(
                f"bench pipeline: expected an even number of microbatches, at least {2 * self.pp} (twice the "
                f"{self.pp} pipeline ranks), got {self.microbatches}"
            )

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.pp * self.ep

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "Settings":
        """The inverse of `to_plain`, lists made tuples again."""
        fixed: dict[str, Any] = {**values, "contenders": tuple(values["contenders"])}
        return cls(**fixed)


def run_config(settings: Settings, contender: Contender) -> RunConfig:
    """The config of a run with this model and layout, by a contender of ours.

    Raises:
        ConfigError: this version of the runtime refuses it, or layers cannot be split evenly.
    """
    stages = settings.pp * contender.chunks
    if settings.layers % stages:
        raise ConfigError(f"{stages} stages do not divide {settings.layers} layers")
    layout = {
        "pp": settings.pp,
        "dp": settings.ep,
        "ep": settings.ep,
        "schedule": contender.schedule,
        "overlap": contender.overlap,
        "layers_per_stage": (settings.layers // stages,) * stages,
        "dispatcher": "alltoall",
    }
    batch = {"seq_len": settings.seq_len, "global_batch_size": settings.ep * settings.microbatches}
    try:
        config = RunConfig.model_validate(
            {
                "model": _model(settings),
                "layout": layout,
                "batch": batch,
                "recipe": {"balance_alpha": 0.0, "warmup_steps": 0},
                "precision": "fp32",
                "data": {"path": "none"},
                "train": {"total_steps": 1},
                "seed": settings.seed,
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    check_layout(config, settings.world_size)
    return config


def _model(settings: Settings) -> dict[str, Any]:
    head = settings.hidden // 4
    return {
        "vocab_size": settings.vocab,
        "hidden_size": settings.hidden,
        "num_layers": settings.layers,
        "num_dense_layers": 0,
        "ffn_size": settings.expert_width,
        "num_heads": 4,
        "kv_lora_rank": head,
        "qk_nope_head_dim": head // 2,
        "qk_rope_head_dim": head // 4,
        "v_head_dim": head // 2,
        "num_experts": settings.num_experts,
        "top_k": settings.top_k,
        "expert_ffn_size": settings.expert_width,
        "mtp_depth": 0,
        "init_std": 0.02,
    }
