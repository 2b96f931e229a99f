"""`moe-runtime report`, in this process: what it writes, what it serves, and what it refuses."""

import gzip
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest

from moe_runtime.cli.app import app
from moe_runtime.cli.usage import run_typer
from moe_runtime.errors import MoeRuntimeError
from moe_runtime.metrics.files import METRICS_FILE
from moe_runtime.metrics.report.serve import ReportServer, open_server
from tests.arch.sources import ROOT
from tests.unit.metrics.report.made_run import make_run
from tests.unit.metrics.report.read_page import Page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "made", steps=20)


@pytest.fixture
def server(run: Path) -> Iterator[ReportServer]:
    with open_server(run, 0) as opened:
        thread = threading.Thread(target=opened.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield opened
        opened.shutdown()
        thread.join()


def _ask(server: ReportServer, path: str, **headers: str) -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_a_report_is_one_file_beside_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_typer(app, "moe-runtime", ["report", str(run)])
    assert capsys.readouterr().out.startswith(f"{run}/report.html: 20 steps, ")
    assert Page((run / "report.html").read_text()).curve("loss").keys() == {*range(1, 21)}
    assert [path.name for path in run.glob(".*")] == []  # nothing half written is left


def test_what_is_no_regular_file_is_written_in_place(
    run: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target.html"
    os.mkfifo(pipe)
    link.symlink_to(target)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(run_typer, app, "moe-runtime", ["report", str(run), "--out", str(pipe)])
        got = b""
        while not writing.done() or select.select([reader], [], [], 0)[0]:
            select.select([reader], [], [], 0.05)
            with suppress(BlockingIOError):
                part = os.read(reader, 1 << 20)
                got += part
                if writing.done() and not part:
                    break
        writing.result()
    os.close(reader)
    assert pipe.is_fifo() and got.startswith(b"<!doctype html>") and got.endswith(b"</html>")
    run_typer(app, "moe-runtime", ["report", str(run), "--out", str(link)])
    assert link.is_symlink() and target.read_bytes().startswith(b"<!doctype html>")
    capfdbinary.readouterr()
    run_typer(app, "moe-runtime", ["report", str(run), "--out", "/dev/fd/1"])
    told = capfdbinary.readouterr()
    assert told.out.startswith(b"<!doctype html>") and told.out.endswith(b"</html>")
    assert told.err.startswith(b"/dev/fd/1: 20 steps")


@pytest.mark.parametrize("command", [["report", "--out"], ["dashboard", "--json"]])
def test_a_full_device_is_told_and_stays_one(command: list[str], run: Path) -> None:
    full = Path("/dev/full")
    if not full.is_char_device():
        pytest.skip("/dev/full is no device here")
    name, option = command
    before = full.stat()
    given = [str(run)] if name == "report" else []
    with pytest.raises(MoeRuntimeError, match="No space left on device") as caught:
        run_typer(app, "moe-runtime", [name, *given, option, str(full)])
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert full.is_char_device() and os.path.samestat(before, full.stat())


def test_links_of_a_report_elsewhere_lead_to_the_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "other" / "of run.html"
    out.parent.mkdir()
    run_typer(app, "moe-runtime", ["report", str(run), "--out", str(out)])
    links = [link for link in Page(out.read_text()).links if link[0] != "#"]
    assert len(links) == 4 and all((out.parent / link).is_file() for link in links)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{tmp}/absent"], "absent: expected a run folder, got no folder"),
        (["{tmp}"], "expected a run folder, got one without config.yaml"),
        (["{run}/.."], "did you mean {run}/../made?"),
        (["{run}", "--out", "{tmp}"], "expected a file to write, got: it is a folder"),
        (
            ["{run}", "--out", "{tmp}/no/such/x.html"],
            "got: No such file or directory; choose another with --out",
        ),
        (["{run}", "--serve", "--out", "x.html"], "expected one of --serve and --out, got both"),
        (["{run}", "--port", "8000"], "--port 8000 is of --serve, which was not given"),
        (["{run}", "--serve", "--port", "70000"], "65535"),
        ([], "Missing argument"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], says: str, run: Path, tmp_path: Path) -> None:
    given = [word.format(run=run, tmp=tmp_path) for word in arguments]
    with pytest.raises(MoeRuntimeError) as caught:
        run_typer(app, "moe-runtime", ["report", *given])
    assert says.format(run=run) in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_port_in_use_is_told_and_the_usual_one_is_not_insisted_on(run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            MoeRuntimeError, match=f"--port {port}: expected a port that is free, got: Address"
        ):
            open_server(run, port)
    with open_server(run, None) as first, open_server(run, None) as second:
        assert first.server_address[1] != second.server_address[1]
        assert {first.server_address[0], second.server_address[0]} == {"127.0.0.1"}


def test_a_live_page_hears_of_new_steps_and_of_nothing_else(server: ReportServer, run: Path) -> None:
    _, body = _ask(server, "/")
    assert Page(body.decode()).mistakes == [] and b'data-live="yes"' in body
    answer, news = _ask(server, "/news?have=")
    told = json.loads(gzip.decompress(news))
    assert answer.status == 200 and told["data"]["lastStep"] == 20
    assert _ask(server, f"/news?have={told['signature']}")[0].status == 204
    line = (run / METRICS_FILE).read_text().splitlines()[-1]
    with (run / METRICS_FILE).open("a") as file:
        file.write(line.replace('"step": 20', '"step": 21') + "\n")
    again = json.loads(gzip.decompress(_ask(server, f"/news?have={told['signature']}")[1]))
    assert told["data"]["load"]["experts"] == 8 and again["data"]["load"] is None  # which has not changed
    assert again["data"]["lastStep"] == 21 and again["texts"]["summary"] != told["texts"]["summary"]


def test_a_server_gives_the_files_of_the_run_and_no_others(server: ReportServer, run: Path) -> None:
    answer, body = _ask(server, f"/{METRICS_FILE}")
    assert body == (run / METRICS_FILE).read_bytes()
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    (run / "secret.txt").write_text("x")
    for path in (
        "/secret.txt",
        "/../made/secret.txt",
        "/%2e%2e/made/secret.txt",
        "/etc/passwd",
        "//etc/passwd",
    ):
        assert _ask(server, path)[0].status == 404
    (run / "secret.txt").unlink()


def test_head_answers_as_get_does_without_the_body(server: ReportServer) -> None:
    connection = HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    for path, kind in (("/", "text/html; charset=utf-8"), (f"/{METRICS_FILE}", "text/plain; charset=utf-8")):
        connection.request("HEAD", path)
        answer = connection.getresponse()
        assert (answer.status, answer.headers["Content-Type"], answer.read()) == (200, kind, b"")
        connection.close()


def test_a_request_that_names_another_host_is_refused(server: ReportServer) -> None:
    assert _ask(server, "/", Host="evil.example:80")[0].status == 403
    assert _ask(server, "/news?have=x", Host="localhost:1")[0].status == 200


@pytest.mark.parametrize("end", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_ends_a_server_quietly(end: signal.Signals, run: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_runtime", "report", str(run), "--serve", "--port", "0"],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first.startswith(f"{run} at http://127.0.0.1:"), first
    process.send_signal(end)
    rest = process.stdout.read()
    assert process.wait(timeout=20) == 0 and rest.splitlines()[-1] == "ended"
