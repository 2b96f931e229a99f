"""Is a failed attempt worth another one, and after what wait?

A run that makes progress may fail as often as it likes: large runs do, several times a day. What counts
is failures in a row that reach no new checkpoint. Two kinds of failure would only come again and end the
run at once: a user's mistake, and a defect that shows for the second time at the same step with the same
words. (The first time it may have been the machine.) An alert that ends a run is the user's own word.
"""

from dataclasses import dataclass

from moe_runtime.cli.supervise.outcome import Outcome

_LONGEST_WAIT_S = 60.0
_USER_MISTAKE, _PEER_LOST, _ALERT = 2, 3, 5


@dataclass(frozen=True)
class Decision:
    """Whether to go on.

    Args:
        restart: make another attempt.
        wait_s: before it.
        reason: for people.
    """

    restart: bool
    wait_s: float = 0.0
    reason: str = ""


class RestartPolicy:
    """Judges failures of one run, one after the other.

    Args:
        restarts: in a row without a new checkpoint; 0: none at all.
        back_off_s: wait before the second restart in a row; it doubles with each, up to 60 s. The first
            comes at once.
        checkpoint_step: of the newest checkpoint when the run begins; 0 if there is none.
    """

    def __init__(self, restarts: int, back_off_s: float, checkpoint_step: int) -> None:
        self._restarts, self._back_off_s = restarts, back_off_s
        self._checkpoint_step = checkpoint_step
        self._in_a_row = 0
        self._last: tuple[int, str] | None = None

    def judge(self, outcome: Outcome, step: int, checkpoint_step: int) -> Decision:
        """Decide after a failure.

        Args:
            outcome: why the attempt failed.
            step: steps that were done when it did.
            checkpoint_step: of the newest checkpoint now.
        """
        if outcome.code in (_USER_MISTAKE, _ALERT) or self._restarts == 0:
            return Decision(restart=False)
        if checkpoint_step > self._checkpoint_step:
            self._checkpoint_step, self._in_a_row = checkpoint_step, 0
        defect = (step, (outcome.cause.strip().splitlines() or [""])[-1])
        repeats = outcome.code != _PEER_LOST and defect == self._last
        self._last = defect
        if repeats:
            return Decision(restart=False, reason="the same defect a second time at the same step")
        if self._in_a_row == self._restarts:
            reason = f"{self._restarts} restarts in a row reached no new checkpoint (reliability.restarts)"
            return Decision(restart=False, reason=reason)
        self._in_a_row += 1
        wait_s = self._back_off_s * 2.0 ** (self._in_a_row - 2) if self._in_a_row > 1 else 0.0
        reason = f"restart {self._in_a_row} of {self._restarts} without a new checkpoint"
        return Decision(restart=True, wait_s=min(wait_s, _LONGEST_WAIT_S), reason=reason)
