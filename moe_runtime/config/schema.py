"""The sections of a run, typed and frozen: numbers and words only, no class paths.

One validated `RunConfig` is all that `build.py` needs. A layer never sees it: layers take flat
arguments or their own section. Derived values live in `derive.py`, never written back here.
Rules between keys of one section are its own validator; rules between sections are in `rules.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)
from pydantic_core import PydanticKnownError

from moe_runtime.config.alerts import AlertsConfig
from moe_runtime.config.data import DataConfig
from moe_runtime.config.finding import Finding, divisors, nearest
from moe_runtime.config.fp8 import Fp8Config
from moe_runtime.config.metrics import MetricsConfig
from moe_runtime.config.reliability import GuardConfig, ReliabilityConfig
from moe_runtime.config.section import Count, Fraction, NonNegative, Section

Schedule = Literal[
    "auto",
    "single",
    "gpipe",
    "1f1b",
    "interleaved",
    "zb1p",
    "zbv",
    "dualpipe",
    "dualpipev",
    "searched",
]


class YarnConfig(Section):
    """YaRN context extension of the rotary part. Ref: DSV3 §4.3."""

    factor: PositiveFloat = Field(40.0, description="s: how many times longer than the original context")
    original_seq_len: PositiveInt = Field(4096, description="context of pre-training, tokens")
    beta_fast: PositiveFloat = Field(32.0, description="beta: turns above which a frequency is kept")
    beta_slow: PositiveFloat = Field(1.0, description="alpha: turns below which a frequency is divided by s")
    mscale: NonNegative = Field(1.0, description="softmax scale is multiplied by (0.1 mscale ln s + 1)^2")

    def findings(self) -> list[Finding]:
        """The kept frequencies lie above the interpolated ones."""
        if self.beta_fast > self.beta_slow:
            return []
        return [
            Finding.expected("beta_fast", f"more than beta_slow {self.beta_slow:g}", f"{self.beta_fast:g}")
        ]


class ModelConfig(Section):
    """Widths and counts of the architecture, spelled as DeepSeek spells them. Ref: DSV3 §4.2."""

    vocab_size: PositiveInt = Field(description="rows of embedding and head; at least the tokenizer's size")
    hidden_size: PositiveInt = Field(description="width of the residual stream")
    num_layers: PositiveInt = Field(description="dense and MoE layers together, without MTP")
    num_dense_layers: Count = Field(description="the first k layers have a dense FFN")
    ffn_size: PositiveInt = Field(description="SwiGLU width of a dense layer")
    num_heads: PositiveInt = Field(description="attention heads")
    attention: Literal["mla", "mha"] = Field(
        "mla", description="mha: queries, keys and values straight from the stream; reads neither lora rank"
    )
    q_lora_rank: PositiveInt | None = Field(None, description="query latent width; null: full projection")
    kv_lora_rank: Count = Field(
        0, description="width of the latent of keys and values; mla needs it", validate_default=True
    )
    qk_nope_head_dim: PositiveInt = Field(description="of a head's query and key, the part without rotation")
    qk_rope_head_dim: Annotated[int, Field(gt=0, multiple_of=2)] = Field(
        description="of a head's query and key, the rotated part"
    )
    v_head_dim: PositiveInt = Field(description="width of a head's value")
    num_experts: PositiveInt = Field(description="routed experts a layer")
    num_shared_experts: Count = Field(1, description="experts of a layer that every token uses")
    top_k: PositiveInt = Field(description="routed experts a token uses")
    expert_ffn_size: PositiveInt = Field(description="SwiGLU width of one expert")
    num_groups: PositiveInt = Field(1, description="routing groups; experts are split evenly over them")
    num_groups_kept: PositiveInt = Field(1, description="groups a token may use")
    routed_scaling_factor: PositiveFloat = Field(2.5, description="factor of the routed experts' sum")
    rms_norm_eps: PositiveFloat = Field(1e-6, description="added to the mean square of every RMSNorm")
    rope_theta: PositiveFloat = Field(10000.0, description="base of the rotary frequencies")
    yarn: YarnConfig | None = Field(None, description="context extension; null: none")
    mtp_depth: Count = Field(1, description="D: extra tokens predicted by MTP modules; 0 turns MTP off")
    init_std: PositiveFloat = Field(0.006, description="standard deviation of weights drawn at random")

    @field_validator("kv_lora_rank")
    @classmethod
    def _mla_has_a_latent(cls, value: int, info: ValidationInfo) -> int:
        # Here and not in `findings`, so that a file without it is told together with its other gaps.
        if value == 0 and info.data.get("attention") == "mla":
            raise PydanticKnownError("missing")
        return value

    @model_serializer(mode="wrap")
    def _mla_goes_without_saying(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Manifests and fingerprints of before the key existed stay what they are.
        values: dict[str, Any] = dump(self)
        if self.attention == "mla":
            values.pop("attention", None)
        return values

    def findings(self) -> list[Finding]:
        """Layers, groups and experts fit each other. Ref: DSV3 §2.1.2."""
        found = []
        if self.num_dense_layers > self.num_layers:
            wanted = f"0 to num_layers {self.num_layers}"
            found.append(Finding.expected("num_dense_layers", wanted, self.num_dense_layers))
        if self.num_groups_kept > self.num_groups:
            wanted = f"1 to num_groups {self.num_groups}"
            found.append(Finding.expected("num_groups_kept", wanted, self.num_groups_kept))
        if self.num_experts % self.num_groups:
            wanted = f"a divisor of num_experts {self.num_experts}"
            near = nearest(self.num_groups, divisors(self.num_experts))
            return [*found, Finding.expected("num_groups", wanted, f"{self.num_groups}; nearest: {near}")]
        group_size = self.num_experts // self.num_groups
        if self.num_groups > 1 and group_size < 2:
            wanted = f"at most {self.num_experts // 2}, for a group is scored by its two best experts"
            found.append(Finding.expected("num_groups", wanted, self.num_groups))
        eligible = group_size * min(self.num_groups_kept, self.num_groups)
        if self.top_k > eligible:
            found.append(
                Finding.expected("top_k", f"at most the {eligible} experts of kept groups", self.top_k)
            )
        return found


class RecomputeConfig(Section):
    """What the backward pass computes again instead of keeping. Ref: DSV3 §3.2.3."""

    norm: bool = Field(False, description="outputs of every RMSNorm")
    swiglu: bool = Field(False, description="outputs of every SwiGLU")
    mla_up: bool = Field(False, description="queries, keys and values from their latents")


class LayoutConfig(Section):
    """How ranks share the model: world = pp x dp, and ep divides dp. Ref: design of the mesh."""

    pp: PositiveInt = Field(1, description="pipeline ranks")
    dp: PositiveInt = Field(1, description="data-parallel lanes")
    ep: PositiveInt = Field(1, description="ranks that share one set of experts; divides dp")
    schedule: Schedule = Field(
        "auto",
        description="searched: found for this run's costs; auto: the shortest of it and those made by hand",
    )
    chunks: PositiveInt | None = Field(
        None,
        description="stages of each rank; interleaved: 2 or more; searched and auto: 1 or an even number",
    )
    layers_per_stage: tuple[Count, ...] | None = Field(
        None, description="layers of each stage; null: spread evenly, head and MTP counted as load"
    )
    overlap: bool = Field(
        True, description="interleave F and B of a pair, so that exchanges fly under computation"
    )
    max_live: PositiveFloat | None = Field(
        None, description="most live microbatches of a rank, in 1/pp of the model; bounds searched and auto"
    )
    costs: str | None = Field(
        None, description="of searched and auto: F=1,I=1,W=1,C=1 or a trace.json; null: reckoned"
    )
    dispatcher: Literal["auto", "local", "alltoall", "two_hop"] = Field(
        "auto", description="auto: local for ep 1, two_hop over nodes of whole routing groups, else alltoall"
    )
    wire: Literal["auto", "bf16", "fp32", "fp8", "fp8_pow2"] = Field(
        "auto",
        description="what dispatched rows travel as (combine: BF16 under fp8); auto: as experts read them",
    )
    ranks_per_node: PositiveInt | None = Field(
        None, description="ranks that fast links join, for two_hop; null: those of a machine"
    )
    max_rows: PositiveInt | None = Field(
        None, description="rows (token, expert) that a rank may send or receive at a time; null: any number"
    )
    overflow: Literal["error", "rounds"] = Field(
        "error", description="beyond max_rows: stop, or go in rounds and recompute the experts in backward"
    )
    zero_stage: Literal[1, 2] = Field(1, description="2 needs pp 1")

    def findings(self) -> list[Finding]:
        """Rounds need a bound; some keys mean something to some schedules alone."""
        found = []
        if self.overflow == "rounds" and self.max_rows is None:
            found.append(Finding("overflow", "rounds needs max_rows too: how many rows a rank may hold"))
        if self.chunks is not None:
            found += self._chunks_findings(self.chunks)
        for key in ("max_live", "costs"):
            if getattr(self, key) is not None and self.schedule not in ("auto", "searched"):
                text = f"is for searched and auto, got schedule {self.schedule}; leave it null"
                found.append(Finding(key, text))
        return found

    def _chunks_findings(self, chunks: int) -> list[Finding]:
        if self.schedule == "interleaved":
            return [] if chunks > 1 else [Finding.expected("chunks", "2 or more under interleaved", chunks)]
        if self.schedule in ("auto", "searched"):
            fits = chunks == 1 or chunks % 2 == 0
            return [] if fits else [Finding.expected("chunks", "1 or an even number", chunks)]
        text = f"is for interleaved, searched and auto, got schedule {self.schedule}; leave it null"
        return [Finding("chunks", text)]


class BatchConfig(Section):
    """Sequences per step. Ref: DSV3 §4.2 (batch-size ramp)."""

    seq_len: PositiveInt = Field(description="tokens predicted per sequence")
    micro_batch_size: PositiveInt = Field(1, description="sequences a microbatch")
    global_batch_size: Annotated[int, Field(gt=0, le=10_000_000)] = Field(
        description="sequences a step, all lanes, after the ramp"
    )
    ramp_start_size: PositiveInt | None = Field(None, description="sequences a step at first; null: no ramp")
    ramp_tokens: Count = Field(0, description="tokens over which the batch grows linearly")

    def findings(self) -> list[Finding]:
        """A ramp has a start, a length, and grows."""
        if self.ramp_start_size is None:
            text = "a ramp needs ramp_start_size too; without a ramp leave ramp_tokens 0"
            return [Finding("ramp_tokens", text)] if self.ramp_tokens else []
        found = []
        if self.ramp_tokens == 0:
            found.append(Finding("ramp_start_size", "a ramp needs ramp_tokens too, the length of its growth"))
        if self.ramp_start_size > self.global_batch_size:
            wanted = f"at most global_batch_size {self.global_batch_size}"
            found.append(Finding.expected("ramp_start_size", wanted, self.ramp_start_size))
        return found


class NumericsLimits(Section):
    """Bounds on what steps with FP8 moments count; null: none. Shares are of a group's elements."""

    zeros: Fraction | None = Field(None, description="share of elements whose sqrt(v) is stored as zero")
    underflows: Fraction | None = Field(None, description="share of elements whose v is not zero, stored so")
    saturated: Fraction | None = Field(None, description="share of elements whose m is at the largest code")
    stalled: Fraction | None = Field(None, description="share of elements whose v changed, its code not")
    nonfinite: Fraction | None = Field(None, description="share of elements whose v is stored as NaN")
    largest_update: PositiveFloat | None = Field(None, description="largest update, in learning rates")


