"""A link between two network namespaces that is slow or loses packets: `HOLDER HOLDER DELAY_MS LOSS`.

The kernel's own emulator (netem) is often not built in. Here each namespace has a tunnel device; this process
reads the packets of one, keeps them for a while, drops some by chance, and writes them to the other. It ends
when its standard input closes.
"""

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import time

INTERFACE = "far0"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI, _CLONE_NEWNET = 0x400454CA, 0x1, 0x1000, 0x40000000
_PACKET_BYTES = 65_535


def address(node: int) -> str:
    """Of a node, over the slow link."""
    return f"10.84.0.{node + 1}"


def _enter(holder: str) -> None:
    """Let this process stand in the network namespace that another process holds."""
    namespace = os.open(f"/proc/{holder}/ns/net", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(namespace)


def _tunnel(holder: str, node: int) -> int:
    """A tunnel device in a namespace, up and with its address; gives the end that packets are read from."""
    _enter(holder)
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH", INTERFACE.encode(), _IFF_TUN | _IFF_NO_PI))
    for words in (
        ["address", "add", f"{address(node)}/24", "dev", INTERFACE],
        ["link", "set", INTERFACE, "mtu", "1500", "up"],
    ):
        subprocess.run(["ip", *words], check=True)
    return end


def _read_all(end: int) -> list[bytes]:
    packets = []
    while True:
        try:
            packets.append(os.read(end, _PACKET_BYTES))
        except BlockingIOError:
            return packets


def main() -> None:
    """Carry packets."""
    delay_s, loss = float(sys.argv[3]) / 1e3, float(sys.argv[4])
    ends = [_tunnel(holder, node) for node, holder in enumerate(sys.argv[1:3])]
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    chance, number = random.Random(0), 0
    under_way: list[tuple[float, int, int, bytes]] = []
    print("up", flush=True)
    while True:
        until_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else 1.0
        ready, _, _ = select.select([*ends, 0], [], [], until_s)
        if 0 in ready:
            return
        now = time.monotonic()
        for end in ready:
            for packet in _read_all(end):
                number += 1
                if chance.random() >= loss:
                    heapq.heappush(under_way, (now + delay_s, number, other[end], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, end, packet = heapq.heappop(under_way)
            os.write(end, packet)


if __name__ == "__main__":
    main()
