"""From a YAML file and overrides to one validated `RunConfig`, and back to YAML.

    files and overrides -> one plain dict (`tree`) -> one pydantic validation -> rules between sections

Whatever is wrong is said in one `ConfigError`, a line for each mistake: file and line (or `override`),
key path, what was expected, what was got.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moe_runtime.config.closest import closest
from moe_runtime.config.explain import explain
from moe_runtime.config.finding import Finding
from moe_runtime.config.roots import config_names, config_roots
from moe_runtime.config.rules import cross_findings, parts_of
from moe_runtime.config.schema import RunConfig
from moe_runtime.config.secrets import find_secrets
from moe_runtime.config.suggest import section_at
from moe_runtime.config.tree import Tree, dump_text, read_file, read_overrides, shown
from moe_runtime.errors import ConfigError

_SUFFIXES = ("", ".yaml", ".yml")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Loads a run.

    Args:
        path: a file, a run folder, or the name of a file under `configs/run`.
        overrides: `section.key=value`, the value in YAML; they win over the file.

    Raises:
        ConfigError: one line for each mistake.
    """
    tree, file = read_tree(path, overrides)
    _refuse_secrets(tree, file)
    config, findings = _validate(tree.values)
    lines = [*tree.mistakes, *(_line(finding, tree, file) for finding in findings)]
    if lines or config is None:
        raise ConfigError("\n".join(lines))
    return config


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Tree, str]:
    """File, bases and overrides merged, not yet validated; and the file's name as a user would type it.

    Raises:
        ConfigError: a file is missing, or is no YAML.
    """
    file = find_config(path)
    tree = read_file(file, _find_base)
    for override in read_overrides(tuple(overrides)):
        tree.merge(override)
    return tree, shown(file)


def _refuse_secrets(tree: Tree, file: str) -> None:
    """Before anything else is said of them: other messages repeat what was given."""
    found = [f"{tree.place(path, file)}: {'.'.join(path)}" for path in find_secrets(tree.values)]
    if found:
        text = "looks like a secret, and configs are written into run folders; set it in the environment"
        raise ConfigError("\n".join(f"{where}: {text}, such as WANDB_API_KEY" for where in found))


def sections_of(path: str | Path) -> set[str]:
    """The top-level keys of a config file and its bases; those of a model config are `model` alone.

    Raises:
        ConfigError: no such file, or it cannot be read.
    """
    return set(read_file(find_config(path), _find_base).values)


def dump_config(config: RunConfig) -> str:
    """The run as YAML without bases; `load_config` of it gives an equal run."""
    return dump_text(config.model_dump(mode="json"))


def find_config(name: str | Path) -> Path:
    """The file that a user means by `quickstart`, `configs/run/quickstart.yaml`, `run/x` or a run folder.

    Raises:
        ConfigError: there is none; names the ones that come close.
    """
    given = Path(os.path.expanduser(name))
    folders = [Path(), *(root / sub for root in config_roots() for sub in ("run", "", ".."))]
    for folder in folders:
        for suffix in _SUFFIXES:
            candidate = folder / f"{given}{suffix}"
            if candidate.is_file():
                return candidate
        if (folder / given / "config.yaml").is_file():
            return folder / given / "config.yaml"
    word = str(name) if str(name).isprintable() and str(name) else repr(str(name))
    if str(name) and given.exists():
        got = "a folder without config.yaml" if given.is_dir() else "something else"
        raise ConfigError(f"{word}: expected a regular file, a run folder or the name of a config, got {got}")
    known = config_names("run")
    close = closest(str(given).removesuffix(given.suffix), known) or closest(given.stem, known)
    near = f"did you mean {close[0]}?" if close else _near_run(given)
    hint = near or f"in configs/run: {', '.join(known)}"
    raise ConfigError(f"{word}: no such config file; {hint}")


def _near_run(given: Path) -> str:
    """`did you mean X?` with a run folder beside the one that is not there."""
    runs = [folder.parent.name for folder in given.parent.glob("*/config.yaml")]
    close = closest(given.name, runs)
    return f"did you mean {given.parent / close[0]}?" if close else ""


def _find_base(name: str, file: Path) -> Path:
    """A base is named relative to the file, to a `configs` folder above it, or to the known ones."""
    above = [folder for folder in file.resolve().parents if folder.name == "configs"]
    folders = [file.parent, *above, *config_roots()]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    # Without suffixes, which make any two names look alike.
    known = {str(f.relative_to(top).with_suffix("")): f for top in folders[1:] for f in top.rglob("*.yaml")}
    close = closest(str(Path(name).with_suffix("")), sorted(known))
    hint = f"did you mean {close[0]}.yaml?" if close else "give it relative to configs/ or to the file"
    raise ConfigError(f"{shown(file)}: bases: no such file {name}; {hint}")


def _validate(values: dict[str, Any]) -> tuple[RunConfig | None, list[Finding]]:
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        return None, [*explain(error), *cross_findings(_sound_parts(values, error))]
    return config, cross_findings(parts_of(config))


def _sound_parts(values: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    """The parts of a faulty run that are valid by themselves, unknown keys put aside."""
    unknown = {item["loc"] for item in error.errors() if item["type"] == "extra_forbidden"}
    known = _without(values, unknown)
    parts: dict[str, Any] = {}
    for name, info in RunConfig.model_fields.items():
        section = section_at((name,))
        if section is not None:
            try:
                parts[name] = section.model_validate(known.get(name, {}))
            except ValidationError:
                continue
        elif not any(item["loc"][:1] == (name,) for item in error.errors()):
            parts[name] = known.get(name, info.default)
    return parts


def _without(values: dict[str, Any], unknown: set[tuple[int | str, ...]], path: tuple[str, ...] = ()) -> Any:
    return {
        key: _without(value, unknown, (*path, key)) if isinstance(value, dict) else value
        for key, value in values.items()
        if (*path, key) not in unknown
    }


def _line(finding: Finding, tree: Tree, file: str) -> str:
    path = tuple(finding.key.split("."))
    return f"{tree.place(path, file)}: {finding.key}: {finding.text}"
