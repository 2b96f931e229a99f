"""From the options of the command to what is measured."""

import os
from collections.abc import Sequence

from moe_runtime.cli.bench_pipeline.settings import CONTENDERS, Settings
from moe_runtime.errors import ConfigError

# Pipeline ranks, microbatches, rounds: the smallest sizes at which no schedule lacks microbatches.
_LAYOUTS = {"pp2": (2, 16, 5), "pp4": (4, 20, 3)}
CALIBRATED = "calibrated"


def plan(
    layout: str,
    links: str,
    rate: str,
    quota: bool,
    *,
    microbatches: int | None = None,
    tokens: int | None = None,
    rounds: int | None = None,
    contenders: Sequence[str] | None = None,
) -> Settings:
    """What to measure.

    Args:
        layout: "pp2" or "pp4".
        links: "veth" or "none".
        rate: of each link in 10^6 bit/s, or "calibrated".
        quota: confine ranks to equal shares of the processor.
        microbatches, tokens, rounds, contenders: None: the default of the layout; all contenders.

    Raises:
        ConfigError: options that are wrong or do not go together.
    """
    if layout not in _LAYOUTS:
        raise ConfigError(f"bench pipeline: expected --layout {' or '.join(_LAYOUTS)}, got {layout!r}")
    if links not in ("veth", "none"):
        raise ConfigError(f"bench pipeline: expected --links veth or none, got {links!r}")
    if links == "none" and rate != CALIBRATED:
        raise ConfigError("bench pipeline: --rate is that of links, and --links none has none; leave one out")
    if rate != CALIBRATED and not (rate.isdecimal() and int(rate) > 0):
        raise ConfigError(f"bench pipeline: expected --rate in Mbit/s or {CALIBRATED}, got {rate!r}")
    pp, default_microbatches, default_rounds = _LAYOUTS[layout]
    world_size = pp * Settings.ep
    return Settings(
        pp=pp,
        has_links=links == "veth",
        rate_mbit=None if rate == CALIBRATED else int(rate),
        cores=(os.cpu_count() or 1) / world_size if quota else None,
        microbatches=microbatches or default_microbatches,
        seq_len=tokens or Settings.seq_len,
        rounds=rounds or default_rounds,
        contenders=tuple(dict.fromkeys(contenders or CONTENDERS)),
    )
