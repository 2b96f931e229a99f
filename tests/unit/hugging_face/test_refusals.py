"""What does not fit is refused in one line that names it, and nothing is left behind."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_runtime.checkpoint.hugging_face.config_form import read_config, write_config
from moe_runtime.checkpoint.hugging_face.export import ExportOptions, export_model
from moe_runtime.checkpoint.hugging_face.importing import ImportOptions, import_model
from moe_runtime.checkpoint.hugging_face.json_file import read_object
from moe_runtime.config.schema import ModelConfig
from moe_runtime.errors import CheckpointError
from tests.unit.hugging_face.models import BASE, YARN, make_model, save

MODEL = ModelConfig.model_validate(BASE | {"mtp_depth": 2})
L = MODEL.num_layers


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    export_model(save(make_model(MODEL), folder / "run"), folder / "hub", ExportOptions())
    export_model(save(make_model(MODEL), folder / "run"), folder / "many", ExportOptions(shard_bytes=30_000))
    return folder


@pytest.fixture
def hub(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage, in one file."""
    return Path(shutil.copytree(made / "hub", tmp_path / "hub"))


@pytest.fixture
def many(made: Path, tmp_path: Path) -> Path:
    """The same in many shards."""
    return Path(shutil.copytree(made / "many", tmp_path / "many"))


def refusal(hub: Path, **options: Any) -> str:
    """The one line with which an import is refused; nothing is left of the attempt."""
    out = hub.parent / "out"
    before = sorted(path.name for path in hub.parent.iterdir())
    with pytest.raises(CheckpointError) as error:
        import_model(hub, out, ImportOptions(**options))
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in hub.parent.iterdir()) == before
    return str(error.value)


def change_config(hub: Path, **changes: Any) -> None:
    fields = read_object(hub / "config.json") | changes
    (hub / "config.json").write_text(json.dumps(fields))


def change_tensors(hub: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(hub / "model.safetensors")
    change(tensors)
    save_file(tensors, hub / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "deepseek_v2"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("attention_dropout", 0.1),
        ("topk_method", "group_limited_greedy"),
        ("scoring_func", "softmax"),
        ("norm_topk_prob", False),
        ("moe_layer_freq", 2),
        ("rope_interleave", False),
        ("tie_word_embeddings", True),
        ("rms_norm_eps", 1e-5),
        ("num_key_value_heads", 1),
        ("head_dim", 64),
        ("index_topk", 2048),
        ("sliding_window", 128),
        ("num_hidden_layers", "three"),
        ("n_group", 3),
        ("hidden_size", "32"),
        ("num_attention_heads", 2.0),
        ("max_position_embeddings", 1e18),
        ("max_position_embeddings", 10**18),
        ("aux_loss_alpha", float("inf")),
        ("architectures", ["LlamaForCausalLM"]),
        ("architectures", "DeepseekV3ForCausalLM"),
        ("quantization_config", "fp8"),
    ],
)
def test_a_config_that_means_another_model_is_refused_by_key(hub: Path, key: str, value: object) -> None:
    change_config(hub, **{key: value})
    line = refusal(hub)
    assert f"config.json: {key}: expected" in line, line


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_routed_experts", "num_nextn_predict_layers"])
def test_a_number_beyond_all_tensors_is_refused_at_once(hub: Path, key: str) -> None:
    change_config(hub, **{key: 10**12})
    assert f"{key}: expected no more than the shards'" in refusal(hub)


def test_a_missing_key_is_named(hub: Path) -> None:
    fields = read_object(hub / "config.json")
    del fields["kv_lora_rank"]
    (hub / "config.json").write_text(json.dumps(fields))
    assert "kv_lora_rank: expected a value, got none" in refusal(hub)


def test_an_unknown_key_is_refused_unless_it_is_off_or_said_not_to_matter(hub: Path, tmp_path: Path) -> None:
    change_config(hub, brand_new=None, other_feature=False)
    import_model(hub, tmp_path / "first", ImportOptions())
    change_config(hub, brand_new=3)
    assert "brand_new: expected no such key, got 3" in refusal(hub) and "--ignore brand_new" in refusal(hub)
    import_model(hub, tmp_path / "second", ImportOptions(ignored=("brand_new",)))


