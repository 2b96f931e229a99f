"""How AdamW's two moments are stored between steps: FP32, BF16 or FP8.

    kind   exp_avg (m)               exp_avg_sq (v)              bytes a parameter
    fp32   as the parameter          as the parameter            8
    bf16   BF16, nearest             BF16, nearest               4
    fp8    E4M3, stochastic          sqrt(v) in UE5M3, stoch.    2.016

The arithmetic is always that of the parameter's type: a step reads a window of both moments in full
precision, updates them, updates the parameters from the unrounded values, and stores them again.

FP8. Each moment has one power-of-two scale per block of 128 consecutive elements of the flat tensor,
so that decoding and encoding again at the same block boundaries loses nothing. What makes it safe:

- The square root of v is stored: half the exponent span, so that gradients of 1 : 10^5 within a block
  do not underflow, where linear v already fails at 1 : 10^3.
- v is always rounded stochastically. Under nearest rounding a decay of a few per cent rounds back to
  the same code while growth passes: stored sqrt(v) ends at 13 to 16 times its true value after
  gradients drop tenfold (beta2 0.95).
- m is rounded stochastically too, with a second draw from the same random bits. Nearest would be
  somewhat more exact for large elements; but below five quanta a decay by 0.9 rounds back, so that
  m stands still while v falls, and the update grows without any gradient (measured in the tests).
- |m| <= R sqrt(v) holds for exact AdamW by the Cauchy-Schwarz inequality (`mean_bound`) and is
  imposed on what is read, so no rounding of either can make an update that exact AdamW could not
  make. In particular m reads as zero where v is zero: m / (0 + eps) never happens.
- Scales never fall below 2^-100, so all decoded values are normal FP32 numbers and devices that
  flush subnormals agree with those that do not.

Payloads are [num_blocks, 128] and scales [num_blocks, 1]: DeepSpeed hands out state tensors that have
the shape of the flat partition as if they were values, and these must not look like one.

Rejected: linear v; nearest rounding; a scale per tensor (one outlier row hides the rest); COAT's
per-block exponent (three FP32 a block, and exact zeros wreck its range).
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_runtime.errors import ConfigError
from moe_runtime.fp8.formats import E4M3, UE5M3, Float8Format, decode, encode_stochastic
from moe_runtime.optim.counter_rng import NoiseKey, random_bits, second_draw

MEAN, SQUARE = "exp_avg", "exp_avg_sq"
MEAN_SCALE, ROOT_SCALE = "exp_avg_scale", "exp_avg_sq_scale"
BLOCK = 128
SCALE_BIAS = 127
MIN_SCALE_EXPONENT = -100

State = dict[str, Tensor]


@dataclass(frozen=True)
class Noise:
    """Where the random bits of a flat tensor come from.

    Args:
        key: of this step and group.
        offset: global index of the tensor's first element.
    """

    key: NoiseKey
    offset: int


class MomentStorage(Protocol):
    """A way to keep both moments of one parameter in a dict of tensors.

    Windows are half-open ranges of the flattened parameter; `start` is a multiple of BLOCK.
    """

    @property
    def kind(self) -> str:
        """Its name in the config."""
        ...

    @property
    def is_direct(self) -> bool:
        """True if windows are the state itself, so that reading takes no memory."""
        ...

    def blank(self, param: Tensor) -> State:
        """State of a parameter that never had a gradient: zeros."""
        ...

    def holds(self, state: State, param: Tensor) -> bool:
        """True if `state` is in this storage's form and fits `param`."""
        ...

    def read(self, state: State, start: int, stop: int, bound: float = math.inf) -> tuple[Tensor, Tensor]:
        """(m, v) of a window, 1-D, FP32 or wider; may be views of the state. |m| <= bound sqrt(v)."""
        ...

    def write(self, state: State, start: int, mean: Tensor, square: Tensor, noise: Noise) -> None:
        """Store a window."""
        ...


def moment_storage(kind: str) -> MomentStorage:
    """The storage called fp32, bf16 or fp8.

    Raises:
        ConfigError: another name.
    """
    storages: tuple[MomentStorage, ...] = (FullMoments(), Bf16Moments(), Fp8Moments())
    for storage in storages:
        if storage.kind == kind:
            return storage
    raise ConfigError(f"optim.moments: expected fp32, bf16 or fp8, got {kind!r}")


