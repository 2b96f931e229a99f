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
    rounds: Annotated[
        int | None, typer.Option(min=1, help="turns of each side; default: 7 on the CPU, 3 on a GPU")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
    device: Annotated[
        str, typer.Option(help="cpu: the plain model against transformers' small; cuda")
    ] = "cpu",
    experts: Annotated[int | None, typer.Option(min=1, help="cuda: of a layer; default: what fits")] = None,
    sequences: Annotated[int, typer.Option(min=1, help="cuda: of 4,096 tokens, in a microbatch")] = 2,
    microbatches: Annotated[int, typer.Option(min=1, help="cuda: of a step")] = 16,
    vocab: Annotated[int, typer.Option(min=1, help="cuda: vocabulary")] = 16384,
    precision: Annotated[list[str] | None, typer.Option(help="cuda: bf16, fp8; may be repeated")] = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="cuda: list the longest kernels")] = False,
    peer: Annotated[
        bool, typer.Option("--peer", help="cuda: BF16 against transformers, in place of FP8 against BF16")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="cuda, with --peer: the peer under torch.compile too")
    ] = False,
) -> None:
    """Training tokens/s: of the plain model against transformers', on the CPU; on a GPU, FP8 against BF16.

    On a GPU a slice of DeepSeek-V3 of true widths, one dense and two MoE layers, takes whole steps.
    """
    if device == "cuda" and peer:
        from moe_runtime.cli.bench_slice.peer import describe_peer, measure_peer  # needs transformers

        compared = measure_peer(rounds or 7, compiled)
        typer.echo(json_text.dumps(compared) if json else describe_peer(compared))
        return
    if device == "cuda":
        from moe_runtime.cli.bench_slice.measure import Settings  # brings torch
        from moe_runtime.cli.bench_slice.measure import measure as measure_slice
        from moe_runtime.cli.bench_slice.report import describe as describe_slice

        chosen = slice_precisions(precision)
        settings = Settings(
            experts=experts,
            sequences=sequences,
            microbatches=microbatches,
            vocab_size=vocab,
            rounds=rounds or 3,
            precisions=chosen,
            kernels=kernels,
        )
        found = measure_slice(settings)
        typer.echo(json_text.dumps(found) if json else describe_slice(found))
        return
    if device != "cpu":
        raise ConfigError(f"bench train: expected --device cpu or cuda, got {device!r}")
    from moe_runtime.cli.bench_train import describe, measure  # needs the `test` extra

    results = [measure(kind, rounds or 7, threads) for kind in ("fp32", "bf16")]
    if json:
        typer.echo(json_text.dumps({"results": results}))
    else:
        typer.echo(describe(results))


def slice_precisions(wanted: list[str] | None) -> tuple[str, ...]:
    """What `--precision` names, in its order; both if nothing."""
    known = ("bf16", "fp8")
    for name in wanted or ():
        if name not in known:
            raise ConfigError(f"bench train: expected --precision of {' or '.join(known)}, got {name!r}")
    return tuple(dict.fromkeys(wanted)) if wanted else known


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


@app.command("fp8")
def fp8(
    device: Annotated[str, typer.Option(help="cpu: emulation, small shapes; cuda: DeepSeek-V3's")] = "cpu",
    write_table: Annotated[
        bool, typer.Option("--write-table", help="keep the speeds: the choice of back ends goes by them")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
) -> None:
    """FP8 products of every back end against BF16; each is checked before it is timed."""
    from moe_runtime.cli.bench_fp8.run import describe as describe_fp8  # brings torch
    from moe_runtime.cli.bench_fp8.run import measure as measure_fp8
    from moe_runtime.cli.bench_fp8.run import write_table as write_fp8

    if device not in ("cpu", "cuda"):
        raise ConfigError(f"bench fp8 --device: expected cpu or cuda, got {device}")
    result = measure_fp8(device, lambda line: None if json else typer.echo(describe_fp8(line)))
    if write_table:
        write_fp8(result)
    if json:
        typer.echo(json_text.dumps(result))
    elif "peaks" in result:
        typer.echo(f"{result['device']}, torch {result['torch']}: {result['peaks']}")


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


@app.command("generate")
def generate(
    path: Annotated[Path, typer.Argument(help="run folder (its last good checkpoint) or checkpoint folder")],
    data: Annotated[Path, typer.Option(help="folder of prepared data; prompts are of its validation split")],
    part: Annotated[
        list[str] | None, typer.Option(help="cache, drafts, acceptance, size, prefix; may be repeated")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="times each contender is timed, in turn")] = 5,
    prompts: Annotated[int, typer.Option(min=1, help="continuations for acceptance")] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="of each")] = 64,
    tokens: Annotated[
        int, typer.Option(min=2, help="new ones of each; drafts and --against are timed over as many")
    ] = 256,
    drafts: Annotated[int, typer.Option(min=0, help="a pass; 0: as many as MTP modules")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    against: Annotated[
        Path | None, typer.Option(help="another checkpoint: time both in turn, and only the parts asked for")
    ] = None,
    context: Annotated[list[int] | None, typer.Option(min=1, help="of --against; may be repeated")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="of --against; may be repeated")] = None,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
) -> None:
    """Decoding of a checkpoint: against no cache and transformers, with drafts, from a prefix cache.

    cache: 512 tokens with a cache, without, and by transformers on the same weights. drafts: MTP drafts
    against none at temperature 1. acceptance: on held-out text, sampled, greedy, each with its control. size:
    bytes of the cache. prefix: first token of a 2,000-token prompt in new processes. --against: decode speed
    of two checkpoints, such as one with model.attention mla and one with mha, at contexts and batch sizes.
    """
    from moe_runtime.cli.bench_generate.against import Shapes
    from moe_runtime.cli.bench_generate.measure import PARTS  # brings torch
    from moe_runtime.cli.bench_generate.measure import measure as measure_generate
    from moe_runtime.cli.bench_generate.report import describe as describe_generate
    from moe_runtime.cli.bench_generate.subject import Settings
    from moe_runtime.cli.generate import check_device

    check_device(device)
    settings = Settings(path, data, rounds, prompts, prompt_tokens, tokens, drafts, threads, device)
    shapes = None
    if against is not None:
        shapes = Shapes(against, context or Shapes.contexts, batch or Shapes.batches, tokens)
    result = measure_generate(settings, part or ([] if shapes else list(PARTS)), shapes)
    typer.echo(json_text.dumps(result) if json else describe_generate(result))
