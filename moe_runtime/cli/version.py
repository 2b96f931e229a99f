"""`moe-runtime --version`."""

from importlib.metadata import PackageNotFoundError, version

import typer


def package_version() -> str:
    """The version that is installed, or what a folder of sources without installation is."""
    try:
        return version("moe_runtime")
    except PackageNotFoundError:
        return "not installed"


def show_version(wanted: bool) -> None:
    """Prints the versions that decide how a run behaves, if they are wanted, and ends."""
    if wanted:
        typer.echo(f"moe-runtime {package_version()}")
        raise typer.Exit
