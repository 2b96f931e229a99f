"""Addresses of this machine, found without asking a name server."""

import ipaddress
import socket

import psutil


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


def is_public(host: str) -> bool:
    """Whether the address of a name is one of the open internet."""
    return ipaddress.ip_address(socket.gethostbyname(host)).is_global
