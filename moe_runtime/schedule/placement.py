"""Which rank holds which stage: three shapes, each a row of ranks a direction.

looped    ranks 0 1 2 3 | 0 1 2 3    the stages go round the ranks, once or more
folded    ranks 0 1 2 3 3 2 1 0      a V: the last rank turns round, the first has both ends
mirrored  ranks 0 1 2 3 / 3 2 1 0    two directions, so every rank holds two stages of the same model
"""

Placement = tuple[tuple[int, ...], ...]  # placement[direction][stage] is the pipeline rank


def looped(num_ranks: int, num_chunks: int = 1) -> Placement:
    """Stage s is on rank s % P; there are `num_chunks` x P stages."""
    return (tuple(range(num_ranks)) * num_chunks,)


def folded(num_ranks: int) -> Placement:
    """Rank r holds stage r and stage 2P-1-r."""
    return ((*range(num_ranks), *reversed(range(num_ranks))),)


def mirrored(num_ranks: int) -> Placement:
    """Rank r holds stage r of direction 0 and stage P-1-r of direction 1."""
    forwards = tuple(range(num_ranks))
    return (forwards, forwards[::-1])
