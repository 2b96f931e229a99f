"""Which numbers of ranks, microbatches and stages a rank a schedule admits, as data.

Kept apart from the builders so that a layout search can ask without building anything, and so that
every refusal has the same form: what was got, what is needed, the nearest choices that work.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """The admissible (num_ranks, num_microbatches) of one schedule.

    Args:
        rank_multiple: num_ranks is a multiple of it.
        max_ranks: largest num_ranks; None for no bound.
        microbatch_multiple: num_microbatches is a multiple of it.
        min_microbatches_per_rank: num_microbatches is at least this times num_ranks.
        num_chunks: stages a rank and direction; where they may be chosen, the number taken unless asked.
        min_chunks: smallest number to choose; None where there is no choice.
    """

    rank_multiple: int = 1
    max_ranks: int | None = None
    microbatch_multiple: int = 1
    min_microbatches_per_rank: int = 0
    num_chunks: int = 1
    min_chunks: int | None = None

    def ranks_problem(self, num_ranks: int) -> str | None:
        """Why `num_ranks` is refused, with the nearest choices; None if it is admitted."""
        nearest = _nearest(num_ranks, self.rank_multiple, self.rank_multiple, self.max_ranks)
        if num_ranks in nearest:
            return None
        upper = "" if self.max_ranks is None else f", at most {self.max_ranks}"
        need = f"{_multiple(self.rank_multiple)}at least {self.rank_multiple}{upper}"
        return f"{num_ranks} pipeline ranks; expected {need}; nearest: {_either(nearest)}"

    def microbatches_problem(self, num_ranks: int, num_microbatches: int) -> str | None:
        """Why `num_microbatches` is refused, with the nearest choices; None if it is admitted."""
        nearest = self._nearest_microbatches(num_ranks, num_microbatches)
        if num_microbatches in nearest:
            return None
        need = f"{_multiple(self.microbatch_multiple)}at least {self._min_microbatches(num_ranks)}"
        got = f"{num_microbatches} microbatches a step on {num_ranks} pipeline ranks"
        return f"{got}; expected {need}; nearest: {_either(nearest)}"

    def chunks_problem(self, num_chunks: int | None) -> str | None:
        """Why `num_chunks` is refused, with the nearest choice; None if it is admitted, as None is."""
        if num_chunks is None or num_chunks == self.num_chunks:
            return None
        if self.min_chunks is None:
            return f"{num_chunks} stages a rank and direction; expected {self.num_chunks}, and no other"
        if num_chunks < self.min_chunks:
            need = f"at least {self.min_chunks}; nearest: {self.min_chunks}"
            return f"{num_chunks} stages a rank and direction; expected {need}"
        return None

    def nearest_microbatches(self, num_ranks: int, num_microbatches: int) -> int:
        """The admissible number of microbatches nearest to the one asked for; a tie goes up.

        Args:
            num_ranks: an admissible number of ranks.
        """
        return self._nearest_microbatches(num_ranks, num_microbatches)[-1]

    def _min_microbatches(self, num_ranks: int) -> int:
        least = max(1, self.min_microbatches_per_rank * num_ranks)
        return -(-least // self.microbatch_multiple) * self.microbatch_multiple

    def _nearest_microbatches(self, num_ranks: int, num_microbatches: int) -> tuple[int, ...]:
        return _nearest(num_microbatches, self.microbatch_multiple, self._min_microbatches(num_ranks), None)


def _nearest(value: int, multiple: int, least: int, most: int | None) -> tuple[int, ...]:
    """The one or two multiples in [least, most] nearest to `value`; `least` itself is a multiple."""
    below = max(least, value // multiple * multiple)
    above = max(least, -(-value // multiple) * multiple)
    if most is not None:
        below, above = min(below, most), min(above, most)
    if value - below == above - value and below != above:
        return (below, above)
    return (below,) if value - below < above - value else (above,)


def _multiple(of: int) -> str:
    return "" if of == 1 else f"a multiple of {of}, "


def _either(choices: tuple[int, ...]) -> str:
    return " or ".join(str(choice) for choice in choices)