def mean_bound(betas: tuple[float, float]) -> float:
    """R, the largest |m| / sqrt(v) that exact Adam can reach; infinite unless beta1^2 < beta2.

    With a = beta1^2 / beta2, m = (1 - beta1) sum beta1^i g_i and v = (1 - beta2) sum beta2^i g_i^2 give
    |m| <= (1 - beta1) sqrt(v) / sqrt((1 - beta2) (1 - a)). It is 1.17 for the report's (0.9, 0.95).
    """
    beta1, beta2 = betas
    if beta1 * beta1 >= beta2:
        return math.inf
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1 * beta1 / beta2))


@dataclass(frozen=True)
class FullMoments:
    """Both moments in the parameter's own type and shape; windows are views, so writing is nothing."""

    kind: str = "fp32"
    is_direct: bool = True

    def blank(self, param: Tensor) -> State:
        """Zeros like the parameter."""
        return {name: torch.zeros_like(param, memory_format=torch.contiguous_format) for name in (MEAN, SQUARE)}

    def holds(self, state: State, param: Tensor) -> bool:
        """True for tensors of the parameter's type and size."""
        return all(
            state[name].dtype == param.dtype and state[name].numel() == param.numel() for name in (MEAN, SQUARE)
        )

    def read(self, state: State, start: int, stop: int, bound: float = math.inf) -> tuple[Tensor, Tensor]:
        """Views; what the caller changes in them is stored."""
        return state[MEAN].view(-1)[start:stop], state[SQUARE].view(-1)[start:stop]

    def write(self, state: State, start: int, mean: Tensor, square: Tensor, noise: Noise) -> None:
        """Copies only what is not the window itself."""
        for name, values in ((MEAN, mean), (SQUARE, square)):
            window = state[name].view(-1)[start : start + values.numel()]
            if window.data_ptr() != values.data_ptr():
                window.copy_(values)


@dataclass(frozen=True)
class Bf16Moments:
    """Both moments in BF16, nearest rounding: the report's choice, for beta2 0.95. Ref: DSV3 §3.3.3.

    At beta2 0.999 it stalls: a decay of 0.1 % is under half a step of BF16 (0.2 to 0.4 %), v no longer
    falls, and stored sqrt(v) stays four times too large after gradients drop tenfold. Use fp32 or
    fp8 there.
    """

    kind: str = "bf16"
    is_direct: bool = False

    def blank(self, param: Tensor) -> State:
        """Zeros of the parameter's shape."""
        return {name: torch.zeros(param.shape, dtype=torch.bfloat16, device=param.device) for name in (MEAN, SQUARE)}

    def holds(self, state: State, param: Tensor) -> bool:
        """True for BF16 tensors of the parameter's size."""
        return all(
            state[name].dtype == torch.bfloat16 and state[name].numel() == param.numel()
            for name in (MEAN, SQUARE)
        )

    def read(self, state: State, start: int, stop: int, bound: float = math.inf) -> tuple[Tensor, Tensor]:
        """FP32 copies."""
        mean, square = (state[name].view(-1)[start:stop].to(torch.float32) for name in (MEAN, SQUARE))
        return mean, square

    def write(self, state: State, start: int, mean: Tensor, square: Tensor, noise: Noise) -> None:
        """Round to nearest."""
        for name, values in ((MEAN, mean), (SQUARE, square)):
            state[name].view(-1)[start : start + values.numel()].copy_(values)


