"""Finds state that changed without being written, and makes it whole or ends the run.

    update -> digests taken -> forward, backward -> digests compared -> update        every step, each rank
    update -> replicas compared                                  every guard.digest_every steps, and to save

Weights are copies of the FP32 masters, so they can be written again and the step run again: nothing is lost.
Masters, moments and biases have no copy that can be trusted; the run goes back to its newest checkpoint and
takes the same data again, to the same bits. Whichever way, the same rank damaged twice in the life of a
process is no accident: the fault is persistent, and the run ends, so that the machine can be taken out.

An average of the weights is taken while the next step computes, so it may have read a wrong one before that
was found. Where an average is kept, damaged weights too send the run back to its checkpoint.

Which of two replicas is wrong, two replicas cannot tell. The masters can: all weights are written again from
them, and the replica whose digest changed thereby was wrong.
"""

from dataclasses import asdict
from typing import Any

from moe_runtime.config.reliability import GuardConfig
from moe_runtime.errors import NumericsError
from moe_runtime.metrics.recorder import Tell
from moe_runtime.parallel.at_rest import WEIGHTS, AtRest
from moe_runtime.parallel.replica_digest import Difference, replica_differences
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.parallel.zero import ZeroOptimizer

Damage = dict[str, Any]
_SHOWN = 3


class StateDamaged(Exception):
    """State without a copy was damaged; the run must go back to a checkpoint. On every rank alike."""


class Integrity:
    """Guards the state of all ranks; every method but `take` is a collective call of all.

    Args:
        config: the guard section; digest_every 0 turns everything here off.
        averages: an average of the weights is kept.
        tell: called with the kind of an event, its step, its message and fields.
    """

    def __init__(
        self,
        config: GuardConfig,
        runtime: Runtime,
        optimizer: ZeroOptimizer,
        tell: Tell,
        averages: bool = False,
    ) -> None:
        self._averages = averages
        self._config, self._runtime, self._optimizer, self.tell = config, runtime, optimizer, tell
        self._at_rest = AtRest(runtime, optimizer)
        self._suspects: set[int] = set()

    def take(self) -> None:
        """The state was just written, and is right as it is."""
        if self._config.digest_every:
            self._at_rest.take()

    def heals_weights(self, step: int) -> bool:
        """Before an update: True if weights had been damaged; they are whole again, the step must run again.

        Args:
            step: from 1.

        Raises:
            StateDamaged: something was damaged that has no copy.
            NumericsError: damage, and the config or a second one says stop.
        """
        if not self._config.digest_every:
            return False
        own = self._at_rest.changes()
        if not self._runtime.peers.any_true(bool(own)):
            return False
        damages = self._gather([asdict(change) for change in own])
        self._judge(step, damages, "changed in memory since the last update")
        if self._averages or any(damage["kind"] != WEIGHTS for damage in damages):
            raise StateDamaged(_describe(damages))
        self._optimizer.refresh_weights()
        self.take()
        return True

    def is_compared(self, step: int, is_saving: bool) -> bool:
        """True if replicas are to be compared after this step."""
        every = self._config.digest_every
        return every > 0 and (is_saving or step % every == 0)

    def compare(self, step: int) -> None:
        """After an update: hold the replicas against each other, and mend what differs.

        Raises:
            StateDamaged: biases differ, or something else that has no copy was damaged.
            NumericsError: replicas differ, and the config, or that they still do, says stop.
        """
        self.heals_weights(step)
        own = self._differences()
        if not self._runtime.peers.any_true(bool(own)):
            return
        self._optimizer.refresh_weights()
        rewritten = [asdict(change) for change in self._at_rest.changes()]
        self._at_rest.take()
        rank = self._runtime.mesh.rank
        outvoted = [asdict(each) for each in own if each.kind != WEIGHTS and rank in each.odd_ranks]
        damages = self._gather(rewritten + [{**each, "tensors": [each["group"]]} for each in outvoted])
        self._judge(step, damages, "is not what its replicas hold")
        if self._averages or self._runtime.peers.any_true(bool(self._differences())):
            raise StateDamaged(_describe(damages))

    def _differences(self) -> list[Difference]:
        return replica_differences(self._runtime, self._optimizer)

    def _gather(self, own: list[Damage]) -> list[Damage]:
        said = self._runtime.peers.gather_json(own)
        return [{"rank": rank, **damage} for rank, damages in enumerate(said) for damage in damages]

    def _judge(self, step: int, damages: list[Damage], what: str) -> None:
        ranks = {damage["rank"] for damage in damages}
        again = sorted(ranks & self._suspects)
        self._suspects |= ranks
        nature = "persistent" if again else "transient so far"
        message = f"{_describe(damages)} {what}; {nature}"
        self.tell("corruption", step, message, damages=damages, persistent=bool(again))
        if again:
            raise NumericsError(
                f"step {step}: {message}: rank {again[0]} was mended before; take its machine out of the "
                "run, and the same command continues from the last checkpoint"
            )
        if self._config.digest_action == "stop":
            raise NumericsError(
                f"step {step}: {message}; guard.digest_action is stop: the same command continues from the "
                "last checkpoint, heal would have gone on"
            )


def _describe(damages: list[Damage]) -> str:
    """Which rank and tensor, in one line."""
    if not damages:
        return "a replica, it is not known which,"
    shown = [_describe_one(damage) for damage in damages[:_SHOWN]]
    more = f" and {len(damages) - _SHOWN} more" if len(damages) > _SHOWN else ""
    return "; ".join(shown) + more


def _describe_one(damage: Damage) -> str:
    tensors = damage["tensors"]
    more = f" or {len(tensors) - 1} more beside it" if len(tensors) > 1 else ""
    return f"rank {damage['rank']}: {damage['kind']} of {tensors[0]}{more}"
