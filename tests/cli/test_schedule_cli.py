"""`moe-runtime schedule`, in this process: what it prints, draws and refuses."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from moe_runtime.cli.app import app
from moe_runtime.cli.usage import run_typer
from moe_runtime.errors import MoeRuntimeError
from moe_runtime.planner.costs import Costs, StageCosts
from moe_runtime.planner.simulate import simulate
from moe_runtime.planner.trace import write_trace
from moe_runtime.schedule import BUILDERS, Program, build, lower
from tests.unit.planner.synthetic import trace_of

SIZES = ("--ranks", "4", "--microbatches", "8")


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]):
    """Runs the command; gives what it printed."""

    def run(*arguments: str) -> str:
        assert run_typer(app, "moe-runtime", ["schedule", *arguments]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A step of DualPipe in milliseconds, its pairs hiding nine tenths."""
    program = build("dualpipe", 4, 8)
    costs = Costs((StageCosts(0.01, 0.01, 0.01, 0.004, 0.004),) * 4, hidden=0.9)
    path = tmp_path / "trace.json"
    write_trace(trace_of(simulate(program, costs), program), path)
    return path


def refusal(*arguments: str) -> str:
    """The one line with which a command is refused."""
    with pytest.raises(MoeRuntimeError) as caught:
        run_typer(app, "moe-runtime", ["schedule", *arguments])
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(set(BUILDERS) - {"single"}))
def test_every_schedule_is_printed_checked_and_simulated(name: str, say) -> None:
    fields = json.loads(say(name, *SIZES, "--json"))
    assert Program.from_text(fields["program"]) == build(name, 4, 8)
    assert fields["report"]["peak_live"] and fields["makespan"] >= fields["lower_bound"] - 1e-9
    assert len(fields["bubble"]) == len(fields["parameters"]) == 4
    # One P-th of the model and a microbatch cost F + I + W = 3; 8 of them keep a rank busy for 24.
    assert fields["makespan"] == pytest.approx(24 + fields["bubble"][0])


def test_text_output_has_rows_figures_and_the_gantt_chart(say) -> None:
    out = say("dualpipe", *SIZES)
    assert build("dualpipe", 4, 8).to_text() in out
    assert "makespan 26 (lower bound" in out and "bubble 7.7%" in out
    assert "0     0 3'    2x          5" in out  # rank, stages, parameters, peak live
    assert len([line for line in out.splitlines() if line.startswith("rank ")]) == 5


def test_costs_change_the_simulation(say) -> None:
    fields = json.loads(say("1f1b", *SIZES, "--costs", "F=2,B=6", "--json"))
    assert fields["bubble"] == pytest.approx([3 * 8.0] * 4)  # (P-1)(F+B)
    fields = json.loads(say("dualpipe", *SIZES, "--costs", "F=1,I=1,W=1,C=0.5,H=0.9", "--json"))
    assert fields["hidden_in_pairs_fraction"] == pytest.approx(0.9)


def test_text_of_a_program_is_read_back_as_a_program_file(say, tmp_path: Path) -> None:
    path = tmp_path / "program.txt"
    path.write_text(say("dualpipe", *SIZES, "--lowered", "--text"))
    assert Program.from_text(path.read_text()) == lower(build("dualpipe", 4, 8))
    assert "makespan 26 (" in say(str(path))


def test_svg_is_drawn_for_schedules_and_traces(say, tmp_path: Path, trace: Path) -> None:
    for number, arguments in enumerate([("dualpipe", *SIZES), ("--trace", str(trace))]):
        path = tmp_path / f"{number}.svg"
        say(*arguments, "--svg", str(path))
        entries = [each for each in ElementTree.parse(path).iter() if each.get("class") == "entry"]
        assert len(entries) == sum(map(len, build("dualpipe", 4, 8).rows))


def test_a_trace_is_set_beside_its_simulation(say, trace: Path) -> None:
    fields = json.loads(say("--trace", str(trace), "--json"))
    assert fields["measured_over_simulated"] == pytest.approx(1, abs=1e-3)
    assert fields["measured"]["hidden_in_pairs_fraction"] == pytest.approx(0.9, abs=1e-3)
    assert fields["costs"]["stages"][0]["forward"] == pytest.approx(0.01, abs=1e-6)
    out = say("--trace", str(trace))
    assert out.startswith("dualpipe, step 3, measured") and "measured / simulated: 1.000" in out


def test_costs_of_a_trace_serve_any_schedule(say, trace: Path) -> None:
    fields = json.loads(say("1f1b", "--ranks", "2", "--microbatches", "8", "--costs", str(trace), "--json"))
    # Half the model is two of the four stages; an F and a B alone take 14 and 24 ms in each.
    assert fields["makespan"] == pytest.approx((8 + 1) * 2 * 0.038, rel=1e-3) and fields["unit"] == "s"


