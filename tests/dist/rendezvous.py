"""Pipeline ranks as threads of one process, joined by a transport that is as strict as can be.

It has no tags and no buffers: the n-th send of an ordered pair meets the n-th receive, and a send
completes only when its receive has been posted. What runs on it runs on any back end.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable

import torch
from torch import Tensor

from moe_runtime.build import build_mesh, build_runtime
from moe_runtime.config.layout import check_layout
from moe_runtime.parallel.executor import StepScalars
from moe_runtime.parallel.mesh import Groups
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.schedule.action import Program
from moe_runtime.train.step import objective_weights, split_microbatches
from tests.dist.layout_case import MTP_LAMBDA, Case, batch
from tests.dist.plain_model import preset_biases

TIMEOUT_S = 60.0


class Post:
    """A send or receive that waits for its partner."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.met = threading.Event()

    def wait(self) -> None:
        if not self.met.wait(TIMEOUT_S):
            raise TimeoutError("a transfer never met its partner")


class Channels:
    """All ordered pairs of ranks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sends: dict[tuple[int, int], deque[Post]] = defaultdict(deque)
        self._receives: dict[tuple[int, int], deque[Post]] = defaultdict(deque)

    def post(self, pair: tuple[int, int], post: Post, is_send: bool) -> Post:
        own, other = (self._sends, self._receives) if is_send else (self._receives, self._sends)
        with self._lock:
            if not other[pair]:
                own[pair].append(post)
                return post
            partner = other[pair].popleft()
            source, target = (post, partner) if is_send else (partner, post)
            assert source.tensor.shape == target.tensor.shape, "a receive met another tensor's send"
            target.tensor.copy_(source.tensor)
            partner.met.set()
            post.met.set()
            return post

    def idle(self) -> bool:
        return not any(self._sends.values()) and not any(self._receives.values())


class RendezvousTransport:
    """The transport of one rank over the channels."""

    def __init__(self, rank: int, channels: Channels) -> None:
        self._rank, self._channels = rank, channels

    def send(self, tensor: Tensor, peer: int) -> Post:
        return self._channels.post((self._rank, peer), Post(tensor), is_send=True)

    def receive(self, buffer: Tensor, peer: int) -> Post:
        return self._channels.post((peer, self._rank), Post(buffer), is_send=False)


def run_pipeline(
    case: Case, change: Callable[[Program], Program] = lambda program: program
) -> tuple[list[Runtime], list[StepScalars]]:
    """Run one step of a case with dp 1 and ep 1, one thread a pipeline rank.

    Args:
        change: edits the program before it runs.
    """
    config, channels = case.config(), Channels()
    layout = check_layout(config)
    nobody = Groups(*[None] * 8)  # type: ignore[arg-type]
    runtimes = []
    for rank in range(layout.pp):
        transport, cpu = RendezvousTransport(rank, channels), torch.device("cpu")
        mesh = build_mesh(layout, rank)
        runtimes.append(
            build_runtime(config, layout, mesh, nobody, cpu, ranks_per_node=1, transport=transport)
        )
        for chunk in runtimes[-1].chunks.values():
            preset_biases(chunk, case.biases)
    results: list[StepScalars | BaseException] = [RuntimeError("did not run")] * layout.pp

    def run(rank: int) -> None:
        runtime = runtimes[rank]
        directions = 2 if runtime.mesh.is_mirrored else 1
        microbatches = split_microbatches(batch(config), 1, directions)
        weights = objective_weights(runtime, case.microbatches, MTP_LAMBDA)
        program = change(runtime.program(case.microbatches))
        try:
            results[rank] = runtime.executor.run(program, microbatches, weights)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(layout.pp)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S * 2)
    failures = [result for result in results if not isinstance(result, StepScalars)]
    if failures:
        raise failures[0]
    assert channels.idle(), "transfers were left over"
    return runtimes, [result for result in results if isinstance(result, StepScalars)]
