"""`moe-runtime doctor`: looks at this machine and this installation, and says what to do."""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import typer

from moe_runtime.cli.doctor import backends, machine, network, software, wandb_state
from moe_runtime.cli.doctor.finding import Finding, exit_code
from moe_runtime.config.secrets import redact

# The slow ones first: each waits for processes of its own, at the same time as the others.
_LOOKS: dict[str, Callable[[], Iterable[Finding]]] = {
    "torch": backends.look_at_torch,
    "MPI": backends.look_at_mpi,
    "software": software.look,
    "machine": machine.look,
    "network": network.look,
    "W&B": wandb_state.look,
}
_ORDER = ("software", "torch", "MPI", "machine", "network", "W&B")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of text")] = False,
) -> int:
    """Look for what keeps runs from starting; exit code 0: nothing, 1: warnings, 2: failures."""
    findings = examine()
    code = exit_code(findings)
    if as_json:
        typer.echo(redact(json.dumps({"exit_code": code, "findings": [one.fields() for one in findings]})))
    else:
        typer.echo(redact(page(findings)))
    return code


def examine() -> list[Finding]:
    """All findings, group by group; takes less than ten seconds whatever hangs."""
    with ThreadPoolExecutor(len(_LOOKS)) as pool:
        looks = {name: pool.submit(_all_of, name, look) for name, look in _LOOKS.items()}
        return [finding for name in _ORDER for finding in looks[name].result()]


def _all_of(name: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(look())
    except Exception as error:
        # A doctor that falls ill of a strange machine is of no use: what it could not look at it says.
        said = f"could not be looked at: {type(error).__name__}: {error}"
        found.append(Finding(name, "warn", " ".join(said.split()), "moe-runtime doctor --json"))
    return found


def page(findings: list[Finding]) -> str:
    """One line for each finding, the command that mends it below it, and a line on all of them."""
    width = max(len(one.name) for one in findings)
    lines = []
    for one in findings:
        lines.append(f"{one.state:<4}  {one.name:<{width}}  {one.said}")
        if one.mend is not None:
            lines.append(f"{'':<6}{'':<{width}}  -> {one.mend}")
    counts = {state: sum(one.state == state for one in findings) for state in ("fail", "warn", "note")}
    if not counts["fail"] and not counts["warn"]:
        last = "runs will start here; try: moe-runtime train quickstart"
    else:
        last = f"{counts['fail']} to mend before runs will work, {counts['warn']} to look at"
    return "\n".join([*lines, "", last])