class NumericsConfig(Section):
    """The report on FP8 moments: how often, and what is too much."""

    every: Count = Field(10, description="steps between reports; 0: none")
    warn: NumericsLimits = Field(
        NumericsLimits(underflows=0.01, saturated=0.01, largest_update=10.0),
        description="beyond these: a warning",
    )
    stop: NumericsLimits = Field(NumericsLimits(nonfinite=0.0), description="beyond these: the run ends")


class OptimConfig(Section):
    """AdamW and its storage. Ref: DSV3 §4.2; FP8 moments go beyond the report."""

    peak_lr: PositiveFloat = Field(2.2e-4, description="learning rate after the warm-up")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="decay of the two moments")
    eps: PositiveFloat = Field(1e-8, description="added to the root of the second moment")
    weight_decay: NonNegative = Field(0.1, description="of matrices, times the learning rate, a step")
    grad_clip: NonNegative = Field(1.0, description="largest global gradient norm; 0 turns clipping off")
    moments: Literal["fp32", "bf16", "fp8"] = Field("bf16", description="how the two moments are stored")
    numerics: NumericsConfig = NumericsConfig()

    def findings(self) -> list[Finding]:
        """A beta of 1 would divide by zero in the bias correction."""
        return [
            Finding.expected(f"betas.{i}", "less than 1", f"{beta:g}")
            for i, beta in enumerate(self.betas)
            if beta == 1.0
        ]


