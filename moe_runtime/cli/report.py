"""`moe-runtime report`: a run as one HTML file, or as a page that follows it."""

import os
import signal
import sys
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from moe_runtime.errors import ConfigError

_SIGNS = ("config.yaml", "metrics.jsonl", "events.jsonl")  # any of them makes a folder a run folder

RunDir = Annotated[Path, typer.Argument(help="run folder, such as runs/quickstart")]
Out = Annotated[Path | None, typer.Option(help="file to write [default: RUN_DIR/report.html]")]
Serve = Annotated[
    bool, typer.Option("--serve", help="a page on this machine that follows the run, until Ctrl-C")
]
Port = Annotated[
    int | None, typer.Option(min=0, max=65535, help="of --serve; 0: any [default: 8712, or any if taken]")
]
Open = Annotated[bool, typer.Option("--open", help="open it in the browser")]


def report(
    run_dir: RunDir, out: Out = None, serve: Serve = False, port: Port = None, open_it: Open = False
) -> None:
    """Show a run: one self-contained HTML file, or with --serve a live page."""
    if serve and out is not None:
        raise ConfigError("report: expected one of --serve and --out, got both; leave one out")
    if port is not None and not serve:
        raise ConfigError(f"report: --port {port} is of --serve, which was not given; add --serve")
    _require_run(run_dir)
    # Imported here: `--help` should not wait for it.
    from moe_runtime.metrics.report.bokeh_parts import require_bokeh

    require_bokeh()
    if serve:
        _serve(run_dir, port, open_it)
    else:
        _write(run_dir, out or run_dir / "report.html", open_it)


def _require_run(run_dir: Path) -> None:
    if not run_dir.is_dir():
        other = Path("runs") / run_dir
        hint = f"did you mean {other}?" if other.is_dir() else "give the folder that `train` wrote, runs/NAME"
        raise ConfigError(f"{run_dir}: expected a run folder, got no folder; {hint}")
    if not any((run_dir / name).exists() for name in _SIGNS):
        inside = sorted(path.parent.name for name in _SIGNS for path in run_dir.glob(f"*/{name}"))
        hint = f"did you mean {run_dir / inside[-1]}?" if inside else "give the folder that `train` wrote"
        raise ConfigError(f"{run_dir}: expected a run folder, got one without {' or '.join(_SIGNS)}; {hint}")


def _write(run_dir: Path, out: Path, open_it: bool) -> None:
    from moe_runtime.metrics.report.html import page
    from moe_runtime.metrics.report.run_view import RunView

    view = RunView(run_dir)
    view.look()
    text = page(view, out.parent).encode()
    try:
        is_output = _is_output(out)
        if is_output:
            sys.stdout.buffer.write(text)
            sys.stdout.flush()
        else:
            _put(text, out)
    except OSError as error:
        got = error.strerror or str(error)
        raise ConfigError(f"{out}: expected a file to write, got: {got}; choose another with --out") from None
    typer.echo(f"{out}: {view.history.last_step:,} steps, {len(text) / 1e6:.2f} MB", err=is_output)
    if open_it:
        _open(out.resolve().as_uri())


def _is_output(out: Path) -> bool:
    """Whether a file is our standard output, such as /dev/stdout: what we say must then go elsewhere."""
    try:
        return os.path.samestat(out.stat(), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):  # not there, or an output without a descriptor
        return False


def _put(text: bytes, out: Path) -> None:
    """Write a file as a whole: aside, then renamed over the old one.

    Devices, pipes and links are written in place: to rename over one would put a file where it was.
    """
    if out.is_dir():
        raise IsADirectoryError(21, "it is a folder")
    if out.is_symlink() or (out.exists() and not out.is_file()):
        out.write_bytes(text)
        return
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        aside.write_bytes(text)
        os.replace(aside, out)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        raise


def _serve(run_dir: Path, port: int | None, open_it: bool) -> None:
    from moe_runtime.metrics.report.serve import HOST, open_server

    try:
        with _until_told(), open_server(run_dir, port) as server:
            typer.echo(f"{run_dir} at {server.address} (this machine alone); Ctrl-C ends it")
            own = f"{server.server_address[1]}:{HOST}:{server.server_address[1]}"
            typer.echo(f"from elsewhere: ssh -L {own} {os.uname().nodename}")
            if open_it:
                _open(server.address)
            server.serve_forever(poll_interval=0.2)
    except (KeyboardInterrupt, _Stopped):
        typer.echo("ended")


class _Stopped(Exception):
    """SIGTERM came."""


@contextmanager
def _until_told() -> Iterator[None]:
    """SIGTERM ends a server as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _open(address: str) -> None:
    if not webbrowser.open(address):
        typer.echo(f"no browser could be started; open {address}")
