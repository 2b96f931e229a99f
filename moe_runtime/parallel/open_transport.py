"""What carries boundary tensors between the pipeline ranks of a lane."""

import torch
import torch.distributed as dist

from moe_runtime.parallel.mesh import Groups, Mesh
from moe_runtime.parallel.p2p import ThroughHost, TorchTransport, Transport


def open_transport(mesh: Mesh, groups: Groups, device: torch.device) -> Transport | None:
    """torch.distributed, through host memory where gloo joins GPUs; None for a pipeline of one rank."""
    if mesh.pp == 1:
        return None
    assert groups.pipe_up is not None and groups.pipe_down is not None
    lane = [mesh.rank_at(row) for row in range(mesh.pp)]
    transport = TorchTransport(mesh.pp_rank, lane, groups.pipe_up, groups.pipe_down)
    over_host = device.type == "cuda" and dist.get_backend(groups.pipe_up) == "gloo"
    return ThroughHost(transport) if over_host else transport
