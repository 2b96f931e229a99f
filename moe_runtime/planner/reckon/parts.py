"""What each stage of a pipeline holds of the model, and which ranks hold which stages."""

from dataclasses import dataclass

from moe_runtime.config.layout import ResolvedLayout
from moe_runtime.config.schema import ModelConfig


@dataclass(frozen=True)
class StageParts:
    """Of one stage.

    Args:
        dense, moe: layers with a dense FFN and with experts, without MTP modules.
        embedding: the table is here.
        head: the final norm, the head and the loss are here.
        mtp: MTP modules here; each also uses the embedding and the head.
    """

    dense: int
    moe: int
    embedding: bool
    head: bool
    mtp: int


def stage_parts(model: ModelConfig, layout: ResolvedLayout) -> tuple[StageParts, ...]:
    """The parts of each stage of one direction, in order."""
    last = len(layout.layers) - 1
    return tuple(
        StageParts(
            dense=sum(layer < model.num_dense_layers for layer in layers),
            moe=sum(layer >= model.num_dense_layers for layer in layers),
            embedding=stage == 0,
            head=stage == last,
            mtp=model.mtp_depth if stage == last else 0,
        )
        for stage, layers in enumerate(layout.layers)
    )


def stages_of(layout: ResolvedLayout, rank: int) -> tuple[int, ...]:
    """Distinct stages that a pipeline rank holds, in order."""
    return tuple(sorted({stage for way in layout.placement for stage, at in enumerate(way) if at == rank}))
