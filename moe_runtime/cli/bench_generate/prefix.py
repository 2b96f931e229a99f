"""Time to the first token of a long prompt, in new processes, with and without its latents on disk.

    python -m moe_runtime.cli.bench_generate.prefix JSON      one process; prints one JSON object

The clock starts when the model is loaded and the prompt is there, and stops at the first token: reading,
checking and copying files count, starting Python does not. The whole life of the process is told beside.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from moe_runtime.cli.bench_generate.subject import Subject
from moe_runtime.errors import MoeRuntimeError

PROMPT_TOKENS = 2000
STORE_BYTES = 1 << 30


def prefix_speed(subject: Subject, prompt_tokens: int = PROMPT_TOKENS) -> dict[str, Any]:
    """Fill a store in one process, then time others in turn.

    Returns:
        prompt_tokens, hits (tokens found), `anew` and `cached`: medians of first_token_s and process_s; ratio
        of first_token_s and its range over rounds; same_token.

    Raises:
        MoeRuntimeError: such a process failed.
    """
    settings = subject.settings
    prompt = subject.rows(1, prompt_tokens)[0].tolist()
    with tempfile.TemporaryDirectory(prefix="moe_runtime_prefix_") as folder:
        given = {"path": str(settings.path), "threads": settings.threads, "device": settings.device}
        given |= {"prompt": prompt}
        _in_a_new_process({**given, "folder": folder})
        turns: dict[str, list[dict[str, Any]]] = {"anew": [], "cached": []}
        for turn in range(settings.rounds):
            for name in ("anew", "cached") if turn % 2 == 0 else ("cached", "anew"):
                turns[name].append(
                    _in_a_new_process({**given, "folder": folder if name == "cached" else None})
                )
    pairs = zip(turns["anew"], turns["cached"], strict=True)
    ratios = [anew["first_token_s"] / cached["first_token_s"] for anew, cached in pairs]
    return {
        "prompt_tokens": prompt_tokens,
        "hits": min(one["hits"] for one in turns["cached"]),
        **{name: _medians(found) for name, found in turns.items()},
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "same_token": len({one["token"] for found in turns.values() for one in found}) == 1,
    }


def _medians(found: list[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in found) for key in ("first_token_s", "process_s")}


def _in_a_new_process(given: dict[str, Any]) -> dict[str, Any]:
    began = time.perf_counter()
    command = [sys.executable, "-W", "ignore", "-m", __name__]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MoeRuntimeError(f"bench generate: the measuring process ended with {last}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "process_s": time.perf_counter() - began}


def first_token(given: dict[str, Any]) -> dict[str, Any]:
    """Load the model, read the prompt, and stop after its first token; then, with a store, fill it.

    Args:
        given: path, threads, device, prompt, and folder of the store or None.

    Returns:
        first_token_s, hits and the token.
    """
    import torch

    from moe_runtime.checkpoint.folder import open_checkpoint
    from moe_runtime.checkpoint.load import model_from
    from moe_runtime.generate.engine import Engine
    from moe_runtime.generate.prefix_cache import open_prefix_cache
    from moe_runtime.generate.prefix_fingerprint import latent_form_of
    from moe_runtime.generate.request import Request
    from moe_runtime.generate.sampling import SamplingParams
    from moe_runtime.model.inference import InferenceModel

    torch.set_num_threads(given["threads"])
    model = model_from(open_checkpoint(given["path"]), given["device"])
    store = None
    if given["folder"] is not None:
        store = open_prefix_cache(latent_form_of(model), 0, Path(given["folder"]), STORE_BYTES)
    engine = Engine(InferenceModel(model), store=store)
    request = Request(given["prompt"], 2, SamplingParams(temperature=0.0))
    began = time.perf_counter()
    decoding = engine.start([request])
    pieces = iter(decoding)
    token = next(pieces).tokens[0]
    seconds = time.perf_counter() - began
    for _ in pieces:  # what was read is stored when the request goes on
        pass
    return {"first_token_s": seconds, "token": token, "hits": decoding.results[0].prompt_cache_hit_tokens}


if __name__ == "__main__":
    print(json.dumps(first_token(json.load(sys.stdin))))
