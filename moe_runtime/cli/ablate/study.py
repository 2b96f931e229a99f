"""A study: a question, the arms that answer it, and the runs which they need.

A study is a YAML file beside the run config that its arms share:

    name: balance
    question: does a bias alone keep experts evenly used?
    base: base.yaml                       a run config, relative to this file
    seeds: [1, 2, 3]
    arms:
      bias: []                            overrides of the base, as on the command line
      none: [recipe.bias_gamma=0]
    against: none                         the arm that the others are compared with
    columns: [val_loss, violation]        what its table shows, see `columns.py`

A run is known by what decides its outcome: a digest of its config without name, folders and how often it
reports, defaults left out. So arms of several studies that come to the same run share it, a result that
was measured once is not measured again, and a key that is added to the schema later changes nothing.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from moe_runtime.cli.ablate.columns import COLUMNS
from moe_runtime.cli.ablate.over_time import CURVES
from moe_runtime.config.finding import Finding, FindingsError
from moe_runtime.config.load import load_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.config.section import Count, Section
from moe_runtime.config.tree import read_file
from moe_runtime.errors import ConfigError

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
_FIXED = ("seed", "name", "out_dir")
_REPORTING = ("log_every", "eval_every", "eval_sequences", "checkpoint_every", "keep_checkpoints")
_NO_OUTCOME: Any = {
    "name": True,
    "out_dir": True,
    "metrics": True,
    "reliability": True,
    "guard": True,
    "train": {*_REPORTING, "sample_every", "sample_prompt", "sample_tokens", "peer_timeout_s", "watchdog_s"},
}


class Study(Section):
    """What a study's file holds."""

    name: Name
    question: str
    base: str = Field(description="run config that the arms share, relative to this file")
    seeds: tuple[Count, ...] = (1, 2, 3)
    arms: dict[Name, tuple[str, ...]] = Field(description="overrides of the base")
    against: Name = Field(description="arm that the others are compared with, seed by seed")
    columns: tuple[str, ...] = ("val_loss",)
    over_time: tuple[str, ...] = Field((), description="curves that are shown over training")
    curve: bool = Field(False, description="arms are sizes: also fit loss against training FLOPs")

    def findings(self) -> list[Finding]:
        """Arms and columns that exist, seeds that differ."""
        found = []
        if self.against not in self.arms:
            found.append(Finding.expected("against", f"one of the arms {', '.join(self.arms)}", self.against))
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            found.append(Finding.expected("seeds", "at least one, each once", list(self.seeds)))
        if len(set(self.columns)) < len(self.columns):
            found.append(Finding.expected("columns", "each once", list(self.columns)))
        for arm, overrides in self.arms.items():
            fixed = [one for one in overrides if one.partition("=")[0].strip() in _FIXED]
            if fixed:
                text = f"{', '.join(_FIXED)} are the study's to set, got {fixed[0]}; leave it out"
                found.append(Finding(f"arms.{arm}", text))
        for column in self.columns:
            if column not in COLUMNS:
                found.append(Finding.expected("columns", f"of {', '.join(COLUMNS)}", column))
        for name in self.over_time:
            if name not in CURVES:
                found.append(Finding.expected("over_time", f"of {', '.join(CURVES)}", name))
        return found


@dataclass(frozen=True)
class PlannedRun:
    """One arm with one seed.

    Args:
        arm, seed: of the study.
        base: the run config that it starts from.
        overrides: what makes it this arm and seed, without name and folder.
        config: the run, checked.
        key: digest of what decides its outcome, 12 hex digits.
    """

    arm: str
    seed: int
    base: Path
    overrides: tuple[str, ...]
    config: RunConfig
    key: str


def read_study(path: Path) -> Study:
    """A study from its file.

    Raises:
        ConfigError: there is none, or it is wrong; a line for each mistake.
    """
    tree = read_file(path, _no_bases)
    if tree.mistakes:
        raise ConfigError("\n".join(tree.mistakes))
    values = tree.values
    if "arms" not in values:
        raise ConfigError(f"{path}: expected a study with name, question, base, arms and against")
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in _lines(error))) from error


def _lines(error: ValidationError) -> list[str]:
    lines: list[str] = []
    for item in error.errors():
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, FindingsError):
            lines += [f"{finding.key}: {finding.text}" for finding in cause.findings]
        else:
            lines.append(f"{'.'.join(map(str, item['loc']))}: {item['msg']}, got {item['input']!r:.60}")
    return lines


def _no_bases(name: str, file: Path) -> Path:
    raise ConfigError(f"{file}: expected a study with arms, got a run config, with bases; name it as `base`")


def planned_runs(study: Study, path: Path) -> list[PlannedRun]:
    """The runs of a study, all arms of a seed before the next seed: pairs are whole early.

    Raises:
        ConfigError: an arm's config is wrong; names the arm.
    """
    base = path.parent / study.base
    if not base.is_file():
        raise ConfigError(f"{path}: base: expected a run config beside this file, got none at {base}")
    runs = [
        _planned(study.name, base, arm, seed, overrides)
        for seed in study.seeds
        for arm, overrides in study.arms.items()
    ]
    _check_arms(study, runs)
    return runs


def _check_arms(study: Study, runs: list[PlannedRun]) -> None:
    """Arms read the same data, and differ in something else."""
    firsts = [run for run in runs if run.seed == study.seeds[0]]
    for run in firsts:
        if run.config.data != firsts[0].config.data:
            raise ConfigError(
                f"{study.name}, arm {run.arm}: expected the data of arm {firsts[0].arm}, got other "
                "settings under data; arms are compared on the same text"
            )
        same = next(other for other in firsts if other.key == run.key)
        if same is not run:
            raise ConfigError(
                f"{study.name}, arm {run.arm}: expected a difference from arm {same.arm}, got the same run; "
                "leave one of them out"
            )


def _planned(study: str, base: Path, arm: str, seed: int, overrides: tuple[str, ...]) -> PlannedRun:
    mine = (*overrides, f"seed={seed}")
    try:
        config = load_config(base, mine)
    except ConfigError as error:
        lines = [f"{study}, arm {arm}: {line}" for line in str(error).splitlines()]
        raise ConfigError("\n".join(lines)) from error
    return PlannedRun(arm, seed, base, mine, config, outcome_key(config))


def outcome_key(config: RunConfig) -> str:
    """Digest of what decides a run's outcome, 12 hex digits."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=True, exclude=_NO_OUTCOME)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
