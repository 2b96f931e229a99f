"""How AdamW's two moments are stored between steps: FP32, BF16 or FP8.

    kind   exp_avg (m)               exp_avg_sq (v)              bytes a parameter
    fp32   as the parameter          as the parameter            8
    bf16   BF16, nearest             BF16, nearest               4
    fp8    m / sqrt(v) in E4M3,      sqrt(v) in UE5M3,           2.008
           stochastic                stochastic, block scale

The arithmetic is always that of the parameter's type: a step reads a window of both moments in full
precision, updates them, updates the parameters from the unrounded values, and stores them again.

FP8. The square root of v has one power-of-two scale per block of 128 consecutive elements of the flat
tensor; m is stored in units of the decoded sqrt(v). All of it decodes exactly, and encoding again at
the same block boundaries loses nothing. What makes it safe, each point measured in the tests:

- sqrt(v), not v: half the exponent span, so that gradients of 1 : 10^5 within a block do not
  underflow, where linear v fails at 1 : 10^3.
- v is always rounded stochastically. Under nearest rounding a decay of a few per cent rounds back to
  the same code while growth passes: stored sqrt(v) stays 16 times too large after gradients drop
  tenfold at beta2 0.95.
- m / sqrt(v), not m under a scale of its own. The quotient is what the update is made of; it is about
  0.2 for any element, and at most (1 - beta1) / sqrt((1 - beta2) (1 - beta1^2 / beta2)) by the
  Cauchy-Schwarz inequality (1.2 for the report's betas, 7.3 for (0.9, 0.999)). So m needs no range,
  and its error does not grow with the spread of its block: 2 % of sqrt(v) where m under a block scale
  has 14 % (lognormal gradients, sigma 3) and updates up to three times too large at beta2 0.999. And
  m is zero where v is zero: m / (0 + eps) cannot happen.
- m is rounded stochastically too. Nearest is a third more exact on a busy element, but a decay rounds
  back on one without gradients: it then moved 36 times too far at betas (0.95, 0.98).
- Scales never fall below 2^-46, so that sqrt(v) is zero or at least 2^-63 (1.1e-19) and all decoded
  values, v too, are normal FP32 numbers: devices that flush subnormals agree with those that do not, and
  v in FP32, as checkpoints may hold it, has the very square root that was stored.

Codes have names of their own and are [num_blocks, 128], scales [num_blocks, 1]. DeepSpeed hands out what
lies under `exp_avg` as values: stages 1 and 2 if it has the shape of the flat partition, stage 3 whatever
it is. Under `exp_avg` and `exp_avg_sq` there are only ever true values.

Rejected besides: a scale per tensor (one outlier row hides the rest); COAT's per-block exponent (three
FP32 numbers a block, and exact zeros wreck its range).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from moe_comm.wire.formats import (
    E4M3,
    FP32_INFINITY,
    FP32_MAGNITUDE,
    FP32_MANTISSA_BITS,
    FRACTION_BITS,
    UE5M3,
    decode,
    encode_stochastic,
)
from torch import Tensor
from torch.nn.functional import pad

from moe_runtime.errors import ConfigError
from moe_runtime.optim.counter_rng import NoiseKey, random_bits, second_draw

STEP = "step"
MEAN, SQUARE = "exp_avg", "exp_avg_sq"
RATIO_CODES, ROOT_CODES, ROOT_SCALE = "exp_avg_codes", "exp_avg_sq_codes", "exp_avg_sq_scale"
BLOCK = 128
SCALE_BIAS = 127
MIN_SCALE_EXPONENT = -46
SMALLEST_NORMAL = 2.0**-126
FP32_MANTISSA = (1 << FP32_MANTISSA_BITS) - 1
# Mantissa of UE5M3's largest value, as FP32 has it.
MAX_ROOT_MANTISSA = (UE5M3.max_code << (FP32_MANTISSA_BITS - UE5M3.mantissa_bits)) & FP32_MANTISSA
# m / sqrt(v) is multiplied by 2^4 before it is cast to E4M3: saturates at 28, quantum 2^-13.
RATIO_EXPONENT = 4

State = dict[str, Tensor]
_VALUES = {STEP, MEAN, SQUARE}


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

    def read(self, state: State, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(m, v) of a window, 1-D, FP32 or wider; may be views of the state."""
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


