"""Which rank a process is, from the words of whoever started it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.cli.launchers import environment
from moe_runtime.cli.launchers.environment import claim_rank, find_place, rank_here
from moe_runtime.cli.launchers.slurm_nodes import adopt_limits, meeting_point, node_names, tasks_per_node
from moe_runtime.errors import ConfigError

_HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
_OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
_SRUN = {
    "SLURM_JOB_ID": "31999",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
_MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("words", [_HYDRA, _OPEN_MPI, _SRUN], ids=["Hydra", "Open MPI", "srun"])
def test_every_starter_is_understood_to_mean_the_same(words: dict[str, str]) -> None:
    environ = words | _MASTER
    assert rank_here(environ) == 5
    claim_rank(environ)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [environ[name] for name in names] == ["5", "8", "1", "4", "127.0.0.1", "29500"]
    assert int(environ["OMP_NUM_THREADS"]) >= 1


def test_mpiexec_within_a_job_of_slurm_counts_first() -> None:
    helper = _SRUN | {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    place = find_place(helper | _HYDRA)
    assert place is not None and (place.starter, place.rank, place.world_size) == ("mpiexec", 5, 8)


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"},  # a batch script
        _SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # an interactive shell
        _HYDRA | {"PMI_SIZE": "1", "PMI_RANK": "0"},
    ],
)
def test_a_process_on_its_own_is_no_rank(words: dict[str, str]) -> None:
    environ = dict(words)
    assert rank_here(environ) is None
    claim_rank(environ)
    assert environ == words


def test_the_words_of_torchrun_stand_and_deepspeed_lacks_one() -> None:
    words = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "2",
        "CROSS_SIZE": "2",
        **_MASTER,
    }
    environ = dict(words | _SRUN)
    claim_rank(environ)
    assert environ["RANK"] == "3" and environ["LOCAL_WORLD_SIZE"] == "2"
    for local in ("1", "3"):  # machines of 3 and 1: their ranks would not agree
        environ = words | {"LOCAL_SIZE": local}
        claim_rank(environ)
        assert "LOCAL_WORLD_SIZE" not in environ


def test_ranks_of_one_machine_meet_on_loopback_under_srun() -> None:
    environ = _SRUN | {"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_NODEID": "0", "SLURM_LOCALID": "5"}
    claim_rank(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("127.0.0.1", "28001")
    assert environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_ranks_of_several_machines_meet_on_the_first_host_of_the_step() -> None:
    assert meeting_point(_SRUN) == ("gpu07", 20_000 + (31_999 + 2) % 12_000)
    with pytest.raises(ConfigError, match="SLURM_STEP_NODELIST: expected the machines"):
        meeting_point({})


def test_where_the_masters_name_is_loopback_gloo_is_told_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Debian machine, which knows its own name as 127.0.1.1."""
    interfaces = {"127.0.0.1": "lo", "10.1.2.3": "ib0"}
    monkeypatch.setattr(environment.network, "address_towards", lambda host: "127.0.0.1")
    monkeypatch.setattr(environment.network, "own_address", lambda environ: "10.1.2.3")
    monkeypatch.setattr(environment.network, "interface_of", interfaces.get)
    environ = {
        "RANK": "0",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "me",
        "MASTER_PORT": "1",
    }
    claim_rank(environ)
    assert environ["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (_SRUN | {"SLURM_LOCALID": "2"}, "srun: expected the 4 ranks of a machine in a row, got rank 5"),
        (_HYDRA | {"MPI_LOCALNRANKS": "3"}, "mpiexec: expected the 3 ranks of a machine in a row"),
        (_HYDRA | {"PMI_RANK": "x"}, "PMI_RANK: expected the whole number of a launcher, got x"),
        (_SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4x2"}, "srun: expected tasks of machines such as"),
        (_SRUN | {"SLURM_NODEID": "2"}, "srun: expected SLURM_NODEID below 2, got 2"),
        (_SRUN | {"MASTER_ADDR": "a"}, "MASTER_ADDR: expected MASTER_ADDR and MASTER_PORT or neither"),
    ],
)
def test_what_does_not_fit_together_is_told(words: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        claim_rank(dict(words))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "counts"), [("4", [4]), ("4(x2),3", [4, 4, 3]), ("8(x1),2(x3)", [8, 2, 2, 2])]
)
def test_tasks_per_node_is_written_out(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("login", ["login"]),
        ("a,b.c-d", ["a", "b.c-d"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("gpu[1,3-4]-ib,x9", ["gpu1-ib", "gpu3-ib", "gpu4-ib", "x9"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("10.83.0.1,10.83.0.2", ["10.83.0.1", "10.83.0.2"]),
        ("", []),
    ],
)
def test_a_list_of_nodes_is_written_out(text: str, names: list[str]) -> None:
    assert node_names(text) == names


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 6), st.integers(1, 4)), min_size=1, max_size=4))
def test_any_ranges_give_as_many_names_in_order(ranges: list[tuple[int, int, int]]) -> None:
    texts = [f"{first:0{width}d}-{first + more:0{width}d}" for first, more, width in ranges]
    expected = [f"n{first + at:0{width}d}" for first, more, width in ranges for at in range(more + 1)]
    # A number that outgrows its width has more digits, as Slurm writes it.
    assert node_names(f"n[{','.join(texts)}]") == expected


@pytest.mark.parametrize("gpus", ["1", "h100:1"])
def test_a_task_with_cores_and_one_gpu_of_its_own_takes_them(gpus: str) -> None:
    environ = {"SLURM_CPUS_PER_TASK": "6", "SLURM_GPUS_PER_TASK": gpus, "LOCAL_RANK": "3"}
    adopt_limits(environ)
    assert environ["OMP_NUM_THREADS"] == "6" and environ["LOCAL_RANK"] == "0"
    environ = {"SLURM_GPUS_PER_TASK": "2", "LOCAL_RANK": "3"}
    adopt_limits(environ)
    assert environ["LOCAL_RANK"] == "3" and "OMP_NUM_THREADS" not in environ