ROPE = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (ROPE | {"mscale": 1.0, "mscale_all_dim": 0.5}, "expected mscale and mscale_all_dim alike"),
        (ROPE | {"mscale": 1.0}, "expected mscale and mscale_all_dim alike"),
        (ROPE, "expected mscale and mscale_all_dim alike"),
        (ROPE | {"attention_factor": "x"}, "expected numbers for mscale and attention_factor"),
        (ROPE | {"attention_factor": 1.2, "mscale_all_dim": 1.0}, "attention_factor 1"),
        (ROPE | {"attention_factor": 1.0, "truncate": False}, "truncate: expected true"),
        (ROPE | {"attention_factor": 1.0, "factor": 0.5}, "factor: expected at least 1, got 0.5"),
        (ROPE | {"attention_factor": 1.0, "original_max_position_embeddings": 4}, "2 pi beta_slow = 7"),
        (ROPE | {"attention_factor": 1.0, "short_factor": [1.0]}, "short_factor: expected no such key"),
        ({"rope_type": "llama3", "factor": 8.0}, "rope_type: expected default or yarn, got 'llama3'"),
        ({"rope_type": "default", "factor": 8.0}, "factor: expected no such key under rope_type default"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1"),
        (
            {"rope_type": "default", "rope_theta": 5.0},
            "rope_theta: expected rope_theta 10000.0 as at the top",
        ),
    ],
)
def test_rotary_positions_that_the_model_does_not_have_are_refused(
    hub: Path, section: dict[str, Any], says: str
) -> None:
    change_config(hub, rope_scaling=section)
    assert says in refusal(hub), refusal(hub)