def test_all_compares_schedules_and_says_what_is_left_out(say) -> None:
    arguments = ("all", "--ranks", "2", "--microbatches", "5", "--costs", "F=1,B=2,C=0.5")
    fields = json.loads(say(*arguments, "--json"))
    names = [each["schedule"] for each in fields["schedules"]]
    spans = [each["makespan"] for each in fields["schedules"]]
    assert spans == sorted(spans) and {"1f1b", "zbv"} <= set(names)
    assert set(fields["refused"]) == {"single", "dualpipe"}
    out = say(*arguments)
    assert "not admitted: schedule dualpipe: 5 microbatches" in out and "above bound" in out


def test_the_searched_schedule_is_no_worse_than_any_other(say) -> None:
    arguments = ("--ranks", "2", "--microbatches", "4", "--costs", "F=1,B=2,C=0.5")
    found = json.loads(say("searched", *arguments, "--json"))
    Program.from_text(found["program"]).check()
    others = json.loads(say("all", *arguments, "--json"))["schedules"]
    assert found["makespan"] <= min(each["makespan"] for each in others) + 1e-9


def test_a_program_over_the_cap_is_marked(say) -> None:
    assert "memory 5 is over the cap of 4" in say("dualpipe", *SIZES, "--cap", "4")
    assert "over the cap" not in say("dualpipe", *SIZES, "--cap", "5")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "expected a NAME"),
        (("dualpip", *SIZES), "did you mean dualpipe?"),
        (("dualpipe", "--ranks", "3", "--microbatches", "6"), "nearest: 2 or 4"),
        (("1f1b", "--ranks", "3"), "got no --microbatches"),
        (("1f1b", "--ranks", "0", "--microbatches", "3"), "--ranks"),
        (("1f1b", *SIZES, "--chunks", "2"), "schedule 1f1b"),
        (("1f1b", *SIZES, "--cap", "inf"), "--cap: expected a number"),
        (("1f1b", *SIZES, "--svg", "/nowhere/x.svg"), "cannot be written"),
        (("all", *SIZES, "--svg", "x.svg"), "show one schedule"),
        (("1f1b", "--trace", "x.json"), "got NAME too"),
        (("--trace", "x.json", "--lowered"), "got --lowered too"),
        (("--trace", "/nowhere/x.json"), "/nowhere/x.json: cannot be read"),
        (("/nowhere/x.txt",), "no such program file"),
        (("1f1b", *SIZES, "--costs", "F=1,X=2"), "got 'X=2'"),
        (("1f1b", *SIZES, "--costs", "F"), "F: expected 0 or a number"),
        (("1f1b", *SIZES, "--costs", ""), "expected KEY=NUMBER"),
        (("1f1b", *SIZES, "--costs", "F=nan"), "got 'nan'"),
        (("1f1b", *SIZES, "--costs", "F=-1"), "got '-1'"),
        (("1f1b", *SIZES, "--costs", "F=inf"), "got 'inf'"),
        (("1f1b", *SIZES, "--costs", "F=1,F=1"), "F twice"),
        (("1f1b", *SIZES, "--costs", "H=1.5"), "H: expected a share"),
        (("1f1b", *SIZES, "--costs", "F=0,B=0"), "no time"),
        (("1f1b", *SIZES, "--costs", "B=2,I=1,W=2"), "expected B = I + W"),
        (("1f1b", *SIZES, "--costs", "B=2,W=3"), "expected B = I + W"),
        (("1f1b", *SIZES, "--costs", "none.json"), "none.json: cannot be read"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments: tuple[str, ...], says: str) -> None:
    assert says in refusal(*arguments)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "expected a header"),
        (b"x microbatches=1 placement=0\n0: 0F0 0Q0\n", "got '0Q0'"),
        (b"x microbatches=1 placement=0\n0: 0B0 0F0\n", "rank 0, entry 0 (0B0)"),
        (b"\xff\xfe", "got no text"),
    ],
)
def test_a_wrong_program_file_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "program.txt"
    path.write_bytes(content)
    assert says in refusal(str(path))


def test_a_trace_without_all_its_entries_is_refused(trace: Path) -> None:
    chrome = json.loads(trace.read_text())
    chrome["traceEvents"] = [event for event in chrome["traceEvents"] if event["name"] != "3F0"]
    trace.write_text(json.dumps(chrome))
    message = refusal("--trace", str(trace))
    assert message.startswith(str(trace)) and "got no 3F0" in message


def test_the_command_brings_no_torch() -> None:
    program = "import sys; import moe_runtime.cli.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
