"""What launch.sh installs is what pyproject.toml allows: else a fresh machine could not be set up."""

import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.arch.sources import ROOT

# Comes with torch where there are GPUs, in the version that torch asks for.
_UNPINNED = {"triton"}


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def _requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(text) for group in (project["dependencies"], *extras) for text in group]


def test_every_requirement_is_pinned_to_a_version_that_it_allows() -> None:
    pins = _pins()
    for requirement in _requirements():
        name = canonicalize_name(requirement.name)
        if name not in _UNPINNED:
            assert name in pins, f"constraints.txt has no version of {name}"
            assert requirement.specifier.contains(pins[name]), f"{requirement} does not allow {pins[name]}"


def test_constraints_are_plain_versions_without_the_mark_of_one_machine() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    odd = [
        line for line in lines if line[:1] != "#" and not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][^+ ]*", line)
    ]
    assert not odd, "a version such as 2.13.0+cpu can be had from one index alone"
