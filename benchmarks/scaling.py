"""The scaling study of docs/scaling.md: DeepSeek-V3 on 256 to 65,536 GPUs, reckoned by the planner.

    PYTHONPATH=.:comm python benchmarks/scaling.py size            GPUs, at one batch: the best layout of each
    PYTHONPATH=.:comm python benchmarks/scaling.py batch           65,536 GPUs, over batches
    PYTHONPATH=.:comm python benchmarks/scaling.py sums            gradients summed in larger buckets
    PYTHONPATH=.:comm python benchmarks/scaling.py domains         the same in domains of 72
    PYTHONPATH=.:comm python benchmarks/scaling.py links           expert groups of 8 to 256
    PYTHONPATH=.:comm python benchmarks/scaling.py imbalance       ranks that get more rows than others
    PYTHONPATH=.:comm python benchmarks/scaling.py failures        share of the time that trains
    PYTHONPATH=.:comm python benchmarks/scaling.py machines        one layout, all machines

A table is printed as Markdown. "Best" is of the layouts listed in `_PIPELINES`, `_EXPERT_GROUPS` and
`_SCHEDULES` that fit into memory; `moe-runtime plan --search` looks at more.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from moe_runtime.config.layout import check_layout
from moe_runtime.config.load import load_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError
from moe_runtime.planner.hardware.cluster import Cluster, Failures
from moe_runtime.planner.reckon.failures import Reliability, reliability
from moe_runtime.planner.reckon.imbalance import rank_imbalance
from moe_runtime.planner.reckon.machine import GIGA, Machine
from moe_runtime.planner.reckon.memory import rank_memory
from moe_runtime.planner.reckon.states import BUCKET
from moe_runtime.planner.reckon.step import Step, reckon_step, run_program
from moe_runtime.planner.reckon.traffic import layer_traffic

ROOT = Path(__file__).parents[1]
# The published run without its ramp, in FP8 as it was.
_RUN = ("precision=fp8", "batch.ramp_start_size=null", "batch.ramp_tokens=0")
_SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_PIPELINES, _EXPERT_GROUPS = (2, 4, 8, 16), (16, 32, 64, 256)
_SCHEDULES = ("dualpipe", "dualpipev", "zbv", "1f1b")
_BATCH = 16384  # sequences of 4,096 tokens; published 15,360, which 32,768 GPUs cannot share evenly
_MACHINES = ("h800", "h100", "h200", "b200", "gb200_nvl72", "mi300x")


@dataclass(frozen=True)
class Layout:
    """How GPUs are shared out."""

    gpus: int
    pp: int
    ep: int
    schedule: str
    batch: int = _BATCH
    bucket: int = BUCKET  # gradients in one message; the runtime has no key for it

    @property
    def dp(self) -> int:
        """Lanes."""
        return self.gpus // self.pp

    def __str__(self) -> str:
        return f"pp {self.pp}, ep {self.ep}, {self.schedule}"


@dataclass(frozen=True)
class Point:
    """What a layout comes to on a cluster, central estimates."""

    layout: Layout
    machine: Machine
    step: Step
    memory_gb: float

    @property
    def rate(self) -> float:
        """Tokens a second and GPU."""
        config = self.machine.config
        return config.batch.global_batch_size * config.batch.seq_len / self.step.seconds / self.layout.gpus

    @property
    def fails(self) -> Reliability:
        """Of the whole job."""
        return reliability(self.machine.cluster.failures, self.machine.num_nodes, "central")


def cluster_of(name: str) -> Cluster:
    """`configs/cluster/NAME.yaml`."""
    return Cluster.model_validate(yaml.safe_load((ROOT / f"configs/cluster/{name}.yaml").read_text()))


def config_of(layout: Layout) -> RunConfig:
    """The run with this layout; refuses what contradicts itself."""
    shape = f"layout.pp={layout.pp}", f"layout.dp={layout.dp}", f"layout.ep={layout.ep}"
    rest = f"layout.schedule={layout.schedule}", f"batch.global_batch_size={layout.batch}"
    return load_config(ROOT / "configs/run/v3_671b.yaml", (*_RUN, *shape, *rest))


def reckon(layout: Layout, cluster: Cluster, imbalance: float = 1.0) -> Point:
    """Step and memory of a layout.

    Raises:
        ConfigError: the layout contradicts itself, or does not fit into memory.
    """
    config = config_of(layout)
    machine = Machine(config, check_layout(config), cluster, "central")
    count = machine.layout.num_microbatches
    memory = _fullest(machine, min(count, 4 * layout.pp), imbalance)
    if memory > cluster.accelerator.memory_gb * GIGA:
        raise ConfigError(f"{layout}: {memory / GIGA:.0f} GB do not fit")
    program = run_program(machine, count)
    return Point(layout, machine, reckon_step(machine, program, imbalance, layout.bucket), memory / GIGA)


def _fullest(machine: Machine, num_microbatches: int, imbalance: float) -> float:
    """Bytes of the fullest pipeline rank; no more are live with more microbatches than fill the pipeline."""
    program = run_program(machine, num_microbatches)
    ranks = range(machine.layout.pp)
    return max(rank_memory(machine.config, machine.layout, program, r, imbalance).total for r in ranks)


def best(gpus: int, cluster: Cluster, batch: int = _BATCH, bucket: int = BUCKET) -> Point | None:
    """The fastest layout that fits; None if none does."""
    found = list(_fitting(gpus, cluster, batch, bucket))
    return max(found, key=lambda point: point.rate) if found else None


def _fitting(gpus: int, cluster: Cluster, batch: int, bucket: int) -> Iterator[Point]:
    for pp in _PIPELINES:
        for ep in _EXPERT_GROUPS:
            for schedule in _SCHEDULES:
                try:
                    yield reckon(Layout(gpus, pp, ep, schedule, batch, bucket), cluster)
                except ConfigError:
                    continue


_HEAD = ("layout", "M", "step, s", "tokens/s/GPU", "bubble", "exchanges in sight", "optimizer", "memory, GB")


def _cells(point: Point) -> list[str]:
    step = point.step
    shares = (step.bubble, step.exposed, step.update.total)
    return [
        str(point.layout),
        f"{point.machine.layout.num_microbatches}",
        f"{step.seconds:.2f}",
        f"{point.rate:,.0f}",
        *(f"{share / step.seconds:.1%}" for share in shares),
        f"{point.memory_gb:.0f}",
    ]


def size_table() -> Iterator[list[str]]:
    """Best layouts over sizes, one batch."""
    yield ["GPUs", *_HEAD, "trains", "all together, M tokens/s"]
    for gpus in _SIZES:
        yield [f"{gpus:,}", *_cells_of_all(best(gpus, cluster_of("h800")))]


def _cells_of_all(point: Point | None) -> list[str]:
    """Of a layout, and what failures leave of it on all GPUs together."""
    if point is None:
        return ["none fits", *[""] * (len(_HEAD) + 1)]
    share = point.fails.training_share
    return [*_cells(point), f"{share:.1%}", f"{point.rate * share * point.layout.gpus / 1e6:.2f}"]


def batch_table(cluster: str = "h800") -> Iterator[list[str]]:
    """Best layouts of 65,536 GPUs over batches."""
    yield ["sequences", "M tokens", *_HEAD]
    for batch in (16384, 65536, 131072, 262144, 524288):
        point = best(65536, cluster_of(cluster), batch)
        cells = ["none fits", *[""] * (len(_HEAD) - 1)] if point is None else _cells(point)
        yield [f"{batch:,}", f"{batch * 4096 / 1e6:,.0f}", *cells]


def sums_table() -> Iterator[list[str]]:
    """Best layouts when gradients are summed in buckets of 2^28 instead of the runtime's."""
    yield ["GPUs", "sequences", *_HEAD, "trains", "all together, M tokens/s"]
    one_batch = ((gpus, _BATCH) for gpus in _SIZES if gpus >= 2048)
    for gpus, batch in (*one_batch, (65536, 65536), (65536, 524288)):
        yield [f"{gpus:,}", f"{batch:,}", *_cells_of_all(best(gpus, cluster_of("h800"), batch, 2**28))]


