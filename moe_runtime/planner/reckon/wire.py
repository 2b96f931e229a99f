"""What a row weighs while it travels: the records and messages of dispatch, combine and their backwards.

Written from the description of the exchanges, with none of the dispatchers' code: that their own counters say
the same, to the byte, is then a check of both. A record is laid out as a C struct would be: each field at a
multiple of its item size, the whole rounded up to the largest.

    dispatch             row as coded, and beside it   alltoall  the weight of its choice
                                                       two_hop   all choices of the token, and their weights
    combine              row; in BF16 where the way out is FP8, for what arrives is summed
    backward of combine  row as coded
    backward of dispatch row as in combine, and the gradients of the weights beside it
    before a dispatch    a message of counts to every other rank

Ref: DSV3 §3.2.2, §3.3.3
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moe_runtime.config.schema import ModelConfig, RunConfig

Kind = Literal["alltoall", "two_hop"]
Operation = Literal["dispatch", "combine", "combine_backward", "dispatch_backward"]
OPERATIONS: tuple[Operation, ...] = ("dispatch", "combine", "combine_backward", "dispatch_backward")
# Rows travel from tokens to experts, or back.
OUTWARD: frozenset[Operation] = frozenset({"dispatch", "combine_backward"})

WORD = 8  # bytes of a number in a message of counts
HEADER_WORDS = 8  # before the counts
CHUNKS = 4  # parts of a dispatch in two hops, with counts of their own
TILE = 128  # columns that share a scale
ITEM_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp8": 2}  # of activations, by precision
_SHORT_IDS = 2**15 - 1

Field = tuple[int, int]


def record_bytes(fields: Sequence[Field]) -> int:
    """Size of a record of (columns, item size) fields."""
    end = 0
    for columns, size in fields:
        end = -(-end // size) * size + columns * size
    largest = max(size for _, size in fields)
    return -(-end // largest) * largest


def row_fields(wire: str, hidden: int, item: int) -> list[Field]:
    """Fields of a row in a wire format.

    Args:
        wire: one of the formats of `layout.wire`.
        item: bytes of an activation.
    """
    match wire:
        case "fp8":
            return [(hidden, 1), (-(-hidden // TILE), 4)]
        case "fp8_pow2":
            return [(hidden, 1), (-(-hidden // TILE), 1)]
    return [(hidden, {"auto": item, "bf16": 2, "fp32": 4}[wire])]


@dataclass(frozen=True)
class Record:
    """Bytes of one row on the wire.

    Args:
        payload: the row, scales included.
        beside: expert ids, weights, padding.
    """

    payload: int
    beside: int

    @property
    def size(self) -> int:
        """All of it."""
        return self.payload + self.beside


@dataclass(frozen=True)
class RowFormat:
    """What decides about the size of records.

    Args:
        kind: of dispatcher.
        wire: format of rows on the way out; never the short form "auto" of an FP8 run.
        hidden, top_k, num_experts: of the model.
        item, weight_item: bytes of an activation and of a gate weight.
    """

    kind: Kind
    wire: str
    hidden: int
    top_k: int
    num_experts: int
    item: int = 2
    weight_item: int = 4

    def record(self, operation: Operation) -> Record:
        """The records of an operation."""
        summed = "bf16" if self.wire in ("fp8", "fp8_pow2") else self.wire
        row = row_fields(self.wire if operation in OUTWARD else summed, self.hidden, self.item)
        payload = sum(columns * size for columns, size in row)
        return Record(payload, record_bytes([*row, *self._beside(operation)]) - payload)

    def counts_bytes(self, ep: int) -> int:
        """One message of counts, from any rank to any other, before each dispatch."""
        counts = 2 * CHUNKS if self.kind == "two_hop" else self.num_experts // ep
        return (HEADER_WORDS + ep + counts) * WORD

    def _beside(self, operation: Operation) -> list[Field]:
        if operation not in ("dispatch", "dispatch_backward"):
            return []
        if self.kind == "alltoall":
            return [(1, self.weight_item)]
        ids = (self.top_k, 2 if self.num_experts <= _SHORT_IDS else 4)
        weights = (self.top_k, self.weight_item)
        return [ids, weights] if operation == "dispatch" else [weights]


def row_format(config: RunConfig, kind: Kind) -> RowFormat:
    """The records of a run."""
    model = config.model
    item = ITEM_BYTES[config.precision]
    weight_item = max(item, 4)  # a router computes in at least FP32
    return RowFormat(
        kind, wire_of(config), model.hidden_size, model.top_k, model.num_experts, item, weight_item
    )


def wire_of(config: RunConfig) -> str:
    """What `layout.wire` means: rows go as FP8 tiles where experts multiply those."""
    high = {"moe", "moe.experts"} & set(config.fp8.keep_high)
    if config.layout.wire == "auto" and config.precision == "fp8" and config.fp8.fprop == "fp8" and not high:
        return "fp8_pow2"
    return config.layout.wire


def dispatcher_kind(model: ModelConfig, wanted: str, ep: int, ranks_a_node: int) -> Kind | None:
    """The dispatcher that a layout gets; None: experts are all on the rank.

    Two hops need several whole nodes of whole routing groups.

    Args:
        wanted: of the layout, `auto` among them.
        ranks_a_node: joined by fast links.
    """
    if ep == 1 or wanted == "local":
        return None
    nodes = ep // ranks_a_node
    suits = nodes > 1 and ep % ranks_a_node == 0 and model.num_groups % nodes == 0
    return "two_hop" if wanted == "two_hop" or (wanted == "auto" and suits) else "alltoall"
