"""Do all ranks run the same? Other launchers start each with a command of its own."""

import hashlib

from moe_runtime.config.difference import say_differences
from moe_runtime.config.load import dump_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError
from moe_runtime.parallel.peers import Peers


def check_same_config(config: RunConfig, peers: Peers) -> None:
    """Ranks with different settings would compute nonsense, or wait for each other for ever.

    Raises:
        ConfigError: a rank has another config; says which, and the keys; on every rank alike.
    """
    digests = peers.gather_json(hashlib.sha256(dump_config(config).encode()).hexdigest())
    odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if odd:
        configs = peers.gather_json(config.model_dump(mode="json"))
        said = f"ranks {odd} have another config than rank 0: {say_differences(configs[0], configs[odd[0]])}"
        raise ConfigError(f"{said}; start all with the same command")
