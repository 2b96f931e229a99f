"""`moe-runtime plan --search`: layouts ranked and refused, in tables and as values; the winner's config."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moe_runtime.cli.plan.text import table
from moe_runtime.config.load import dump_config
from moe_runtime.config.schema import RecomputeConfig
from moe_runtime.errors import ConfigError
from moe_runtime.planner.reckon.layouts import GIGA, Candidate, Ranked, Search

_SHOWN = 12  # layouts of each table
_SHARES = (1.25, 2.0, 4.0, 10.0)  # of an accelerator's memory, where the too large ones are counted


def describe_search(found: Search) -> str:
    """All tables, a blank line between them."""
    parts = [_head(found)]
    if found.ranked:
        front = [(one, _schedule(one)) for one in found.front]
        parts += [_table("fastest", _by_frame(found.ranked)), _table("memory against time", front)]
    return "\n\n".join([*parts, _too_large(found), _refused(found)])


def search_fields(found: Search) -> dict[str, Any]:
    """One JSON object with every layout: `ranked` ones fit, `too_large` are legal, `refused` are not."""
    return {
        "config": found.config.name,
        "cluster": found.cluster.name,
        "gpus": found.num_accelerators,
        "memory_limit_bytes": found.limit,
        "world": found.world,
        "legal": found.num_legal,
        "simulated": found.simulated,
        "ranked": [_ranked_fields(one) for one in found.ranked],
        "front": [_ranked_fields(one) for one in found.front],
        "too_large": [
            {**_keys(one), "memory_bytes": one.nbytes, "reason": _why_too_large(found, one)}
            for one in found.too_large
        ],
        "refused": [{"keys": one.keys, "reason": one.reason, "count": one.count} for one in found.refused],
    }


def winner_of(found: Search) -> Ranked:
    """The fastest layout.

    Raises:
        ConfigError: none is legal, or none fits; says what comes nearest.
    """
    if found.ranked:
        return found.ranked[0]
    what = f"{found.config.name} on {found.num_accelerators:,} x {found.cluster.accelerator.name}"
    if not found.too_large:
        reasons = "; ".join(reason for _, reason, _ in _grouped(found)[:3])
        raise ConfigError(f"{what}: expected a legal layout, got none of {found.num_refused:,}: {reasons}")
    least = found.too_large[0]
    raise ConfigError(
        f"{what}: expected a layout that fits into {found.limit / GIGA:.1f} GB, got none of "
        f"{found.num_legal:,}; the smallest needs {least.nbytes / GIGA:.1f} GB ({_words(least)}); "
        "take more accelerators (--gpus), or shorter sequences"
    )


def write_winner(found: Search, path: Path | None) -> Path:
    """Write the winner as a run config that `train` takes.

    Args:
        path: None: in the folder of runs, under `plans`.

    Raises:
        ConfigError: there is no winner, or the file cannot be written.
    """
    config = winner_of(found).candidate.config
    if path is None:
        name = f"{config.name}-{found.cluster.name}-{found.num_accelerators}.yaml"
        path = Path(config.out_dir) / "plans" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump_config(config))
    except OSError as error:
        raise ConfigError(f"--write {path}: cannot be written: {error.strerror}; give another file") from None
    return path


def _head(found: Search) -> str:
    config, limit = found.config, f"{found.limit / GIGA:.1f} GB"
    every = found.num_refused + found.num_legal
    return "\n".join(
        (
            f"{config.name} on {found.num_accelerators:,} x {found.cluster.accelerator.name}, "
            f"{config.precision}, {config.batch.global_batch_size:,} sequences of "
            f"{config.batch.seq_len:,} tokens a step",
            f"{every:,} layouts: {found.num_refused:,} would be refused by train, {len(found.too_large):,} "
            f"need more than {limit}, {len(found.ranked):,} fit",
            f"{found.simulated:,} programs simulated, all others settled by a bound",
        )
    )


def _by_frame(ranked: Iterable[Ranked]) -> list[tuple[Ranked, str]]:
    """The best choice of recompute and moments of each layout, as far as it is exact.

    Returns:
        With the names of its schedule, several where programs are as fast, as they are without a pipeline.
    """
    found: dict[tuple[object, ...], tuple[Ranked, list[str]]] = {}
    seen: set[int] = set()
    for one in ranked:
        frame = one.candidate.frame
        if not one.exact or id(frame) in seen:
            continue
        seen.add(id(frame))
        layout = frame.layout
        key = (f"{one.seconds:.9g}", layout.pp, layout.ep, frame.config.batch.micro_batch_size)
        found.setdefault(key, (one, []))[1].append(_schedule(one))
    return [(one, ", ".join(names)) for one, names in found.values()]


def _schedule(one: Ranked) -> str:
    wanted = one.candidate.frame.config.layout
    chunks = f" x{wanted.chunks}" if wanted.chunks else ""
    return wanted.schedule + chunks + (" (zero 2)" if wanted.zero_stage == 2 else "")


def _table(title: str, rows: Sequence[tuple[Ranked, str]]) -> str:
    lines = [[title, "step, s", "GB", "pp", "dp", "ep", "micro batch", "recompute", "moments", "schedule"]]
    for one, schedule in rows[:_SHOWN]:
        candidate = one.candidate
        wanted = candidate.frame.config.layout
        lines.append(
            [
                f"{one.tokens_per_s_per_gpu:,.1f} tokens/s/GPU",
                f"{one.seconds:.4g}",
                f"{candidate.nbytes / GIGA:.1f}",
                *(str(getattr(wanted, key)) for key in ("pp", "dp", "ep")),
                str(candidate.frame.config.batch.micro_batch_size),
                _again(candidate.recompute),
                candidate.moments,
                schedule,
            ]
        )
    more = f"\nand {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return table(lines) + more


def _too_large(found: Search) -> str:
    """Counted by how much they lack, each time with the smallest as an example."""
    lines, below = [f"need more memory than there is: {len(found.too_large):,}"], 1.0
    for above in (*_SHARES, float("inf")):
        within = [one for one in found.too_large if below < one.nbytes / found.limit <= above]
        if within:
            share = f"up to {above:g} times" if above < float("inf") else f"more than {below:g} times"
            lines.append(f"{len(within):>7,}  {share} what there is")
            lines.append(f"         such as {_words(within[0])}: {_why_too_large(found, within[0])}")
        below = above
    return "\n".join(lines)


def _refused(found: Search) -> str:
    lines = [f"would be refused: {found.num_refused:,}"]
    for count, reason, example in _grouped(found):
        lines += [f"{count:>7,}  {reason}", f"         such as {example}"]
    return "\n".join(lines)


def _grouped(found: Search) -> list[tuple[int, str, str]]:
    """Refusals whose words differ in numbers alone, the most frequent first: count, words, an example."""
    groups: dict[str, list[Any]] = {}
    for one in found.refused:
        words = re.sub(r"\d+", "N", one.reason.split(";")[0])
        group = groups.setdefault(words, [0, one.reason.split(";")[0], one.keys])
        group[0] += one.count
    return sorted(((count, reason, keys) for count, reason, keys in groups.values()), reverse=True)


def _ranked_fields(one: Ranked) -> dict[str, Any]:
    seconds = {"step_s": one.seconds} if one.exact else {"step_s_at_least": one.seconds}
    rate = "tokens_per_s_per_gpu" + ("" if one.exact else "_at_most")
    return {
        **_keys(one.candidate),
        **seconds,
        rate: one.tokens_per_s_per_gpu,
        "memory_bytes": one.candidate.nbytes,
    }


def _keys(candidate: Candidate) -> dict[str, Any]:
    wanted = candidate.frame.config.layout
    axes = {key: getattr(wanted, key) for key in ("pp", "dp", "ep", "schedule", "chunks", "zero_stage")}
    return {
        **axes,
        "micro_batch_size": candidate.frame.config.batch.micro_batch_size,
        "recompute": candidate.recompute.model_dump(),
        "moments": candidate.moments,
    }


def _why_too_large(found: Search, one: Candidate) -> str:
    return f"pipeline rank {one.rank} needs {one.nbytes / GIGA:.2f} GB of {found.limit / GIGA:.2f} GB"


def _words(one: Candidate) -> str:
    return f"{one.frame.keys} recompute {_again(one.recompute)}, moments {one.moments}"


def _again(recompute: RecomputeConfig) -> str:
    names = [name for name, on in recompute.model_dump().items() if on]
    return " ".join(names) or "-"
