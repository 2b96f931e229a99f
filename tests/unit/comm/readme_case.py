"""The examples of comm/README.md, read from the page itself and run."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

README = Path(__file__).parents[3] / "comm" / "README.md"
_BEGIN, _END = 'dist.init_process_group("gloo")\n', "dist.destroy_process_group()\n"


def examples() -> list[str]:
    """Every block of Python, in order."""
    return re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


def losses_of(printed: str) -> list[float]:
    """What the layer's example says of its training."""
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed)]


def run_layer(rank: int, world_size: int, source: str) -> tuple[list[float], float]:
    """Run the layer's example in a world that is up already.

    Returns:
        The losses that this rank prints; and, as a fraction of the output, how far the layer is from a
        plain one that has the experts of all ranks at hand.
    """
    assert source.count(_BEGIN) == source.count(_END) == 1
    torch.manual_seed(100 + rank)  # other experts and tokens on each rank
    names: dict[str, Any] = {}
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(source.replace(_BEGIN, "").replace(_END, ""), "README", "exec"), names)
    return losses_of(printed.getvalue()), _distance_from_plain(names["layer"], world_size)


def _distance_from_plain(layer: Any, world_size: int) -> float:
    tokens = torch.randn(40, 32)
    ups, downs = (_of_all_ranks(weight.detach(), world_size) for weight in (layer.up, layer.down))
    with torch.no_grad():
        output = layer(tokens)
        weights, ids = layer.router(tokens).softmax(-1).topk(layer.top_k)
        plain = torch.zeros_like(output)
        for token in range(40):
            for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
                plain[token] += weight * ((tokens[token] @ ups[expert]).relu() @ downs[expert])
    return float((output - plain).abs().max() / plain.abs().max())


def _of_all_ranks(part: torch.Tensor, world_size: int) -> torch.Tensor:
    parts = [torch.empty_like(part) for _ in range(world_size)]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)
