"""Back to the newest checkpoint within the running process, and on past the data that led astray.

    steps     ...  8 | 9  10  11  12* 13  14 | 15 ...        12*: the loss that stands out
    data      ... s8 | ------- passed over ------- |
                     ^ checkpoint                  ^ what step 9 reads now

Passed over is everything from the checkpoint to the spike, and `guard.spike_skip_steps` steps more: which of
these batches was to blame is not known, for a spike shows some steps after its cause. The same batches in
another order were rejected: they would lead to the same place. Decided from numbers that all ranks share, and
a clean run with the same `data.skip` from its beginning takes the same bits.
"""

from moe_runtime.checkpoint.store import CheckpointStore
from moe_runtime.config.derive import sequences_before
from moe_runtime.metrics.recorder import Recorder
from moe_runtime.train.saving import TrainingState, load_state


def roll_back(
    store: CheckpointStore, state: TrainingState, recorder: Recorder, step: int, passes_data: bool = True
) -> int | None:
    """Load the newest good checkpoint; gives the steps done, or None if there is none. A collective call.

    Args:
        step: steps done when the trouble showed.
        passes_data: go on past the data; False takes the same data again, for trouble that it did not make.

    Raises:
        CheckpointError: the checkpoint cannot be loaded; on every rank alike.
    """
    found = store.latest_good().checkpoint
    if found is None:
        message = f"step {step}: no checkpoint to roll back to; training goes on"
        recorder.event("no_roll_back", step=step, message=message)
        recorder.say(message)
        return None
    done_before = state.guard.roll_backs
    if state.ema is not None:
        state.ema.join()
    back = load_state(state, found)
    said = f"rolled back from step {step} to step {back}"
    if passes_data:
        state.guard.roll_backs = done_before + 1
        said += _pass_data(state, back, step)
    recorder.roll_back(back)
    ranges = [list(part) for part in state.guard.skipped_data.ranges]
    recorder.event("roll_back", step=step, to_step=back, data_skip=ranges, message=said)
    recorder.say(said)
    return back


def _pass_data(state: TrainingState, back: int, step: int) -> str:
    """Skip what lies between the steps `back` and `step`, and what the config adds; says so."""
    config, layout, guard = state.runtime.config, state.runtime.layout, state.guard
    last_step = step + config.guard.spike_skip_steps
    first, end = (guard.skipped_data.number(sequences_before(config, layout, at)) for at in (back, last_step))
    guard.skipped_data = guard.skipped_data.with_range(first, end - first)
    return f"; sequences {first} to {end - 1} are passed over (data.skip {[first, end - first]})"
