"""How often a copy of a run gets a picture."""

_PART = 0.05  # of the run so far, until the next picture


class Spacing:
    """Which steps get a picture: the further apart the longer the run, a few hundred in all."""

    def __init__(self) -> None:
        self._next = 0.0

    def admits(self, step: int) -> bool:
        """Whether `step`, later than all before, gets one."""
        if step < self._next:
            return False
        self._next = step * (1 + _PART)
        return True
