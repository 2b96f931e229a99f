"""A checkpoint made ready to continue text: model, tokenizer, drafts, prefix cache, on one rank or more."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from moe_comm.dispatcher import Dispatcher
from moe_comm.factory import open_dispatcher
from moe_comm.placement import Placement

from moe_runtime.checkpoint.folder import Checkpoint, open_checkpoint
from moe_runtime.checkpoint.hugging_face.end_ids import eos_ids_of
from moe_runtime.checkpoint.load import config_of, model_from
from moe_runtime.cli.own_tokenizer import own_tokenizer
from moe_runtime.config.counts import count_parameters
from moe_runtime.config.schema import ModelConfig
from moe_runtime.data.tokenizer import open_tokenizer
from moe_runtime.data.vocabulary import Tokenizer
from moe_runtime.errors import ConfigError
from moe_runtime.generate.engine import Engine
from moe_runtime.generate.prefix_cache import PrefixCache, open_prefix_cache
from moe_runtime.generate.prefix_fingerprint import latent_form_of
from moe_runtime.model.inference import InferenceModel
from moe_runtime.model.transformer import Transformer
from moe_runtime.parallel.peers import Peers
from moe_runtime.parallel.world import join_world, read_world

_PEER_TIMEOUT_S = 600.0
_ONE_THREAD_BELOW = 20_000_000  # active parameters
_KINDS = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Opening:
    """What the command line says about the model; see `generate --help`.

    Args:
        keeps_prompts: the same process may see a prompt again, so a cache in memory pays without a folder.
    """

    path: Path
    device: str
    dtype: str | None
    ema: bool
    tokenizer: str | None
    speculate: bool | None
    drafts: int
    cache_dir: Path | None
    cache_size: int
    keeps_prompts: bool
    ep: int


@dataclass(frozen=True)
class Generator:
    """A model that is ready.

    Args:
        tokenizer: None: there is none, and prompts and answers are ids.
        eos_ids: any of them ends a continuation: the tokenizer's, and those of an imported model's configs.
        trained_length: tokens of the sequences that it was trained on.
    """

    checkpoint: Checkpoint
    engine: Engine
    tokenizer: Tokenizer | None
    eos_ids: frozenset[int]
    trained_length: int
    cache: PrefixCache | None
    peers: Peers

    def encode(self, text: str) -> list[int]:
        """Ids of a text, at least one.

        Raises:
            ConfigError: the checkpoint has no tokenizer, or one with more ids than the model.
        """
        if self.tokenizer is None:
            raise ConfigError(
                f"{self.checkpoint.path}: expected a tokenizer, got none; name one with --tokenizer, or give "
                "--prompt-ids"
            )
        ids = [int(token) for token in self.tokenizer.encode(text)] or [self.tokenizer.eos_id]
        self._check(ids)
        return ids

    def told(self, ids: list[int]) -> tuple[str, list[int]]:
        """A prompt that was given as ids: its text, as far as there is a tokenizer, and the ids."""
        self._check(ids)
        return ("" if self.tokenizer is None else self.tokenizer.decode(ids)), ids

    def _check(self, ids: list[int]) -> None:
        rows = self.engine.model.config.vocab_size
        if max(ids) >= rows:
            raise ConfigError(f"prompt: expected ids below the model's {rows}, got {max(ids)}")


@contextmanager
def open_generator(opening: Opening) -> Iterator[Generator]:
    """Load the model; with `ep` above 1 this process is one of several, started by the launcher.

    Raises:
        ConfigError, CheckpointError: what was asked for does not fit the checkpoint or the processes.
    """
    checkpoint = open_checkpoint(opening.path)
    _check_drafts(opening, checkpoint)
    if opening.ep == 1:
        model = model_from(checkpoint, opening.device, _KINDS[opening.dtype], opening.ema)
        yield _generator(opening, checkpoint, model, Peers())
        return
    world = read_world(opening.device)
    if world.world_size != opening.ep:
        raise ConfigError(
            f"--ep {opening.ep}: expected as many processes, got {world.world_size}; start it as "
            "./launch.sh generate ..."
        )
    placement = _placement(checkpoint, opening.ep, world.rank)
    with join_world(world, _PEER_TIMEOUT_S):
        dispatcher: Dispatcher = open_dispatcher("alltoall", placement)
        model = model_from(checkpoint, world.device, _KINDS[opening.dtype], opening.ema, dispatcher)
        control = dist.new_group(backend="gloo")
        yield _generator(opening, checkpoint, model, Peers(world.rank, world.world_size, control))


def _check_drafts(opening: Opening, checkpoint: Checkpoint) -> None:
    if opening.speculate and config_of(checkpoint).model.mtp_depth == 0:
        raise ConfigError("--speculate: expected a model with MTP modules, got mtp_depth 0; --no-speculate")


def _placement(checkpoint: Checkpoint, ep: int, rank: int) -> Placement:
    experts = config_of(checkpoint).model.num_experts
    if experts % ep:
        raise ConfigError(f"--ep: expected a divisor of the model's {experts} experts, got {ep}")
    return Placement(experts, ep, rank)


def _generator(opening: Opening, checkpoint: Checkpoint, model: Transformer, peers: Peers) -> Generator:
    config = config_of(checkpoint)
    named = opening.tokenizer
    tokenizer = own_tokenizer(checkpoint) if named is None else open_tokenizer(named)
    cache = None
    if opening.cache_dir is not None or opening.keeps_prompts:
        kind = "ema" if opening.ema else "weights"
        files = {name: one.sha256 for name, one in checkpoint.manifest.files.items() if one.kind == kind}
        form = latent_form_of(model, files)
        cache = open_prefix_cache(form, opening.cache_size, opening.cache_dir, opening.cache_size)
    _choose_threads(config.model, model.head.weight.device)
    speculates = config.model.mtp_depth > 0 if opening.speculate is None else opening.speculate
    drafts = opening.drafts if speculates else 0
    engine = Engine(InferenceModel(model), drafts, cache, highest=_highest(peers))
    eos_ids = eos_ids_of(checkpoint) | ({tokenizer.eos_id} if tokenizer is not None else set())
    return Generator(checkpoint, engine, tokenizer, eos_ids, config.batch.seq_len, cache, peers)


def _choose_threads(model: ModelConfig, device: torch.device) -> None:
    """A token of a small model is some hundred products of microseconds; sharing them out costs more."""
    is_small = count_parameters(model).active < _ONE_THREAD_BELOW
    if is_small and device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _highest(peers: Peers) -> Callable[[int], int]:
    """The highest of all ranks' numbers."""

    def highest(number: int) -> int:
        if peers.world_size == 1:
            return number
        box = torch.tensor([number])
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=peers.group)
        return int(box)

    return highest


def warn(text: str) -> None:
    """A line on the standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
