"""The training loop: resume, step, validate, sample, save, until the end or until asked to stop."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from moe_runtime.build import Runtime, build_mesh, build_optimizer, build_runtime
from moe_runtime.checkpoint.store import CheckpointStore, SaveFailed
from moe_runtime.config.derive import tokens_before, total_steps
from moe_runtime.config.layout import check_layout
from moe_runtime.config.load import dump_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.data.baseline import order1_bits_per_byte
from moe_runtime.data.bits import ByteCounter
from moe_runtime.data.loader import BatchLoader
from moe_runtime.data.prepare import ensure_prepared
from moe_runtime.data.shards import TokenDataset
from moe_runtime.data.vocabulary import Tokenizer
from moe_runtime.errors import ConfigError, DataError
from moe_runtime.metrics.recorder import Recorder
from moe_runtime.parallel.mesh import open_groups
from moe_runtime.parallel.peers import Peers
from moe_runtime.parallel.world import World
from moe_runtime.train.sample import sample_tokens
from moe_runtime.train.saving import TrainingState, load_state, save_state
from moe_runtime.train.step import TrainStep
from moe_runtime.train.stopping import StopRequest
from moe_runtime.train.validate import validate


@dataclass
class Run:
    """A run that is ready to step.

    Args:
        start: steps already done.
        end: steps to do in all.
    """

    config: RunConfig
    state: TrainingState
    step: TrainStep
    tokenizer: Tokenizer
    validation: BatchLoader
    store: CheckpointStore
    recorder: Recorder
    start: int
    end: int

    @property
    def runtime(self) -> Runtime:
        return self.state.runtime

    @property
    def bytes(self) -> ByteCounter:
        return ByteCounter(self.tokenizer)


def train(config: RunConfig, world: World, *, fresh: bool) -> None:
    """Train from the last good checkpoint to the end; call within `join_world` on every rank.

    Args:
        fresh: forget earlier checkpoints and records of this run.

    Raises:
        MoeRuntimeError: a user's mistake, on every rank alike.
    """
    run = open_run(config, world, fresh=fresh)
    with StopRequest() as stop:
        steps_done = _loop(run, stop)
    if steps_done == run.end:
        _finish(run)
    else:
        message = f"stopped at step {steps_done}; the same command continues"
        run.recorder.event("stopped", step=steps_done)
        run.recorder.say(message)
    run.recorder.close()


def open_run(config: RunConfig, world: World, *, fresh: bool) -> Run:
    """Build everything and take up where the last checkpoint stands."""
    layout = check_layout(config, world.world_size)
    mesh = build_mesh(layout, world.rank)
    groups = open_groups(mesh)
    peers = Peers(world.rank, world.world_size, groups.control)
    _check_same_config(config, peers)
    tokenizer, train_data, validation_data = _open_data(config, peers)
    runtime = build_runtime(
        config,
        layout,
        mesh,
        groups,
        world.device,
        ranks_per_node=world.ranks_per_node,
        document_separator=tokenizer.eos_id if config.data.document_mask else None,
    )
    optimizer = build_optimizer(runtime)
    run_dir = Path(config.out_dir) / config.name
    peers.alike(lambda: _write_config(run_dir, config, peers), (ConfigError,))
    state = TrainingState(runtime, optimizer, peers, tokenizer.to_json(), tokenizer.name)
    store = CheckpointStore(run_dir, peers, config.train.keep_checkpoints)
    start, said = _resume(store, state, fresh)
    recorder = Recorder(run_dir, config, peers, resume_step=start)
    for line in said:
        recorder.event("resume", message=line)
        recorder.say(line)
    return Run(
        config,
        state,
        TrainStep(runtime, optimizer, peers.alike(lambda: _loader(config, train_data), (DataError,))),
        tokenizer,
        peers.alike(lambda: _loader(config, validation_data), (DataError,)),
        store,
        recorder,
        start,
        total_steps(config, layout),
    )


def _open_data(config: RunConfig, peers: Peers) -> tuple[Tokenizer, TokenDataset, TokenDataset]:
    """Rank 0 prepares what is missing; then every rank opens the same shards."""
    peers.alike(lambda: ensure_prepared(config.data, config.seed) if peers.is_first else None, (DataError,))

    def open_all() -> tuple[Tokenizer, TokenDataset, TokenDataset]:
        ensure_prepared(config.data, config.seed)
        folder = Path(config.data.path)
        data = TokenDataset.open(folder, "train"), TokenDataset.open(folder, "validation")
        return data[0].load_tokenizer(), *data

    return peers.alike(open_all, (DataError,))


def _loader(config: RunConfig, dataset: TokenDataset) -> BatchLoader:
    model = config.model
    return BatchLoader(dataset, config.batch.seq_len, model.mtp_depth, config.seed, model.vocab_size)


def _check_same_config(config: RunConfig, peers: Peers) -> None:
    """Ranks with different settings would compute nonsense, or wait for each other for ever."""
    digests = peers.gather_json(hashlib.sha256(dump_config(config).encode()).hexdigest())
    odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if odd:
        raise ConfigError(f"ranks {odd} have another config than rank 0; start all with the same command")


def _write_config(run_dir: Path, config: RunConfig, peers: Peers) -> None:
    if not peers.is_first:
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(dump_config(config))
    except OSError as error:
        text = f"out_dir: {run_dir} cannot be written ({error.strerror}); choose another"
        raise ConfigError(text) from error


def _resume(store: CheckpointStore, state: TrainingState, fresh: bool) -> tuple[int, list[str]]:
    """Load the newest good checkpoint; gives the steps done and what to tell."""
    if fresh:
        store.clear()
        return 0, []
    found = store.latest_good()
    said = [f"passed over a damaged checkpoint: {damaged}" for damaged in found.skipped]
    if found.checkpoint is None:
        return 0, said
    start = load_state(state, found.checkpoint)
    return start, [*said, f"resuming after step {start} from {found.checkpoint.path}"]


def _loop(run: Run, stop: StopRequest) -> int:
    """Step until the end or the wish to stop; gives the steps done."""
    every, step = run.config.train, run.start
    while step < run.end:
        record = run.step(step)
        step += 1
        stopping = run.state.peers.any_true(stop.wanted)
        is_last = step == run.end
        if is_last or (every.eval_every and step % every.eval_every == 0):
            result = validate(run.runtime, run.validation, run.bytes, every.eval_sequences)
            record |= {"val_loss": result.loss, "val_bpb": result.bits_per_byte}
        run.recorder.step(record)
        if record["skipped"]:
            message = f"step {step}: gradient norm {record['grad_norm']}, step skipped"
            run.recorder.event("skipped", step=step, grad_norm=record["grad_norm"])
            run.recorder.say(message)
        if every.sample_every and step % every.sample_every == 0 and not is_last:
            _sample(run, step)
        if is_last or stopping or (every.checkpoint_every and step % every.checkpoint_every == 0):
            _save(run, step)
        if stopping:
            break
    return step


def _save(run: Run, step: int) -> None:
    layout = run.runtime.layout
    outcome = save_state(run.store, run.state, step, tokens_before(run.config, layout, step))
    if isinstance(outcome, SaveFailed):
        message = f"step {step}: no checkpoint: {outcome.message}"
        run.recorder.event("checkpoint_failed", step=step, message=outcome.message)
        run.recorder.say(message)
        return
    run.recorder.event("checkpoint", step=step, path=str(outcome.path), bytes=outcome.num_bytes)
    if outcome.warning:
        run.recorder.say(outcome.warning)


def _sample(run: Run, step: int) -> None:
    every = run.config.train
    prompt = [int(token) for token in run.tokenizer.encode(every.sample_prompt)] or [run.tokenizer.eos_id]
    drawn = sample_tokens(run.runtime, prompt, every.sample_tokens, run.config.seed)
    run.recorder.sample(step, every.sample_prompt + run.tokenizer.decode(drawn))


def _finish(run: Run) -> None:
    """What a finished run says: loss in bits per byte beside a plain baseline, and a sample."""
    result = validate(run.runtime, run.validation, run.bytes, run.config.train.eval_sequences)
    baseline = math.nan
    if run.state.peers.is_first:
        baseline = order1_bits_per_byte(run.step.loader.dataset, run.validation.dataset, run.tokenizer)
    message = (
        f"validation: {result.bits_per_byte:.3f} bits per byte, loss {result.loss:.4f} "
        f"(order-1 byte model on the same shards: {baseline:.3f} bits per byte)"
    )
    run.recorder.event("finished", step=run.end, val_bpb=result.bits_per_byte, order1_bpb=baseline)
    run.recorder.say(message)
    _sample(run, run.end)
