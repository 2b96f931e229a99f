"""Addresses of this machine, found without asking a name server."""

import ipaddress
import socket
from collections.abc import Mapping

import psutil

from moe_runtime.errors import ConfigError


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def split_address(text: str) -> tuple[str, int]:
    """Host and port of --master.

    Raises:
        ConfigError: not HOST:PORT.
    """
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"--master: expected HOST:PORT, such as 10.0.0.1:29500, got {text}")
    return host, int(port)


def loopback_name() -> str | None:
    """The loopback interface: lo on Linux, lo0 on macOS."""
    return interface_of("127.0.0.1")


def interface_of(address: str) -> str | None:
    """The interface of this machine that has the IP address."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    return None


def address_towards(host: str) -> str | None:
    """The IP address of this machine that `host` sees; None if there is no route or no such name.

    A datagram socket that is connected picks its route and sends nothing.
    """
    try:
        target = socket.gethostbyname(host)
        if interface_of(target) is not None:
            return target
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def own_address(environ: Mapping[str, str]) -> str | None:
    """An IPv4 address under which other machines may know this one; None if it has loopback alone.

    That of the interface in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, else of the machine's name, else of
    the first interface that is up.
    """
    addresses = {
        name: [entry.address for entry in entries if entry.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
    }
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if addresses.get(environ.get(variable, "")):
            return addresses[environ[variable]][0]
    is_up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    outside = [
        address
        for name, found in addresses.items()
        for address in found
        if name in is_up and not address.startswith("127.")
    ]
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        named = ""
    return named if named in outside else next(iter(outside), None)


def is_public(host: str) -> bool:
    """Whether the address of a name is one of the open internet."""
    return ipaddress.ip_address(socket.gethostbyname(host)).is_global
