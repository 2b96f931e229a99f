"""Launchers meet, lose each other, come back, and hear how a run ended; here as threads over loopback."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError

from moe_runtime.cli.network import free_port
from moe_runtime.cli.supervise.job import Machines
from moe_runtime.cli.supervise.many_machines import ManyMachines
from moe_runtime.cli.supervise.meeting_place import Change
from moe_runtime.cli.supervise.outcome import Outcome
from moe_runtime.errors import ConfigError, PeerLost

_CONFIG = {"name": "run", "seed": 1}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


_made: list[ManyMachines] = []


@pytest.fixture(autouse=True)
def _all_end() -> Iterator[None]:
    """A thread that is inside the store when Python ends would abort it."""
    yield
    for machine in sorted(_made, key=lambda made: -made._machines.rank):  # machine 0 has the store
        machine.shutdown()
    _made.clear()


def _machine(rank: int, port: int, least: int, config: dict[str, Any] = _CONFIG) -> ManyMachines:
    place = Machines(least, 2, rank, "127.0.0.1", port, "127.0.0.1")
    _made.append(ManyMachines(place, config, timeout_s=20.0, rejoin_s=1.0))
    return _made[-1]


def _until(found: Callable[[], Any], limit_s: float = 30.0) -> Any:
    deadline = time.monotonic() + limit_s
    while not (value := found()):
        assert time.monotonic() < deadline, "did not come"
        time.sleep(0.1)
    return value


def _dies(machine: ManyMachines) -> None:
    """As if its process had been killed: no more heartbeats, and no goodbye."""
    machine._torch._stop_heartbeats()


@pytest.mark.slow
def test_a_machine_that_dies_is_missed_and_one_that_comes_back_is_waited_for(pool: ThreadPoolExecutor) -> None:
    port = free_port()
    zero, one = pool.map(lambda rank: _machine(rank, port, least=1), (0, 1))
    rounds = list(pool.map(lambda machine: machine.next_rendezvous(), (zero, one)))
    assert [(info.rank, info.world_size) for info in rounds] == [(0, 2), (1, 2)]
    stores = {(info.bootstrap_store_info.master_addr, info.bootstrap_store_info.master_port) for info in rounds}
    assert len(stores) == 1 and stores.pop()[0] == "127.0.0.1"
    assert zero.attempt == one.attempt == 1 and zero.token == one.token
    assert zero.changed() is None and one.changed() is None
    listening = [each.laddr for each in psutil.Process().net_connections("inet") if each.status == "LISTEN"]
    assert port in {address.port for address in listening}
    assert {address.ip for address in listening} == {"127.0.0.1"}
    _dies(one)
    assert _until(zero.changed) is Change.LEFT
    alone = zero.next_rendezvous()
    assert (alone.rank, alone.world_size, zero.attempt) == (0, 1, 2)
    again = pool.submit(lambda: _machine(1, port, least=1).next_rendezvous())
    assert _until(zero.changed) is Change.CAME
    assert zero.next_rendezvous().world_size == again.result(30).world_size == 2
    assert zero.attempt == 3


def test_all_wait_for_the_ranks_of_all_and_hear_how_a_run_ended(pool: ThreadPoolExecutor) -> None:
    port = free_port()
    zero, one = pool.map(lambda rank: _machine(rank, port, least=2), (0, 1))
    list(pool.map(lambda machine: machine.next_rendezvous(), (zero, one)))
    first = pool.submit(one.all_done)
    time.sleep(0.5)
    assert not first.done()
    assert zero.all_done() and first.result(10)
    teller = pool.submit(zero.tell, Outcome(1, "rank 0: a defect"))
    assert _until(one.changed) is Change.CLOSED
    with pytest.raises(RendezvousClosedError):
        one.next_rendezvous()
    assert one.told() == Outcome(1, "machine 0: rank 0: a defect")
    one.tell(Outcome(1))
    assert not teller.result(10)


def test_a_machine_with_another_config_or_a_number_twice_or_a_taken_port_is_refused() -> None:
    port, began = free_port(), time.monotonic()
    zero = _machine(0, port, least=1)
    with pytest.raises(ConfigError, match="seed: expected 1, got 2; start all with the same command"):
        _machine(1, port, least=1, config={"name": "run", "seed": 2})
    with pytest.raises(ConfigError, match="expected run other, got run run"):
        _machine(1, port, least=1, config={"name": "other", "seed": 1})
    with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use"):
        _machine(0, port, least=1)
    assert time.monotonic() - began < 5 * 5  # the matrix: 5 s
    zero.next_rendezvous()
    one = _machine(1, port, least=1)
    joined = threading.Thread(target=one.next_rendezvous, daemon=True)
    joined.start()
    _until(lambda: zero.changed() is Change.CAME)
    with pytest.raises(ConfigError, match="--node-rank: another machine is number 1 already; give each its own"):
        _machine(1, port, least=1)
    zero.next_rendezvous()
    joined.join(20)


def test_a_dead_master_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    place = Machines(2, 2, 1, "127.0.0.1", free_port(), "127.0.0.1")
    with pytest.raises(PeerLost, match="machine 0 did not answer within 2 s; start it, or check host"):
        ManyMachines(place, _CONFIG, timeout_s=2.0, rejoin_s=1.0)
    said = capsys.readouterr().err
    assert said.count("waiting for machine 0 at 127.0.0.1") == 1 and "start it, or check host" in said