@pytest.mark.parametrize("mscale", [0.0, 0.7, 1.0])
def test_a_config_comes_back_from_either_form(mscale: float) -> None:
    model = ModelConfig.model_validate(BASE | {"yarn": YARN | {"mscale": mscale}, "rope_theta": 5e4})
    fields = write_config(model, dtype="BF16", context=64, balance_alpha=1e-4, text_ids={"eos_token_id": 7})
    said = read_config(fields, "config.json")
    assert (said.model, said.dtype, said.context, said.balance_alpha) == (model, "bf16", 128, 1e-4)
    section = fields.pop("rope_scaling") | {"rope_theta": fields.pop("rope_theta")}
    section["rope_type"] = section.pop("type")
    depth = fields.pop("num_nextn_predict_layers")
    theirs = fields | {
        "rope_parameters": section,
        "dtype": fields.pop("torch_dtype"),
        "num_mtp_layers": depth,
    }
    assert read_config(theirs, "config.json").model == model


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention": "mha"}, "model.attention: expected mla, got mha"),
        ({"rms_norm_eps": 1e-5}, "model.rms_norm_eps: expected 1e-06, got 1e-05"),
        ({"yarn": YARN | {"original_seq_len": 3}}, "model.yarn: expected an original context of at least"),
        ({"num_experts": 1, "num_groups": 1, "num_groups_kept": 1, "top_k": 1}, "model.num_experts"),
    ],
)
def test_a_model_without_such_a_form_is_not_exported(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    model = ModelConfig.model_validate(BASE | changes)
    with pytest.raises(CheckpointError, match=says):
        export_model(save(make_model(model), tmp_path / "run"), tmp_path / "hub", ExportOptions())
    assert not (tmp_path / "hub").exists()


GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(GATE), f"expected tensor {GATE}, got none of that name"),
        (lambda t: t.update({GATE: torch.zeros(3, 4)}), f"{GATE}: expected shape [16, 32], got [3, 4]"),
        (lambda t: t.update({GATE: t[GATE].to(torch.int32)}), f"{GATE}: expected one of F32, BF16"),
        (
            lambda t: t.update({GATE: t[GATE].double()}),
            f"{GATE}: expected one of F32, BF16, F16, F8_E4M3, got",
        ),
        (lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)}), "expected quantization_config"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), "expected no tensor model.extra"),
        (lambda t: t.update({f"{GATE}_scale_inv": torch.ones(1, 1)}), f"expected no tensor {GATE}_scale_inv"),
        (
            lambda t: t.update({f"model.layers.{L}.embed_tokens.weight": torch.zeros(96, 32)}),
            f"model.layers.{L}.embed_tokens.weight: expected the values of model.embed_tokens.weight",
        ),
        (
            lambda t: t[f"model.layers.{L + 1}.shared_head.head.weight"][95].add_(1),
            f"model.layers.{L + 1}.shared_head.head.weight: expected the values of lm_head.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(hub: Path, change: Any, says: str) -> None:
    change_tensors(hub, change)
    assert says in refusal(hub)


def test_fp64_is_written_only_in_another_dtype(tmp_path: Path) -> None:
    run = save(make_model(MODEL).double(), tmp_path / "run", precision="fp64")
    with pytest.raises(CheckpointError, match=r"embed\.weight: expected one of F32, BF16, F16, got F64; say"):
        export_model(run, tmp_path / "hub", ExportOptions())
    export_model(run, tmp_path / "hub", ExportOptions(dtype=torch.float32))


def _without_layer(tensors: dict[str, Tensor], *layers: int) -> None:
    for name in [name for name in tensors if name.startswith(tuple(f"model.layers.{n}." for n in layers))]:
        del tensors[name]


def test_declared_mtp_layers_without_weights_are_left_out_with_one_warning(hub: Path, tmp_path: Path) -> None:
    for number, (layers, depth) in enumerate((((L + 1,), 1), ((L,), 0))):
        change_tensors(hub, lambda tensors, layers=layers: _without_layer(tensors, *layers))
        found = import_model(hub, tmp_path / f"ours{number}", ImportOptions())
        assert found.model.mtp_depth == depth and len(found.warnings) == 1
        assert f"declares 2 MTP layers, there are weights of {depth}" in found.warnings[0]


@pytest.mark.parametrize(
    "name", ["enorm.weight", "embed_tokens.weight", "shared_head.head.weight", "mlp.experts.7.up_proj.weight"]
)
def test_an_mtp_layer_that_is_there_in_part_is_an_error(hub: Path, name: str) -> None:
    change_tensors(hub, lambda tensors: tensors.pop(f"model.layers.{L}.{name}"))
    line = refusal(hub)
    assert f"model.layers.{L}.{name}" in line and f"MTP layer {L} is there in part" in line


def test_mtp_layers_that_are_not_declared_or_follow_a_gap_are_errors(hub: Path) -> None:
    change_config(hub, num_nextn_predict_layers=1)
    assert f"expected no tensor model.layers.{L + 1}." in refusal(hub)
    change_config(hub, num_nextn_predict_layers=2)
    change_tensors(hub, lambda tensors: _without_layer(tensors, L))
    assert f"model.layers.{L + 1}: expected no MTP layer after one without weights" in refusal(hub)


def test_missing_and_damaged_shards_are_refused(many: Path) -> None:
    shard = sorted(many.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    assert f"{shard.name}: cannot be read" in refusal(many)
    shard.write_bytes(b"\xff" * 8 + data[8:])
    assert f"{shard.name}: expected a safetensors header of at most 100000000 bytes" in refusal(many)
    shard.unlink()
    assert f"{shard.name}: expected a shard, got no such file" in refusal(many)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update({GATE: m["lm_head.weight"]}), GATE),
        (lambda m: m.pop(GATE), f"expected no tensor {GATE}: the index has it nowhere"),
        (lambda m: m.update({"model.absent": m[GATE]}), "expected tensor model.absent as the index says"),
        (
            lambda m: m.update({GATE: "../elsewhere.safetensors"}),
            "expected a .safetensors file of this folder",
        ),
        (lambda m: m.update({GATE: 7}), "expected a .safetensors file of this folder, got 7"),
        (lambda m: m.clear(), "weight_map: expected names of tensors and their files"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(many: Path, change: Any, says: str) -> None:
    path = many / "model.safetensors.index.json"
    index = read_object(path)
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    assert says in refusal(many)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": 1, "a": 2}', "\x00"])
def test_a_config_that_is_no_object_is_refused(hub: Path, text: str) -> None:
    (hub / "config.json").write_text(text)
    assert "config.json" in refusal(hub)


def test_a_folder_without_a_model_is_refused(hub: Path) -> None:
    (hub / "model.safetensors").unlink()
    assert "expected model.safetensors or model.safetensors.index.json, got neither" in refusal(hub)
    shutil.rmtree(hub)
    assert "config.json: expected a file, got none of that name" in refusal(hub)


def test_a_pickle_in_the_place_of_shards_is_refused_by_name(hub: Path) -> None:
    (hub / "model.safetensors").rename(hub / "pytorch_model.bin")
    assert "got pytorch_model.bin, which can run code when it is loaded and is not read" in refusal(hub)


@pytest.mark.parametrize("lie", ["twice", "pickle"])
def test_a_header_that_lies_is_refused_before_the_file_is_mapped(hub: Path, lie: str) -> None:
    shard = hub / "model.safetensors"
    data = shard.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size].decode().rstrip(), data[8 + size :]
    name, first = next(item for item in json.loads(header).items() if item[0] != "__metadata__")
    twice = f"{header[:-1]},{json.dumps(name)}:{json.dumps(first)}}}".encode()
    shard.write_bytes(
        {
            "twice": len(twice).to_bytes(8, "little") + twice + rest,
            "pickle": b"cposix\nsystem\n(S'exit'\ntR.",
        }[lie]
    )
    said = {"twice": "a key occurs twice", "pickle": "at most 100000000"}
    assert said[lie] in refusal(hub) and str(shard) in refusal(hub)


def test_nothing_is_written_over(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("kept")
    assert "expected a new or empty folder" in refusal(hub)
    assert (tmp_path / "out/mine").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told(hub: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "cannot be written" in refusal(hub)
    finally:
        tmp_path.chmod(0o700)
