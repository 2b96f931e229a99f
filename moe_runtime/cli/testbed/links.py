"""Several machines on one: network namespaces joined by rate-limited links.

    node 0: eth0 --veth-- p0 |        |            tbf on eth0 limits what node 0 sends,
    node 1: eth0 --veth-- p1 | bridge | (hub)      tbf on p0 what it receives
    ...

Every namespace is held open by a process of its own (`cat`, waiting on a pipe from this one) and has
no name; the interfaces are created inside the namespaces. So there is nothing to clean up that the
kernel would not: when this process ends, however it ends, the pipes close, the holders end, and the
namespaces go with all that is in them. The machine's own network never sees any of it.

What makes the links behave as links of a cluster:
- packets of 9,000 bytes, one packet a time (no segmentation offload): the limiter and the counters of
  the interface see real packets with their headers, 66 bytes each.
- socket buffers of 256 KiB: what all senders may have under way to one receiver fits the queue in
  front of its link, so nothing is ever dropped, as on InfiniBand.
- TCP Reno, which never slows down where nothing is lost (BBR paces to its own estimate and leaves a
  tenth of such a link unused).

Rejected: named namespaces (`ip netns add`), which outlive a killed process; a burst of 512 KiB, which
at 100 Mbit/s gives 42 ms of free sending.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from moe_runtime.errors import ConfigError

INTERFACE = "eth0"
MTU = 9000
# Ethernet 14, IPv4 20, TCP 20 and its time stamps 12.
HEADER_BYTES = 66
_TOOLS = ("ip", "tc", "unshare", "nsenter", "cat", "sysctl")
_BURST_BYTES = 64 * 1024
_SOCKET_BYTES = 256 * 1024
_QUEUE_PER_NODE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Testbed:
    """Namespaces that are up.

    Args:
        hub: process that holds the namespace of the bridge.
        holders: process that holds each node's namespace.
    """

    hub: int
    holders: tuple[int, ...]

    def inside(self, node: int) -> list[str]:
        """What to put before a command so that it runs on a node."""
        return _inside(self.holders[node])

    def limit(self, rate_mbit: int | None) -> None:
        """Give every link this rate each way, in 10^6 bit/s, or no limit; nothing may be under way."""
        for node, holder in enumerate(self.holders):
            for place, interface in ((holder, INTERFACE), (self.hub, f"p{node}")):
                shape = [] if rate_mbit is None else _limit(rate_mbit, len(self.holders))
                kind = "pfifo" if rate_mbit is None else "tbf"
                change = ["tc", "qdisc", "replace", "dev", interface, "root", kind, *shape]
                _run([*_inside(place), *change])


def require_tools() -> None:
    """Refuse where namespaces cannot be made.

    Raises:
        ConfigError: says what is missing.
    """
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise ConfigError(
            f"bench: links need the commands {', '.join(missing)} (iproute2, util-linux, procps); "
            "install them, or measure on loopback with --links none"
        )
    if os.geteuid() != 0:
        raise ConfigError(
            "bench: links need root, to make network namespaces; run as root, or measure on loopback "
            "with --links none"
        )


@contextmanager
def open_testbed(nodes: int, rate_mbit: int | None) -> Iterator[Testbed]:
    """Nodes that reach each other over links of this rate each way; gone after the context.

    Args:
        nodes: how many.
        rate_mbit: of each link, in 10^6 bit/s; None: no limit, until `Testbed.limit` sets one.

    Raises:
        ConfigError: not root, a tool is missing, or the kernel refuses.
    """
    require_tools()
    with ExitStack() as stack:
        hub = stack.enter_context(_namespace())
        holders = [stack.enter_context(_namespace()) for _ in range(nodes)]
        _run([*_inside(hub), "ip", "link", "add", "br0", "mtu", str(MTU), "type", "bridge"])
        _run([*_inside(hub), "ip", "link", "set", "br0", "up"])
        for node, holder in enumerate(holders):
            _join(hub, holder, node)
        testbed = Testbed(hub, tuple(holders))
        testbed.limit(rate_mbit)
        yield testbed


def _join(hub: int, holder: int, node: int) -> None:
    """Lay a cable between a node and the bridge."""
    port, mtu, near, far = f"p{node}", ["mtu", str(MTU)], _inside(holder), _inside(hub)
    peer = ["peer", "name", INTERFACE, *mtu, "netns", str(holder)]
    _run([*far, "ip", "link", "add", "name", port, *mtu, "type", "veth", *peer])
    _run([*far, "ip", "link", "set", port, "master", "br0", "up", "gso_max_segs", "1"])
    _run([*near, "ip", "link", "set", "lo", "up"])
    _run([*near, "ip", "address", "add", f"10.83.0.{node + 1}/24", "dev", INTERFACE])
    _run([*near, "ip", "link", "set", INTERFACE, "up", "gso_max_segs", "1"])
    buffers = [f"net.ipv4.tcp_{way}mem=4096 {_SOCKET_BYTES} {_SOCKET_BYTES}" for way in "rw"]
    _run([*near, "sysctl", "-qw", "net.ipv4.tcp_congestion_control=reno", *buffers])


def _limit(rate_mbit: int, nodes: int) -> list[str]:
    queue = _QUEUE_PER_NODE_BYTES * nodes
    return ["rate", f"{rate_mbit}mbit", "burst", str(_BURST_BYTES), "limit", str(queue)]


def _inside(holder: int) -> list[str]:
    return ["nsenter", "--target", str(holder), "--net", "--"]


@contextmanager
def _namespace() -> Iterator[int]:
    """A fresh network namespace; gives the process that holds it."""
    holder = subprocess.Popen(
        ["unshare", "--net", "--", "cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for us; the holder ends when we do
    )
    assert holder.stdin is not None and holder.stdout is not None and holder.stderr is not None
    try:
        os.write(holder.stdin.fileno(), b"\n")
        if not holder.stdout.read(1):  # `cat` answers once it is inside
            raise BrokenPipeError
        yield holder.pid
    except BrokenPipeError as error:
        reason = holder.stderr.read().decode().strip()
        raise ConfigError(
            f"bench: cannot make a network namespace ({reason}); measure on loopback with --links none"
        ) from error
    finally:
        holder.stdin.close()
        holder.kill()
        holder.wait()
        holder.stdout.close()
        holder.stderr.close()


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(
            f"bench: cannot set up links: {' '.join(command[5:])}: {reason}; "
            "measure on loopback with --links none"
        )


@dataclass(frozen=True)
class LinkCount:
    """What has crossed an interface; subtract two for what did in between.

    Args:
        received_bytes, received_packets: in.
        sent_bytes, sent_packets: out.
    """

    received_bytes: int
    received_packets: int
    sent_bytes: int
    sent_packets: int

    def __sub__(self, other: "LinkCount") -> "LinkCount":
        return LinkCount(
            self.received_bytes - other.received_bytes,
            self.received_packets - other.received_packets,
            self.sent_bytes - other.sent_bytes,
            self.sent_packets - other.sent_packets,
        )


def count_link(interface: str = INTERFACE) -> LinkCount:
    """The kernel's own counters of an interface of this process's namespace (what `ip -s link` prints)."""
    with open("/proc/self/net/dev", encoding="ascii") as table:
        for line in table:
            name, _, values = line.partition(":")
            if name.strip() == interface:
                numbers = [int(value) for value in values.split()]
                return LinkCount(numbers[0], numbers[1], numbers[8], numbers[9])
    raise ConfigError(f"bench: expected an interface {interface}, got none of that name")
