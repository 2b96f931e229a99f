"""Run alone: imports and exports a model of many shards, and prints by how much memory grew meanwhile.

Resident memory counts mapped files too, so it shows shards that are kept open. The first pass, over a small
model, brings in everything that the libraries load late.
"""

import json
import resource
import sys
from pathlib import Path

import torch

from moe_runtime.checkpoint.folder import open_checkpoint
from moe_runtime.checkpoint.hugging_face.config_form import write_config
from moe_runtime.checkpoint.hugging_face.export import ExportOptions, export_model
from moe_runtime.checkpoint.hugging_face.importing import ImportOptions, import_model
from moe_runtime.checkpoint.hugging_face.json_file import object_bytes
from moe_runtime.checkpoint.hugging_face.names import parameters_of
from moe_runtime.checkpoint.hugging_face.shard_writer import FilesWriter, split_in_files
from moe_runtime.checkpoint.tensor_file import Planned
from moe_runtime.config.schema import ModelConfig
from tests.unit.hugging_face.models import BASE

SHARD_BYTES = 12_000_000
WIDE = {"hidden_size": 512, "expert_ffn_size": 1024, "num_experts": 8, "vocab_size": 512, "ffn_size": 64}


def write_hub(folder: Path, model: ModelConfig) -> int:
    """A model of ones in many shards; gives its bytes."""
    folder.mkdir()
    planned = [Planned(part, "F32", each.part_shape) for each in parameters_of(model) for part in each.parts]
    groups = split_in_files(planned, SHARD_BYTES)
    files = [(f"model-{number}.safetensors", group) for number, group in enumerate(groups)]
    with FilesWriter(folder, files) as writer:
        for tensor in planned:
            writer.write(tensor.name, torch.ones(tensor.shape))
    index = {tensor.name: file for file, group in files for tensor in group}
    (folder / "model.safetensors.index.json").write_bytes(object_bytes({"weight_map": index}))
    fields = write_config(model, dtype="F32", context=64, balance_alpha=0.0, text_ids={})
    (folder / "config.json").write_bytes(object_bytes(fields))
    return sum(tensor.num_bytes for tensor in planned)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(folder: Path) -> None:
    growth: dict[str, int] = {}
    for name, changes in (("small", {}), ("large", WIDE)):
        model = ModelConfig.model_validate(BASE | changes | {"mtp_depth": 0})
        hub, ours = folder / name, folder / f"{name}-ours"
        growth["model"] = write_hub(hub, model)
        before = peak_bytes()
        import_model(hub, ours, ImportOptions(shard_bytes=SHARD_BYTES))
        growth["import"] = peak_bytes() - before
        options = ExportOptions(dtype=torch.bfloat16, shard_bytes=SHARD_BYTES)
        export_model(open_checkpoint(ours), folder / f"{name}-again", options)
        growth["export"] = peak_bytes() - before
    print(json.dumps(growth))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