class RecipeConfig(Section):
    """Schedules keyed to tokens. Ref: DSV3 §4.2.

    The learning rate has five segments: linear warm-up over `warmup_steps` steps, constant to
    `constant_until_tokens`, cosine from peak to `min_lr_ratio` x peak over `cosine_tokens`,
    constant for `tail_tokens`, then `final_lr_ratio` x peak to the end.
    """

    warmup_steps: Count = Field(2000, description="steps in which the learning rate rises to its peak")
    constant_until_tokens: Count | None = Field(None, description="null: constant to the end")
    cosine_tokens: Count = Field(0, description="tokens over which it falls from the peak to min_lr_ratio")
    min_lr_ratio: Fraction = Field(0.1, description="of peak, where the cosine ends")
    tail_tokens: Count = Field(0, description="tokens at min_lr_ratio, before final_lr_ratio")
    final_lr_ratio: Fraction = Field(7.3e-6 / 2.2e-4, description="of peak, after the tail")
    bias_gamma: NonNegative = Field(0.001, description="step of the routing bias")
    bias_until_tokens: Count | None = Field(None, description="after this the bias stands still; null: never")
    balance_alpha: NonNegative = Field(1e-4, description="weight of the sequence-wise balance loss")
    mtp_lambda: NonNegative = Field(0.3, description="weight of the MTP loss at first")
    mtp_lambda_final: NonNegative = Field(0.1, description="weight of the MTP loss after mtp_switch_tokens")
    mtp_switch_tokens: Count | None = Field(None, description="null: mtp_lambda to the end")

    def findings(self) -> list[Finding]:
        """The later segments of the learning rate need the point where the first one ends."""
        if self.constant_until_tokens is not None:
            return []
        text = "has no effect while constant_until_tokens is null: set both or neither"
        return [Finding(key, text) for key in ("cosine_tokens", "tail_tokens") if getattr(self, key)]


