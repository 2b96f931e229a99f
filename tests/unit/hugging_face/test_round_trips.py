"""Unquantised models come back bit for bit, at the dtype in which they are stored."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moe_runtime.checkpoint.folder import open_checkpoint
from moe_runtime.checkpoint.hugging_face.export import ExportOptions, export_model
from moe_runtime.checkpoint.hugging_face.importing import ImportOptions, import_model
from moe_runtime.checkpoint.hugging_face.json_file import read_object
from moe_runtime.checkpoint.load import load_model
from moe_runtime.config.schema import ModelConfig
from tests.unit.hugging_face.models import BASE, YARN, load_peer, make_model, save

MODEL = ModelConfig.model_validate(BASE | {"mtp_depth": 2, "yarn": YARN})


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_export_import_export_gives_the_same_bits_and_config(dtype: torch.dtype, tmp_path: Path) -> None:
    made = save(make_model(MODEL), tmp_path / "run")
    # Several shards on the way out, several files on the way in, of other sizes.
    export_model(made, tmp_path / "hub", ExportOptions(dtype=dtype, shard_bytes=20_000))
    found = import_model(tmp_path / "hub", tmp_path / "ours", ImportOptions(shard_bytes=30_000))
    assert found.model == MODEL and not found.warnings
    export_model(open_checkpoint(tmp_path / "ours"), tmp_path / "again", ExportOptions(shard_bytes=50_000))
    hub, again = tensors_of(tmp_path / "hub"), tensors_of(tmp_path / "again")
    assert {tensor.dtype for name, tensor in hub.items() if "bias" not in name} == {dtype}
    assert_same(again, hub)
    assert read_object(tmp_path / "again/config.json") == read_object(tmp_path / "hub/config.json")
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 2


def test_an_imported_model_has_the_very_weights_it_was_exported_from(tmp_path: Path) -> None:
    made = make_model(MODEL)
    export_model(save(made, tmp_path / "run"), tmp_path / "hub", ExportOptions())
    import_model(tmp_path / "hub", tmp_path / "ours", ImportOptions())
    assert_same(load_model(tmp_path / "ours").state_dict(), made.state_dict())


def test_what_transformers_saves_comes_back_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = ModelConfig.model_validate(BASE | {"mtp_depth": 0})
    export_model(save(make_model(model), tmp_path / "run"), tmp_path / "hub", ExportOptions())
    # BF16 throughout, the routing bias too, as its default is.
    load_peer(tmp_path / "hub", model.num_layers).to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours", ImportOptions())
    export_model(open_checkpoint(tmp_path / "ours"), tmp_path / "again", ExportOptions())
    assert_same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "theirs"))


def test_an_average_is_exported_in_place_of_the_weights(tmp_path: Path) -> None:
    from moe_runtime.checkpoint.store import CheckpointStore, Contribution, SaveMeta
    from moe_runtime.checkpoint.weights import weights_to_save
    from moe_runtime.parallel.peers import Peers
    from tests.unit.hugging_face.models import run_config

    weights, average = (weights_to_save(make_model(MODEL, seed).state_dict(), 0, Peers()) for seed in (1, 2))
    meta = SaveMeta(tokens=0, config=run_config(MODEL).model_dump(mode="json"), layout={"pp": 1})
    CheckpointStore(tmp_path / "run", Peers(), 1).save(1, Contribution(weights, ema=average), meta)
    export_model(open_checkpoint(tmp_path / "run"), tmp_path / "hub", ExportOptions(ema=True))
    import_model(tmp_path / "hub", tmp_path / "ours", ImportOptions())
    assert_same(load_model(tmp_path / "ours").state_dict(), make_model(MODEL, 2).state_dict())
