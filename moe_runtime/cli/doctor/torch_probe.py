"""`python -m moe_runtime.cli.doctor.torch_probe FOLDER`: what torch has here, and whether gloo joins ranks.

A process of its own: importing torch takes seconds, may fail or crash, and joining two ranks may hang. Prints
one JSON object.
"""

import json
import os
import sys
from datetime import timedelta
from typing import Any

_PATIENCE_S = 5


def main(folder: str) -> None:
    """Looks at torch, then joins this process and a fork of it by a file in the folder."""
    import torch
    import torch.distributed as dist

    said: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda_build": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None,
        "gloo": None,
    }
    if not dist.is_gloo_available():
        said["gloo"] = "not in this build of torch"
    elif not said["gpus"]:  # a process that has used CUDA must not fork
        said["gloo"] = _join(os.path.join(folder, "store"))
    print(json.dumps(said), flush=True)


def _join(store: str) -> str:
    """`joined`, or why two ranks could not add up a number."""
    if os.fork() == 0:
        try:
            _add(store, 1)
        finally:
            os._exit(0)
    try:
        return "joined" if _add(store, 0) == 3.0 else "a sum over two ranks is wrong"
    except Exception as error:  # whatever it is, it is what the user has to know
        return str(error).splitlines()[0]


def _add(store: str, rank: int) -> float:
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, 2),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=_PATIENCE_S),
    )
    number = torch.tensor(float(rank + 1))
    dist.all_reduce(number)
    return float(number)


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive the other rank
