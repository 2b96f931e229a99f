"""Back to the newest checkpoint within the running process, and on past the data that led astray.

    steps     ...  8 | 9  10  11  12* 13  14 | 15 ...        12*: the loss that stands out
    data      ... s8 | ------- passed over ------- |
                     ^ checkpoint                  ^ what step 9 reads now

Passed over is everything from the checkpoint to the spike, and `guard.spike_skip_steps` steps more: which of
these batches was to blame is not known, for a spike shows some steps after its cause. The same batches in
another order were rejected: they would lead to the same place. Decided from numbers that all ranks share, and
a clean run with the same `data.skip` from its beginning takes the same bits.
"""

from moe_runtime.checkpoint.folder import Checkpoint
from moe_runtime.config.derive import sequences_before
from moe_runtime.data.skipped import SkippedData
from moe_runtime.errors import StateLost
from moe_runtime.metrics.recorder import Recorder
from moe_runtime.train.checkpoints import RunCheckpoints
from moe_runtime.train.guard.integrity import Integrity
from moe_runtime.train.saving import TrainingState, load_state


class RollBack:
    """Takes a run back to its newest checkpoint; every method is a collective call of all ranks.

    Args:
        checkpoints: of the run; one that is being written is waited for.
        state: is overwritten.
        integrity: learns that it was.
        recorder: loses the records of the steps that are taken back.
    """

    def __init__(
        self, checkpoints: RunCheckpoints, state: TrainingState, integrity: Integrity, recorder: Recorder
    ) -> None:
        self.checkpoints, self.state, self.integrity, self.recorder = checkpoints, state, integrity, recorder

    def past_data(self, step: int) -> int | None:
        """For a loss spike after `step` steps: back, and on past the data. None: there is no checkpoint.

        Raises:
            CheckpointError: the checkpoint cannot be loaded.
        """
        checkpoint = self._newest()
        if checkpoint is None:
            self.recorder.tell("no_roll_back", step, "no checkpoint to roll back to; training goes on")
            return None
        guard = self.state.guard
        roll_backs, read = guard.roll_backs + 1, guard.skipped_data
        back = self._load(checkpoint)
        guard.roll_backs = roll_backs
        self._tell(step, back, self._pass_data(back, step, read))
        return back

    def same_data(self, step: int, damage: str) -> int:
        """For damaged state after `step` steps: back, and the same data again.

        Raises:
            CheckpointError: the checkpoint cannot be loaded.
            StateLost: there is none; the launcher begins anew.
        """
        checkpoint = self._newest()
        if checkpoint is None:
            raise StateLost(
                f"step {step}: {damage}: expected a checkpoint to take the state from, got none yet; "
                "the same command begins anew"
            )
        back = self._load(checkpoint)
        self._tell(step, back, "the same data comes again")
        return back

    def _newest(self) -> Checkpoint | None:
        self.checkpoints.settle()
        return self.checkpoints.saver.store.latest_good().checkpoint

    def _load(self, checkpoint: Checkpoint) -> int:
        if self.state.ema is not None:
            self.state.ema.join()  # it reads the weights that are overwritten now
        back = load_state(self.state, checkpoint)
        self.integrity.take()
        return back

    def _pass_data(self, back: int, step: int, read: SkippedData) -> str:
        """Skip what was read between the steps `back` and `step`, and what the config adds; says so.

        Args:
            read: what was passed over then. A second spike after one checkpoint is of other data than the
                first, which the checkpoint itself knows nothing of.
        """
        config, layout = self.state.runtime.config, self.state.runtime.layout
        guard, last_step = self.state.guard, step + config.guard.spike_skip_steps
        first = guard.skipped_data.number(sequences_before(config, layout, back))
        end = read.number(sequences_before(config, layout, last_step))
        guard.skipped_data = guard.skipped_data.with_range(first, end - first)
        return f"sequences {first} to {end - 1} are passed over"

    def _tell(self, step: int, back: int, what: str) -> None:
        self.recorder.roll_back(back)
        message = f"rolled back to step {back}: {what}"
        ranges = [list(part) for part in self.state.guard.skipped_data.ranges]
        self.recorder.tell("roll_back", step, message, to_step=back, data_skip=ranges)
