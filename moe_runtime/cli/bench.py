"""`moe-runtime bench`: measurements against a peer, side by side in one run."""

import json as json_text
from pathlib import Path
from typing import Annotated

import typer

from moe_runtime.errors import ConfigError, NumericsError

app = typer.Typer(help="Measure a part of the runtime against its peer.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure a part of the runtime against its peer, in turn, in one run."""


@app.command("train")
def train(
    json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="pairs of steps measured for each precision")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
) -> None:
    """Training tokens/s of the plain model against transformers' DeepseekV3ForCausalLM, on the CPU."""
    from moe_runtime.cli.bench_train import describe, measure  # needs the `test` extra

    results = [measure(precision, rounds, threads) for precision in ("fp32", "bf16")]
    if json:
        typer.echo(json_text.dumps({"results": results}))
    else:
        typer.echo(describe(results))


@app.command("comm")
def comm(
    links: Annotated[
        str, typer.Option(help="veth: rate-limited links between network namespaces (root); none: loopback")
    ] = "veth",
    layer: Annotated[bool, typer.Option("--layer", help="a whole MoE layer, against deepspeed.moe")] = False,
    overlap: Annotated[bool, typer.Option("--overlap", help="exchange under computation")] = False,
    nodes: Annotated[int | None, typer.Option(min=1, help="nodes; one namespace each")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="processes on each node")] = None,
    rate: Annotated[int | None, typer.Option(min=1, help="Mbit/s of each link, each way")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="width of a token")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="tokens of each rank")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="times each contender is measured")] = None,
    routing: Annotated[
        list[str] | None, typer.Option(help="balanced, natural, adversarial; may be repeated")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
) -> None:
    """Dispatch and combine against a plain all-to-all: bytes over links, time, time over the links' floor.

    Defaults: 4 nodes x 2 ranks at 100 Mbit/s, hidden 2,048, 1,024 tokens a rank, 3 rounds (some 9 minutes);
    --links none: 1 node x 2 ranks, so without two_hop (--nodes 2 --ranks-per-node 1 has it); --overlap: 2
    nodes x 1 rank at 25 Mbit/s; --layer: 4 ranks, then 2.
    """
    from moe_runtime.cli.bench_comm.measure import describe as describe_comm  # brings torch
    from moe_runtime.cli.bench_comm.measure import measure as measure_comm
    from moe_runtime.cli.bench_comm.plans import plan

    if layer and overlap:
        raise ConfigError("bench comm: expected one of --layer and --overlap, got both")
    given = {"nodes": nodes, "ranks_per_node": ranks_per_node, "rate_mbit": rate, "hidden": hidden}
    given |= {"tokens": tokens, "rounds": rounds}
    wanted = {"routings": tuple(routing) if routing else None}
    part = "layer" if layer else "overlap" if overlap else "exchange"
    results = [measure_comm(settings) for settings in plan(part, links, {**given, **wanted})]
    if json:
        typer.echo(json_text.dumps({"results": results}))
    else:
        typer.echo("\n\n".join(describe_comm(result) for result in results))


@app.command("pipeline")
def pipeline(
    layout: Annotated[str, typer.Option(help="pp2 or pp4: pipeline ranks; times two expert ranks")] = "pp2",
    links: Annotated[
        str, typer.Option(help="veth: limited links between network namespaces (root); none: loopback")
    ] = "veth",
    rate: Annotated[
        str, typer.Option(help="Mbit/s of each link, or calibrated: exchange takes as long as computation")
    ] = "calibrated",
    quota: Annotated[
        bool, typer.Option("--quota/--no-quota", help="confine each rank to an equal share of the processor")
    ] = True,
    microbatches: Annotated[int | None, typer.Option(min=1, help="of each lane in a step")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="of each microbatch, one sequence")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="times each contender is measured, in turn")
    ] = None,
    contender: Annotated[list[str] | None, typer.Option(help="may be repeated; default: all")] = None,
    traces: Annotated[
        Path | None, typer.Option(help="folder for a trace of the last step of each schedule of ours")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
) -> None:
    """A training step by schedule, overlap on and off, against torch's and DeepSpeed's pipelines.

    The same model, batch and weights for all. Defaults: 16 microbatches, 5 rounds (pp2); 20 and 3 (pp4).
    """
    from moe_runtime.cli.bench_pipeline.measure import measure as measure_pipeline  # brings pydantic, psutil
    from moe_runtime.cli.bench_pipeline.plan import plan as plan_pipeline
    from moe_runtime.cli.bench_pipeline.report import describe as describe_pipeline

    counts = {"microbatches": microbatches, "tokens": tokens, "rounds": rounds}
    settings = plan_pipeline(layout, links, rate, quota, contenders=contender, **counts)
    result = measure_pipeline(settings, traces)
    typer.echo(json_text.dumps(result) if json else describe_pipeline(result))


@app.command("optim")
def optim(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    elements: Annotated[
        list[int] | None, typer.Option(min=1, help="of the flat parameter; may be repeated")
    ] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="CPU threads; may be repeated")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="times each contender is measured, in turn")] = 15,
    sweep: Annotated[bool, typer.Option("--sweep", help="cuda: other shapes of programs too")] = False,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
) -> None:
    """The AdamW step with FP8 moments: on the CPU against other optimizers, on CUDA against the copy.

    Defaults: 4 Mi and 16 Mi elements with 1 and 2 threads (cpu); 256 Mi and 1 Gi elements (cuda). Peers:
    DeepSpeedCPUAdam, torch, and of the extra `bench` torchao and bitsandbytes; the absent are named.
    """
    if device == "cpu":
        from moe_runtime.cli.bench_optim import cpu  # brings torch

        results = cpu.measure(elements or [1 << 22, 1 << 24], threads or [1, 2], rounds)
        typer.echo(json_text.dumps({"results": results}) if json else cpu.describe(results))
        return
    import torch

    if device != "cuda" or not torch.cuda.is_available():
        expected = "cpu or cuda" if device != "cuda" else "a CUDA device on this machine"
        raise ConfigError(f"bench optim: --device: expected {expected}, got {device!r}")
    from moe_runtime.cli.bench_optim import cuda

    result = cuda.measure(elements or [1 << 28, 1 << 30], rounds, sweep)
    typer.echo(json_text.dumps(result) if json else cuda.describe(result))
    if result["differing"]:
        raise NumericsError("bench optim: the fused step differs from the plain one; nothing was timed")
