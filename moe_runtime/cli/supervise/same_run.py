"""Machines that meet must run the same: the first exchange over their store compares what each was given."""

import json
import secrets
import sys
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moe_runtime.cli.supervise.job import Machines
from moe_runtime.config.difference import say_differences
from moe_runtime.errors import ConfigError, PeerLost
from moe_runtime.parallel.meeting import host_store, join_store

_RUN = "moe_runtime/run"
_FIRST_WORD_S = 10.0
_CONNECT_S = 5.0  # of one try
_REMEDY = "start it, or check host, port and firewall"


def meet(machines: Machines, config: dict[str, Any], timeout_s: float) -> tuple[dist.TCPStore, str]:
    """The store of all launchers, and the token of the run, which machine 0 draws.

    Args:
        machines: how to reach machine 0, and whether this is it.
        config: of the run, as JSON values.
        timeout_s: for machine 0 to answer.

    Raises:
        ConfigError: the port is taken, by another run perhaps, or this machine was given another config.
        PeerLost: machine 0 does not answer.
    """
    where = f"{machines.host}:{machines.port}"
    if machines.rank == 0:
        store, token = host_store(machines.host, machines.port, timeout_s), secrets.token_hex(16)
        store.set(_RUN, json.dumps({"token": token, "config": config}))
        return store, token
    store = _reach(machines.host, machines.port, timeout_s)
    try:
        store.wait([_RUN], timedelta(seconds=_FIRST_WORD_S))
        run = json.loads(store.get(_RUN))
        theirs, token = run["config"], str(run["token"])
    except (dist.DistError, RuntimeError, ValueError, KeyError) as error:
        raise PeerLost(f"--master {where}: no launcher of moe-runtime answers there") from error
    check_same(theirs, config, f"--master {where}")
    return store, token


def check_same(theirs: dict[str, Any], ours: dict[str, Any], where: str) -> None:
    """Compare configs key by key.

    Raises:
        ConfigError: they differ; says in which keys, or that the other is quite another run.
    """
    if theirs.get("name") != ours.get("name"):
        text = f"expected run {ours.get('name')}, got run {theirs.get('name')}"
        raise ConfigError(f"{where}: {text}; choose another port, or start both with the same command")
    said = say_differences(theirs, ours)
    if said:
        text = f"this machine has another config than machine 0: {said}"
        raise ConfigError(f"{where}: {text}; start all with the same command")


def _reach(host: str, port: int, timeout_s: float) -> dist.TCPStore:
    """Try until machine 0 answers: it may be started later."""
    deadline, has_told = time.monotonic() + timeout_s, False
    while True:
        left = deadline - time.monotonic()
        try:
            return join_store(host, port, max(1.0, min(_CONNECT_S if has_told else 1.0, left)))
        except dist.DistError as error:
            if not has_told:
                text = f"waiting for machine 0 at {host}:{port}, {timeout_s:.0f} s at most"
                print(f"{text}; {_REMEDY}", file=sys.stderr, flush=True)
            if time.monotonic() >= deadline:
                text = f"--master {host}:{port}: machine 0 did not answer within {timeout_s:.0f} s"
                raise PeerLost(f"{text}; {_REMEDY}") from error
            has_told = True