def links_table() -> Iterator[list[str]]:
    """Expert groups on nodes of 8 and in domains of 72."""
    yield ["machine", "ep", "network, MB", "fast links, MB", "exchange, ms", *_HEAD[2:]]
    for name in ("h200", "gb200_nvl72"):
        for ep in (8, 16, 32, 64, 128, 256):
            layout = Layout(4096, 16, ep, "dualpipe")
            yield [name, str(ep), *_links_cells(layout, cluster_of(name))]


def _links_cells(layout: Layout, cluster: Cluster) -> list[str]:
    try:
        point = reckon(layout, cluster)
    except ConfigError as error:
        return [str(error).split(": ")[-1], *[""] * len(_HEAD)]
    machine = point.machine
    sent = layer_traffic(machine.config, layout.ep, machine.ranks_per_node, machine.tokens)["dispatch"]
    times = [f"{machine.exchange_s('dispatch') * 1e3:.2f}"]
    return [f"{sent.network / 1e6:.1f}", f"{sent.fast / 1e6:.1f}", *times, *_cells(point)[2:]]


def imbalance_table() -> Iterator[list[str]]:
    """The published layout on H200, whose memory allows for it, when the fullest rank gets more rows."""
    yield ["violation of experts", "fullest rank / mean", *_HEAD[2:]]
    layout, cluster = Layout(2048, 16, 64, "dualpipe", 15360), cluster_of("h200")
    model = config_of(layout).model
    for violation in (0.0, 0.1, 0.25, 0.5, 1.0, 2.0):
        imbalance = rank_imbalance(model, layout.ep, violation)
        yield [f"{violation:g}", f"{imbalance:.2f}", *_links_or(layout, cluster, imbalance)]