@dataclass(frozen=True)
class FullMoments:
    """Both moments in the parameter's own type and shape; windows are views, so writing is nothing."""

    kind: str = "fp32"
    is_direct: bool = True

    def blank(self, param: Tensor) -> State:
        """Zeros like the parameter."""
        return {
            name: torch.zeros_like(param, memory_format=torch.contiguous_format) for name in (MEAN, SQUARE)
        }

    def holds(self, state: State, param: Tensor) -> bool:
        """True for tensors of the parameter's type and size."""
        return set(state) == _VALUES and all(
            state[name].dtype == param.dtype and state[name].numel() == param.numel()
            for name in (MEAN, SQUARE)
        )

    def read(self, state: State, start: int, stop: int) -> tuple[Tensor, Tensor]:
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
        return {
            name: torch.zeros(param.shape, dtype=torch.bfloat16, device=param.device)
            for name in (MEAN, SQUARE)
        }

    def holds(self, state: State, param: Tensor) -> bool:
        """True for BF16 tensors of the parameter's size."""
        return set(state) == _VALUES and all(
            state[name].dtype == torch.bfloat16 and state[name].numel() == param.numel()
            for name in (MEAN, SQUARE)
        )

    def read(self, state: State, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """FP32 copies."""
        mean, square = (state[name].view(-1)[start:stop].to(torch.float32) for name in (MEAN, SQUARE))
        return mean, square

    def write(self, state: State, start: int, mean: Tensor, square: Tensor, noise: Noise) -> None:
        """Round to nearest."""
        for name, values in ((MEAN, mean), (SQUARE, square)):
            state[name].view(-1)[start : start + values.numel()].copy_(values)


@dataclass(frozen=True)
class Fp8Moments:
    """sqrt(v) in UE5M3 with a power-of-two scale a block, m / sqrt(v) in E4M3; see the top of the file.

    State: exp_avg_codes, exp_avg_sq_codes uint8 [num_blocks, 128]; exp_avg_sq_scale uint8
    [num_blocks, 1], exponents plus 127. The tail of the last block holds zeros.
    """

    kind: str = "fp8"
    is_direct: bool = False

    def blank(self, param: Tensor) -> State:
        """Zero codes and zero scales: decodes to exact zeros."""
        return {
            name: torch.zeros(shape, dtype=torch.uint8, device=param.device)
            for name, shape in _fp8_shapes(param).items()
        }

    def holds(self, state: State, param: Tensor) -> bool:
        """True for codes and scales that fit the parameter's number of blocks, and nothing besides."""
        shapes = _fp8_shapes(param)
        return set(state) == {STEP, *shapes} and all(
            state[name].dtype == torch.uint8 and state[name].shape == shape for name, shape in shapes.items()
        )

    def read(self, state: State, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Decode a window to FP32."""
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        root = _decode_roots(state[ROOT_CODES][blocks], state[ROOT_SCALE][blocks])
        mean = decode(state[RATIO_CODES][blocks], E4M3).mul_(root).mul_(2.0**-RATIO_EXPONENT)
        square = root.mul_(root)
        return mean.view(-1)[: stop - start], square.view(-1)[: stop - start]

    def write(self, state: State, start: int, mean: Tensor, square: Tensor, noise: Noise) -> None:
        """Encode a window; m becomes zero where sqrt(v) did."""
        roots, means = rounded_sqrt(_as_blocks(square)), _as_blocks(mean)
        bits = random_bits(noise.key, noise.offset + start, roots.numel(), roots.device).view_as(roots)
        root_codes, scales = _encode_roots(roots, lifted(bits))
        # Units of the root as it will be read; where that is zero, the quotient is masked afterwards.
        units = _decode_roots(root_codes, scales - RATIO_EXPONENT).clamp_(min=SMALLEST_NORMAL)
        ratio_codes = encode_stochastic(means / units, E4M3, second_draw(bits))
        blocks = slice(start // BLOCK, start // BLOCK + roots.shape[0])
        state[ROOT_CODES][blocks], state[ROOT_SCALE][blocks] = root_codes, scales
        state[RATIO_CODES][blocks] = ratio_codes.mul_(root_codes.clamp_(max=1))


def rounded_sqrt(values: Tensor) -> Tensor:
    """Square root rounded to nearest as IEEE 754 says, fresh.

    torch's on the CPU is MKL's, which misses the nearest FP32 value for 1 in 150. By way of double it is
    exact: a root of 24 bits is never so near the middle of two that a last place of double decides.
    """
    return values.to(torch.float64).sqrt_().to(values.dtype)


def lifted(bits: Tensor) -> Tensor:
    """Noise under which sqrt(v) is rounded up a little more often than its fraction says, fresh.

    With an exact probability f the mean of stored sqrt(v) is right, but what the update divides by it is
    not: 1 / x bends, and the spread that rounding makes around the average (11 to 17 %) raises the mean of
    exact / stored to 1.007 to 1.015, which acts as a higher learning rate. f + f (1 - f) 3/128 brings it to
    0.997 to 1.005, at beta2 0.95 and 0.999, for Gaussian and heavy-tailed gradients. It is done to the
    noise, in 12 leading bits, so that it is the same integers everywhere; zero noise and full noise stay,
    so a value that the format holds still never moves.
    """
    threshold = bits & ((1 << FRACTION_BITS) - 1)
    leading = threshold >> (FRACTION_BITS - 12)
    return leading.mul(4095 - leading).mul_(3).bitwise_right_shift_(4).add_(threshold)


def _fp8_shapes(param: Tensor) -> dict[str, tuple[int, int]]:
    blocks = -(-param.numel() // BLOCK)
    return {RATIO_CODES: (blocks, BLOCK), ROOT_CODES: (blocks, BLOCK), ROOT_SCALE: (blocks, 1)}


def _as_blocks(values: Tensor) -> Tensor:
    """[numel] in any float type as float32 [num_blocks, BLOCK], zeros at the tail; a view if it can be."""
    missing = -values.numel() % BLOCK
    values = values.to(torch.float32)
    return (pad(values, (0, missing)) if missing else values).view(-1, BLOCK)


def _encode_roots(roots: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [num_blocks, BLOCK] and biased scale exponents [num_blocks, 1], both uint8.

    The scale is the smallest power of two under which the block's largest root does not saturate:
    its exponent, one more where the mantissa exceeds that of UE5M3's largest value.
    """
    # Of NaN the sign is taken off, and its bits count as those of infinity.
    largest = roots.amax(dim=1, keepdim=True).view(torch.int32) & FP32_MAGNITUDE
    largest.clamp_(max=FP32_INFINITY)
    exponent = (largest + (FP32_MANTISSA - MAX_ROOT_MANTISSA)).bitwise_right_shift_(FP32_MANTISSA_BITS)
    scale = exponent.sub_(UE5M3.max_exponent).clamp_(min=SCALE_BIAS + MIN_SCALE_EXPONENT)
    inverse = (2 * SCALE_BIAS - scale).bitwise_left_shift_(FP32_MANTISSA_BITS).view(torch.float32)
    return encode_stochastic(roots.mul_(inverse), UE5M3, bits), scale.to(torch.uint8)


def _decode_roots(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 [num_blocks, BLOCK]; a scale of 0 (an untouched block) is 0."""
    power = scale.to(torch.int32).bitwise_left_shift_(FP32_MANTISSA_BITS).view(torch.float32)
    return decode(codes, UE5M3).mul_(power)
