"""Interfaces, the name of this machine, ports, and variables that launchers leave behind."""

import errno
import os
import socket
import threading
from collections.abc import Iterator

import psutil

from moe_runtime.cli.doctor.finding import Finding, ok
from moe_runtime.cli.network import free_port, own_address

_PORT = 29500  # torch's own, and that of our examples
_NAME_S = 2.0
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def look() -> Iterator[Finding]:
    """Findings about the network."""
    yield _loopback()
    yield _interfaces()
    yield from _named_interfaces()
    yield _own_name()
    yield _port()
    yield _variables()


def _loopback() -> Finding:
    names = [name for name, entries in psutil.net_if_addrs().items() if _has_loopback(entries)]
    states = psutil.net_if_stats()
    if any(states[name].isup for name in names if name in states):
        return ok("loopback", names[0])
    said = "expected 127.0.0.1 on an interface that is up, got none: ranks could not meet"
    return Finding("loopback", "fail", said, "ip link set lo up")


def _has_loopback(entries: list[object]) -> bool:
    return any(getattr(entry, "address", "") == "127.0.0.1" for entry in entries)


def _interfaces() -> Finding:
    states = psutil.net_if_stats()
    shown = [
        f"{name} {entry.address}{'' if states[name].isup else ' (down)'}"
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and name in states
    ]
    outside = own_address(os.environ)
    more = (
        f"; other machines reach this one at {outside}" if outside else "; no other machine reaches this one"
    )
    return ok("interfaces", f"{', '.join(shown) or 'none with an address'}{more}")


def _named_interfaces() -> Iterator[Finding]:
    there = set(psutil.net_if_addrs())
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        # NCCL's may name several, by the start of their names, and exclude some with ^.
        names = [name.lstrip("=") for name in os.environ.get(variable, "").split(",") if name]
        excluded = any(name.startswith("^") for name in names)
        strange = [name for name in names if not any(one.startswith(name) for one in there)]
        if not names or excluded:
            continue
        if strange:
            said = f"expected interfaces of this machine ({', '.join(sorted(there))}), got {strange[0]}"
            yield Finding(variable, "fail", said, f"unset {variable}")
        else:
            yield ok(variable, ", ".join(names))


def _own_name() -> Finding:
    name = socket.gethostname()
    found: list[str] = []
    asked = threading.Thread(target=_resolve, args=(name, found), daemon=True)
    asked.start()
    asked.join(_NAME_S)
    if found and found[0]:
        return ok("hostname", f"{name} is {found[0]}")
    why = "nobody knows the name" if found else f"no answer within {_NAME_S:g} s"
    said = f"{name}: expected an address, got none ({why}); needed where other machines call this one by name"
    return Finding("hostname", "warn", said, f"echo '127.0.1.1 {name}' >> /etc/hosts")


def _resolve(name: str, found: list[str]) -> None:
    try:
        found.append(socket.gethostbyname(name))
    except OSError:
        found.append("")


def _port() -> Finding:
    try:
        free = free_port()
    except OSError as error:
        said = f"expected a free port on 127.0.0.1, got: {error.strerror or error}"
        return Finding("ports", "fail", said, "ip link set lo up")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("0.0.0.0", _PORT))
    except OSError as error:
        why = "taken" if error.errno == errno.EADDRINUSE else (error.strerror or str(error))
        said = f"{_PORT} is {why}; name another one to --master, such as HOST:{free}"
        return Finding("ports", "warn", said, f"ss -ltnp 'sport = :{_PORT}'")
    return ok("ports", f"{_PORT} is free, and so are others")


def _variables() -> Finding:
    left = [name for name in _OF_RANKS if name in os.environ]
    if "RANK" not in left and "WORLD_SIZE" not in left:
        return ok("variables", "none of a launcher")
    said = f"{', '.join(f'{name}={os.environ[name]}' for name in left)}: commands take themselves for a rank"
    return Finding("variables", "warn", said, f"unset {' '.join(left)}")
