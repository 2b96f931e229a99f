"""What a chaos run found: figures a user can compare, and whether anything was lost."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Struck:
    """One fault and what became of it.

    Args:
        fault: as `train --inject` reads it, or preempt.
        step: in which it struck.
        detected_s: from the fault until the launcher wrote down its cause; None where none is told.
        recovered_s: until the first step of the next attempt was done; None: it never was, or none was lost.
        lost_steps: done before the fault and done again.
        said: the cause as it was told.
        attributed: the cause names the right rank and class; None where there is nothing to attribute.
        survived: the run went on.
    """

    fault: str
    step: int
    detected_s: float | None = None
    recovered_s: float | None = None
    lost_steps: int = 0
    said: str = ""
    attributed: bool | None = None
    survived: bool = False


@dataclass
class Report:
    """A whole chaos run.

    Args:
        steps: done in the end.
        wall_s: from the start of the launcher to its end.
        productive_s: of the steps that count.
        orphans: processes of the run that outlived it.
        growth: of the launcher: open files and resident MiB, after the first fault and at the end.
        differences: between the final state and that of the clean run; empty if they are equal.
        clean_s: wall time of the clean run.
    """

    seed: int
    steps: int = 0
    wall_s: float = 0.0
    productive_s: float = 0.0
    clean_s: float = 0.0
    struck: list[Struck] = field(default_factory=list)
    orphans: list[int] = field(default_factory=list)
    growth: dict[str, tuple[float, float]] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)
    failure: str = ""

    @property
    def is_good(self) -> bool:
        """Everything was survived, nothing is lost, nothing is left behind."""
        survived = all(each.survived for each in self.struck)
        return survived and not (self.orphans or self.differences or self.failure)

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        told = [each for each in self.struck if each.attributed is not None]
        return {
            "seed": self.seed,
            "good": self.is_good,
            "steps": self.steps,
            "faults": len(self.struck),
            "survived": sum(each.survived for each in self.struck),
            "attributed": sum(bool(each.attributed) for each in told),
            "to_attribute": len(told),
            "lost_steps": sum(each.lost_steps for each in self.struck),
            "wall_s": self.wall_s,
            "effective_share": self.productive_s / self.wall_s if self.wall_s else 0.0,
            "clean_s": self.clean_s,
            "detect_s": _spread([each.detected_s for each in self.struck]),
            "recover_s": _spread([each.recovered_s for each in self.struck]),
            "orphans": self.orphans,
            "growth": self.growth,
            "differences": self.differences,
            "failure": self.failure,
            "struck": [asdict(each) for each in self.struck],
        }


def text_of(report: Report) -> str:
    """The report for people."""
    found = report.to_json()
    lines = [
        f"{found['faults']} faults, {found['survived']} survived; of {found['to_attribute']} that have a "
        f"cause {found['attributed']} were attributed",
        f"{report.steps} steps in {report.wall_s:.1f} s, effective training time "
        f"{found['effective_share']:.1%}; {found['lost_steps']} steps lost and done again",
        f"seconds to detect: {_shown(found['detect_s'])}; to recover: {_shown(found['recover_s'])}",
    ]
    lines += [f"  {_line(each)}" for each in report.struck]
    for what, (first, last) in report.growth.items():
        lines.append(f"launcher, {what}: {first:g} after the first fault, {last:g} at the end")
    lines += [f"outlived the run: process {pid}" for pid in report.orphans]
    if report.failure:
        lines.append(f"FAILED: {report.failure}")
    elif report.differences:
        lines += ["FAILED: the final state differs from that of a clean run:", *report.differences]
    else:
        lines.append("the final state equals that of a clean run, bit for bit")
    return "\n".join(lines)


def _line(each: Struck) -> str:
    parts = [each.fault if each.fault.count(":") else f"{each.fault} at step {each.step}"]
    if each.detected_s is not None:
        parts.append(f"detected after {each.detected_s:.2f} s")
    if each.recovered_s is not None:
        parts.append(f"recovered after {each.recovered_s:.2f} s, {each.lost_steps} steps lost")
    if each.said:
        parts.append(each.said)
    if each.attributed is False:
        parts.append("WRONGLY ATTRIBUTED")
    if not each.survived:
        parts.append("NOT SURVIVED")
    return "; ".join(parts)


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    p95 = known[min(len(known) - 1, round(0.95 * (len(known) - 1)))]
    return {"median": statistics.median(known), "p95": p95, "largest": known[-1]}


def _shown(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "none was measured"
    return f"median {spread['median']:.2f}, 95% {spread['p95']:.2f}, largest {spread['largest']:.2f}"
