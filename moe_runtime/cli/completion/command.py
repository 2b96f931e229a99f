"""`moe-runtime completion`: what a shell loads to complete command lines; it then calls `complete`."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from moe_runtime.cli.completion.scripts import SCRIPTS
from moe_runtime.config.closest import did_you_mean
from moe_runtime.errors import ConfigError

_MARK = "# moe-runtime: completion"


def completion(
    shell: Annotated[str | None, typer.Argument(help="bash, zsh or fish [default: that of $SHELL]")] = None,
    install: Annotated[
        bool, typer.Option("--install", help="write it into your home folder, and have your shell load it")
    ] = False,
) -> None:
    """Print the script that completes commands, options, configs, runs and a.b= in your shell."""
    name = shell or Path(os.environ.get("SHELL", "")).name
    if name not in SCRIPTS:
        hint = did_you_mean(name, SCRIPTS)
        raise ConfigError(f"completion: expected {', '.join(SCRIPTS)}, got {name or 'no shell'}{hint}")
    if not install:
        typer.echo(SCRIPTS[name], nl=False)
        return
    script, start_file = _write(name)
    told = f" (loaded by {start_file})" if start_file is not None else ""
    typer.echo(f"{script}{told}; open a new shell, or: source {script}")


def _write(shell: str) -> tuple[Path, Path | None]:
    """Writes the script; returns it, and the start file that loads it where the shell does not by itself."""
    home = Path.home()
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share")
    places = {
        "fish": (config / "fish/completions/moe-runtime.fish", None),
        "bash": (data / "moe_runtime/completion.bash", home / ".bashrc"),
        "zsh": (
            data / "moe_runtime/completion.zsh",
            Path(os.environ.get("ZDOTDIR") or home) / ".zshrc",
        ),
    }
    script, start_file = places[shell]
    try:
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(SCRIPTS[shell])
        if start_file is not None:
            _load_from(start_file, script, shell)
    except OSError as error:
        raise ConfigError(
            f"completion: {error.filename} cannot be written: {error.strerror}; print the script without "
            "--install and load it yourself"
        ) from None
    return script, start_file


def _load_from(start_file: Path, script: Path, shell: str) -> None:
    """Adds the line that loads the script, once."""
    text = start_file.read_text() if start_file.exists() else ""
    if _MARK in text:
        return
    ready = "autoload -Uz compinit && compinit; " if shell == "zsh" and "compinit" not in text else ""
    line = f"{ready}[ -r {shlex.quote(str(script))} ] && . {shlex.quote(str(script))}  {_MARK}\n"
    start_file.write_text(f"{text}{'' if text.endswith(chr(10)) or not text else chr(10)}{line}")


def complete(
    words: Annotated[
        list[str] | None, typer.Argument(help="words after the program, the last one begun")
    ] = None,
    line: Annotated[
        str | None, typer.Option(help="the line up to the cursor instead, as bash has it")
    ] = None,
) -> None:
    """What a command line may go on with, one a line: the word, a tab, what it is."""
    from moe_runtime.cli.app import app
    from moe_runtime.cli.completion.engine import complete as find

    given = split_line(line)[1:] if line is not None else list(words or [""])
    found = find(app, given[:-1], given[-1]) if given else []
    for one in found:
        typer.echo(f"{one.word}\t{' '.join(one.help.split())}")


def split_line(line: str) -> list[str]:
    """The words of a line that is being typed; the last one may be empty, or have an open quote."""
    for end in ("", '"', "'"):
        try:
            words = shlex.split(line + end)
        except ValueError:
            continue
        is_new = not end and (not line or (line[-1].isspace() and not line.endswith("\\ ")))
        return [*words, ""] if is_new else words
    return [*line.split(), ""]
