"""The store where a run meets: on one address, for one run."""

import os
import socket

import psutil
import pytest
import torch.distributed as dist

from moe_runtime.errors import ConfigError, PeerLost
from moe_runtime.parallel.meeting import check_token, host_store, join_store


def _listens_on(port: int) -> set[str]:
    found = psutil.Process(os.getpid()).net_connections(kind="inet")
    return {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN and each.laddr.port == port}


def test_a_store_listens_on_its_address_alone_and_closes_with_it() -> None:
    store = host_store("127.0.0.1", 0, 5.0)
    port = store.port
    assert _listens_on(port) == {"127.0.0.1"}
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=1):
        pass
    del store
    assert _listens_on(port) == set()


def test_processes_of_one_run_meet_and_those_of_another_are_told() -> None:
    store = host_store("127.0.0.1", 0, 5.0, token="ours")
    client = join_store("127.0.0.1", store.port, 5.0)
    check_token(client, "ours", "here")
    client.set("key", "value")
    assert store.get("key") == b"value"
    with pytest.raises(ConfigError, match=r"here: expected a process of this run, got another run; choose"):
        check_token(client, "theirs", "here")


def test_a_store_of_another_program_is_told() -> None:
    strange = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    client = join_store("127.0.0.1", strange.port, 5.0)
    with pytest.raises(PeerLost, match="no run of moe-runtime answers there"):
        check_token(client, "ours", "here", wait_s=0.1)


def test_a_port_in_use_and_an_address_of_another_machine_are_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} on 127.0.0.1 is in use; choose another"):
            host_store("127.0.0.1", port, 5.0)
    with pytest.raises(ConfigError, match="expected an address of this machine"):
        host_store("192.0.2.1", 0, 5.0)  # an address for documents, which nobody has
