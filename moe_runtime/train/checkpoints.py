"""The checkpoints that a run takes: begun when due, told when they are on disk, waited for at the end."""

import time

from moe_runtime.checkpoint.background import BackgroundSaver, SaveReport
from moe_runtime.checkpoint.store import SaveFailed
from moe_runtime.checkpoint.weights import weights_to_save
from moe_runtime.config.derive import tokens_before
from moe_runtime.errors import CheckpointError
from moe_runtime.metrics.recorder import Recorder
from moe_runtime.train.saving import TrainingState, capture, describe

_WORTH_SAYING_S = 0.05


class RunCheckpoints:
    """Saves of a run; made and used by all ranks alike.

    Args:
        saver: writes beside the rank's own thread.
        state: what is saved.
        recorder: hears of every save that ended.
    """

    def __init__(self, saver: BackgroundSaver, state: TrainingState, recorder: Recorder) -> None:
        self.saver = saver
        self._state, self._recorder = state, recorder
        self._owned = frozenset(weights_to_save(state.weights(), state.first_expert, state.peers))
        self._failed: str | None = None

    def begin(self, step: int) -> None:
        """Take what a checkpoint after `step` steps holds and leave the writing to its thread."""
        progress = self._state.runtime.clock.progress
        progress.enters("save")
        running = self.saver.running_step
        if running is not None:
            progress.begins(f"write of step {running}")
            self._wait_for(running, step)
            progress.begins("copy")
        since = time.perf_counter()
        config, layout = self._state.runtime.config, self._state.runtime.layout
        meta = describe(self._state, step, tokens_before(config, layout, step))
        self.saver.start(step, capture(self._state, self._owned), meta, since)

    def tell(self) -> None:
        """Report a save that has ended since; never waits."""
        report = self.saver.take()
        if report is not None:
            self._report(report)

    def settle(self) -> None:
        """Wait for the save that runs, and report it: afterwards what is on disk is the newest there is."""
        running = self.saver.running_step
        if running is None:
            return
        progress = self._state.runtime.clock.progress
        progress.enters("save")
        progress.begins(f"write of step {running}")
        report = self.saver.wait()
        if report is not None:
            self._report(report)

    def check(self) -> None:
        """Whether the newest checkpoint is on disk, at the end of a run.

        Raises:
            CheckpointError: it is not; a run that ends without its weights has not ended well.
        """
        if self._failed is not None:
            raise CheckpointError(f"{self._failed}; make room and run the same command: it continues")

    def _wait_for(self, running: int, due: int) -> None:
        begun = time.perf_counter()
        report = self.saver.wait()
        waited_s = time.perf_counter() - begun
        if report is not None:
            self._report(report)
        self._recorder.event("checkpoint_waited", step=due, running_step=running, seconds=waited_s)
        if waited_s > _WORTH_SAYING_S:
            self._recorder.say(
                f"step {due}: waited {waited_s:.1f} s for the checkpoint of step {running} to be written; "
                "a larger train.checkpoint_every or a faster disk would avoid that"
            )

    def _report(self, report: SaveReport) -> None:
        """Tell how a save ended; a failure costs this checkpoint, not the run."""
        self._failed = None
        outcome, step = report.outcome, report.step
        seconds = {"blocked_s": report.blocked_s, "write_s": report.write_s}
        if isinstance(outcome, SaveFailed):
            self._failed = f"step {step}: no checkpoint: {outcome.message}"
            self._recorder.event("checkpoint_failed", step=step, message=outcome.message, **seconds)
            self._recorder.say(self._failed)
            return
        path, num_bytes = str(outcome.path), outcome.num_bytes
        self._recorder.event("checkpoint", step=step, path=path, bytes=num_bytes, **seconds)
        if outcome.warning:
            self._recorder.say(outcome.warning)
