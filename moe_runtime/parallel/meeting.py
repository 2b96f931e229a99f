"""Where the processes of a run meet: a store that listens on one address, for this run alone.

torch's own store listens on every interface of the machine and talks to whoever comes. Here its listener
is a socket of ours, bound to the address that the others use: loopback on one machine. And the first
thing said over it is the token of the run, so that a process of another run, which was given the same port by
mistake, is told instead of joined. That is against mistakes, not attackers: the store knows no passwords
and no encryption, and belongs on a network of one's own.
"""

import errno
import os
import socket
from datetime import timedelta

import torch.distributed as dist

from moe_runtime.errors import ConfigError, PeerLost

TOKEN = "MOE_RUNTIME_TOKEN"
_TOKEN_KEY = "moe_runtime/token"
_BACKLOG = 1024


def host_store(address: str, port: int, timeout_s: float, token: str | None = None) -> dist.TCPStore:
    """A store that others reach under `address`; it lives as long as the object.

    Args:
        address: of this machine, a name or IPv4; nothing else is listened on.
        port: 0: any that is free, to be read from the store.
        timeout_s: of its operations.
        token: of the run, for `check_token`.

    Raises:
        ConfigError: the port is taken, or the address is not one of this machine's.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
        except OSError as error:
            raise ConfigError(_why_not_bound(error, address, port)) from error
        listener.listen(_BACKLOG)
        store = dist.TCPStore(
            address,
            listener.getsockname()[1],
            None,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=os.dup(listener.fileno()),
        )
    if token is not None:
        store.set(_TOKEN_KEY, token)
    return store


def join_store(address: str, port: int, timeout_s: float) -> dist.TCPStore:
    """The store that another process hosts.

    Raises:
        DistError: nobody answers there in time.
    """
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(address, port, None, is_master=False, timeout=timeout, wait_for_workers=False)


def check_token(store: dist.Store, token: str, where: str, wait_s: float = 10.0) -> None:
    """Whether the store is that of this run.

    Args:
        where: HOST:PORT, for the message.
        wait_s: for the store's first word.

    Raises:
        ConfigError: it is another run's.
        PeerLost: it has no token: not a store of this program, or its host went.
    """
    try:
        store.wait([_TOKEN_KEY], timedelta(seconds=wait_s))
        found = store.get(_TOKEN_KEY).decode()
    except (dist.DistError, RuntimeError) as error:
        raise PeerLost(f"{where}: no run of moe-runtime answers there; check host and port") from error
    if found != token:
        raise ConfigError(f"{where}: expected a process of this run, got another run; choose another port")


def _why_not_bound(error: OSError, address: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {address} is in use; choose another, as in --master HOST:PORT"
    return f"{address}: cannot listen there ({error.strerror}); expected an address of this machine"