@dataclass(frozen=True)
class Fp8Moments:
    """m in E4M3 and sqrt(v) in UE5M3, blocks of 128 with power-of-two scales; see the top of the file.

    State: exp_avg, exp_avg_sq uint8 [num_blocks, 128] codes; exp_avg_scale, exp_avg_sq_scale uint8
    [num_blocks, 1], exponents plus 127. The tail of the last block holds zeros.
    """

    kind: str = "fp8"
    is_direct: bool = False

    def blank(self, param: Tensor) -> State:
        """Zero codes and zero scales: decodes to exact zeros."""
        blocks = -(-param.numel() // BLOCK)
        widths = {MEAN: BLOCK, MEAN_SCALE: 1, SQUARE: BLOCK, ROOT_SCALE: 1}
        return {
            name: torch.zeros(blocks, width, dtype=torch.uint8, device=param.device)
            for name, width in widths.items()
        }

    def holds(self, state: State, param: Tensor) -> bool:
        """True for codes and scales that fit the parameter's number of blocks."""
        blocks = -(-param.numel() // BLOCK)
        widths = {MEAN: BLOCK, MEAN_SCALE: 1, SQUARE: BLOCK, ROOT_SCALE: 1}
        return all(
            name in state and state[name].dtype == torch.uint8 and state[name].shape == (blocks, width)
            for name, width in widths.items()
        )

    def read(self, state: State, start: int, stop: int, bound: float = math.inf) -> tuple[Tensor, Tensor]:
        """Decode a window to FP32."""
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        root = _decode_blocks(state[SQUARE][blocks], state[ROOT_SCALE][blocks], UE5M3)
        mean = _decode_blocks(state[MEAN][blocks], state[MEAN_SCALE][blocks], E4M3)
        if math.isfinite(bound):
            largest = root * bound
            torch.clamp(mean, min=-largest, max=largest, out=mean)
        square = root.mul_(root)
        return mean.view(-1)[: stop - start], square.view(-1)[: stop - start]

    def write(self, state: State, start: int, mean: Tensor, square: Tensor, noise: Noise) -> None:
        """Encode a window; m becomes zero where sqrt(v) did."""
        roots, means = _as_blocks(square).sqrt(), _as_blocks(mean)
        blocks = slice(start // BLOCK, start // BLOCK + roots.shape[0])
        bits = random_bits(noise.key, noise.offset + start, roots.numel(), square.device).view_as(roots)
        root_codes, root_scales = _encode_blocks(roots, UE5M3, bits)
        mean_codes, mean_scales = _encode_blocks(means, E4M3, second_draw(bits))
        mean_codes.mul_(root_codes.clamp(max=1))
        state[SQUARE][blocks], state[ROOT_SCALE][blocks] = root_codes, root_scales
        state[MEAN][blocks], state[MEAN_SCALE][blocks] = mean_codes, mean_scales


def _as_blocks(values: Tensor) -> Tensor:
    """[numel] in any float type as contiguous float32 [num_blocks, BLOCK], zeros at the tail."""
    missing = -values.numel() % BLOCK
    values = values.to(torch.float32)
    return (pad(values, (0, missing)) if missing else values).view(-1, BLOCK)


def _encode_blocks(values: Tensor, fmt: Float8Format, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [num_blocks, BLOCK] and biased scale exponents [num_blocks, 1], both uint8.

    The scale is the smallest power of two under which the block's largest magnitude does not saturate.
    """
    largest = values.abs().amax(dim=1, keepdim=True).view(torch.int32)
    # Rounds the exponent up where the mantissa exceeds that of max_value (1.75 in both formats).
    exponent = (largest + (0x7FFFFF - _max_mantissa_bits(fmt))).bitwise_right_shift_(23)
    scale = exponent.sub_(fmt.max_exponent).clamp_(min=SCALE_BIAS + MIN_SCALE_EXPONENT)
    inverse = (2 * SCALE_BIAS - scale).bitwise_left_shift_(23).view(torch.float32)
    return encode_stochastic(values * inverse, fmt, bits), scale.to(torch.uint8)


def _decode_blocks(codes: Tensor, scale: Tensor, fmt: Float8Format) -> Tensor:
    """float32 [num_blocks, BLOCK]; a scale of 0 (an untouched block) is 0."""
    return decode(codes, fmt).mul_(scale.to(torch.int32).bitwise_left_shift_(23).view(torch.float32))


def _max_mantissa_bits(fmt: Float8Format) -> int:
    """FP32 mantissa field of the format's largest finite value."""
    return (fmt.max_code & ((1 << fmt.mantissa_bits) - 1)) << (23 - fmt.mantissa_bits)