def _links_or(layout: Layout, cluster: Cluster, imbalance: float) -> list[str]:
    try:
        return _cells(reckon(layout, cluster, imbalance))[2:]
    except ConfigError as error:
        return [str(error).split(": ")[-1], *[""] * (len(_HEAD) - 3)]


def failures_table() -> Iterator[list[str]]:
    """Share that trains, over sizes and restart times."""
    restarts = (60.0, 15.0, 5.0, 1.0)
    yield ["GPUs", "hours between failures", "best interval, min", *(f"restart {r:g} min" for r in restarts)]
    base = cluster_of("h800").failures
    for gpus in _SIZES:
        found = [
            reliability(Failures(**{**base.model_dump(), "restart_minutes": r}), gpus // 8, "central")
            for r in restarts
        ]
        times = f"{found[0].between_failures / 3600:.2f}", f"{found[0].interval / 60:.1f}"
        yield [f"{gpus:,}", *times, *(f"{one.training_share:.1%}" for one in found)]


def machines_table() -> Iterator[list[str]]:
    """The published layout on every machine."""
    yield ["machine", *_HEAD[2:], "US$ a million tokens"]
    layout = Layout(2048, 16, 64, "dualpipe", 15360)
    for name in _MACHINES:
        cluster = cluster_of(name)
        point = reckon(layout, cluster)
        price = cluster.price_usd_hour.central / 3600 / point.rate * 1e6
        yield [name, *_cells(point)[2:], f"{price:.2f}"]


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {
    "size": size_table,
    "batch": batch_table,
    "sums": sums_table,
    "domains": partial(batch_table, "gb200_nvl72"),
    "links": links_table,
    "imbalance": imbalance_table,
    "failures": failures_table,
    "machines": machines_table,
}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    for number, row in enumerate(TABLES[parser.parse_args().table]()):
        print("| " + " | ".join(row) + " |", flush=True)
        if number == 0:
            print("|" + "---|" * len(row), flush=True)


if __name__ == "__main__":
    main()