class TrainConfig(Section):
    """How long to train and what to do on the way."""

    total_steps: PositiveInt | None = Field(None, description="stop after this many steps")
    total_tokens: PositiveInt | None = Field(None, description="stop after this many tokens")
    eval_every: Count = Field(100, description="steps between validations; 0: only at the end")
    eval_sequences: PositiveInt = Field(
        64,
        description="validation sequences, the same ones each time; more where lanes must be filled evenly",
    )
    sample_every: Count = Field(0, description="steps between text samples; 0: only at the end")
    sample_prompt: str = Field("def ", description="what samples continue")
    sample_tokens: PositiveInt = Field(200, description="tokens of a sample")
    checkpoint_every: Count = Field(200, description="steps between checkpoints; 0: only at the end")
    keep_checkpoints: PositiveInt = Field(2, description="older ones are removed")
    log_every: PositiveInt = Field(1, description="steps between console lines in a pipe or file")
    peer_timeout_s: PositiveFloat = Field(600.0, description="a collective that takes longer ends the run")
    skip_updates: tuple[PositiveInt, ...] = Field(
        (), description="steps, from 1, whose update is not applied, as if their gradient were not finite"
    )
    watchdog_s: PositiveFloat = Field(
        60.0, description="a rank so long in one phase of a program: every rank's action is printed"
    )
    init_from: str | None = Field(
        None,
        description="checkpoint or run folder whose weights a new run begins with; null: drawn at random",
    )
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None, description="decay of the average of weights kept in host memory; null: none"
    )


class RunConfig(Section):
    """Everything that a run is made of."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = Field(
        "run", description="of the run and its folder"
    )
    out_dir: str = Field("runs", description="run folders are made here, as out_dir/name")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        1234, description="of weights, order of data and samples; the same one gives the same run"
    )
    precision: Literal["fp32", "bf16", "fp64", "fp8"] = Field(
        "bf16", description="dtype of weights and activations; fp8: BF16, and products in FP8"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs where there are any")
    model: ModelConfig
    layout: LayoutConfig = LayoutConfig()
    batch: BatchConfig
    recompute: RecomputeConfig = RecomputeConfig()
    fp8: Fp8Config = Fp8Config()
    optim: OptimConfig = OptimConfig()
    recipe: RecipeConfig = RecipeConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    metrics: MetricsConfig = MetricsConfig()
    reliability: ReliabilityConfig = ReliabilityConfig()
    guard: GuardConfig = GuardConfig()
    alerts: AlertsConfig = AlertsConfig()
