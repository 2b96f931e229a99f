"""The FP8 form: codes and scales that come back bit for bit, and values that are code x scale."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_runtime.checkpoint.folder import open_checkpoint
from moe_runtime.checkpoint.hugging_face.export import ExportOptions, export_model
from moe_runtime.checkpoint.hugging_face.fp8_form import (
    check_quantization,
    dequantise_into,
    quantise,
    scale_shape,
)
from moe_runtime.checkpoint.hugging_face.importing import ImportOptions, import_model
from moe_runtime.checkpoint.hugging_face.json_file import object_bytes, read_object
from moe_runtime.checkpoint.load import load_model
from moe_runtime.config.schema import ModelConfig
from moe_runtime.errors import CheckpointError
from tests.unit.hugging_face.models import BASE, difference, load_peer, make_model, random_tokens, save

E4M3 = torch.float8_e4m3fn
# Ragged on purpose: no width is a multiple of 128, some have two or three blocks.
MODEL = ModelConfig.model_validate(
    BASE
    | {"hidden_size": 136, "ffn_size": 150, "q_lora_rank": 40, "kv_lora_rank": 130, "init_std": 0.15}
    | {"num_layers": 2, "expert_ffn_size": 20, "num_experts": 4, "num_groups": 2, "num_groups_kept": 1}
)


def by_hand(codes: Tensor, scales: Tensor) -> Tensor:
    """code x scale, element by element."""
    rows, columns = (torch.arange(size) // 128 for size in codes.shape)
    return codes.float() * scales.float()[rows][:, columns]


def quantise_as_released(hub: Path, scale_dtype: torch.dtype) -> None:
    """Turn a plain export into FP8 as DeepSeek's own tools do: scale = amax / 448, or a rounded one."""
    tensors = load_file(hub / "model.safetensors")
    for name, weight in list(tensors.items()):
        if "_proj" in name and "eh_proj" not in name:
            blocks = torch.nn.functional.pad(weight.float(), _padding(weight))
            tiles = blocks.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
            scales = tiles.abs().amax((1, 3)) / 448.0
            if scale_dtype == torch.float8_e8m0fnu:
                scales = torch.exp2(torch.ceil(torch.log2(scales)))
            spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
            rows, columns = weight.shape
            tensors[name] = (weight.float() / spread[:rows, :columns]).to(E4M3)
            tensors[f"{name}_scale_inv"] = scales.to(scale_dtype)
    save_file(tensors, hub / "model.safetensors", metadata={"format": "pt"})
    fields = read_object(hub / "config.json")
    fields["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    (hub / "config.json").write_bytes(object_bytes(fields))


def _padding(weight: Tensor) -> tuple[int, int, int, int]:
    rows, columns = weight.shape
    return 0, -columns % 128, 0, -rows % 128


def quantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if t.dtype == E4M3 or name.endswith("_scale_inv")}


def assert_same_bits(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our own FP8 export."""
    folder = tmp_path_factory.mktemp("fp8")
    export_model(save(make_model(MODEL), folder / "run"), folder / "hub", ExportOptions(fp8=True))
    return folder / "hub"


def test_the_fp8_form_has_deepseeks_names_shapes_and_config(hub: Path) -> None:
    tensors = load_file(hub / "model.safetensors")
    codes = {name for name, tensor in tensors.items() if tensor.dtype == E4M3}
    assert {name.split(".")[-2] for name in codes} == {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
        "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    for name in codes:
        scales = tensors[f"{name}_scale_inv"]
        assert scales.dtype == torch.float32 and tuple(scales.shape) == scale_shape(
            tuple(tensors[name].shape)
        )
    assert len(quantised(tensors)) == 2 * len(codes)
    said = read_object(hub / "config.json")["quantization_config"]
    assert said["quant_method"] == "fp8" and said["weight_block_size"] == [128, 128]


def test_fp8_logits_equal_those_of_the_same_weights_dequantised_by_hand(hub: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tensors = load_file(hub / "model.safetensors")
    plain = {
        name: by_hand(tensor, tensors[f"{name}_scale_inv"]) if tensor.dtype == E4M3 else tensor
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }
    fields = read_object(hub / "config.json")
    del fields["quantization_config"]
    (tmp_path / "hand").mkdir()
    (tmp_path / "hand/config.json").write_bytes(object_bytes(fields))
    save_file(plain, tmp_path / "hand/model.safetensors", metadata={"format": "pt"})
    import_model(hub, tmp_path / "ours", ImportOptions(dtype=torch.float32))
    tokens = random_tokens(MODEL, 2, 48)
    with torch.no_grad():
        theirs = load_peer(tmp_path / "hand", MODEL.num_layers)(tokens).logits
        assert difference(load_model(tmp_path / "ours")(tokens), theirs) <= 1e-4


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_of_any_fp8_model_come_back_bit_for_bit(
    scale_dtype: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    hub = tmp_path / "hub"
    export_model(save(make_model(MODEL), tmp_path / "run"), hub, ExportOptions())
    quantise_as_released(hub, scale_dtype)
    import_model(hub, tmp_path / "ours", ImportOptions(dtype=dtype))
    export_model(open_checkpoint(tmp_path / "ours"), tmp_path / "again", ExportOptions(fp8=True))
    wanted, got = (load_file(folder / "model.safetensors") for folder in (hub, tmp_path / "again"))
    assert_same_bits(quantised(got), quantised(wanted))
    assert got.keys() == wanted.keys()
    again = read_object(tmp_path / "again/config.json")
    assert again["quantization_config"] == read_object(hub / "config.json")["quantization_config"]


def test_our_own_fp8_export_comes_back_bit_for_bit(hub: Path, tmp_path: Path) -> None:
    import_model(hub, tmp_path / "ours", ImportOptions(dtype=torch.float32))
    export_model(open_checkpoint(tmp_path / "ours"), tmp_path / "again", ExportOptions(fp8=True))
    assert_same_bits(load_file(tmp_path / "again/model.safetensors"), load_file(hub / "model.safetensors"))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(0, 2**31),
    st.floats(-100, 60),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_codes_come_back_under_their_recorded_scales(
    rows: int, columns: int, seed: int, exponent: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 255, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    scales = torch.exp2(torch.rand(scale_shape((rows, columns)), generator=generator) * 4 + exponent)
    values = torch.empty(rows, columns, dtype=dtype)
    dequantise_into(values, codes.view(E4M3), scales, "here")
    again, kept = quantise(values, scales)
    assert kept is scales and torch.equal(again.view(torch.uint8), codes)


def test_scales_of_weights_that_have_moved_are_not_taken() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(130, 140, generator=generator)
    codes, scales = quantise(weight)
    values = torch.empty_like(weight)
    dequantise_into(values, codes, scales, "here")
    values[129, 139] *= 1.01
    again, fresh = quantise(values, scales)
    assert fresh is not scales
    # The element that moved is the nearest code under the new scales: at most half a step of 2^-4 away.
    assert float((by_hand(again, fresh) / values - 1).abs()[129, 139]) <= 2**-4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quant_method": "gptq"}, "quantization_config.quant_method: expected fp8, got 'gptq'"),
        ({"weight_block_size": [64, 64]}, "quantization_config.weight_block_size: expected"),
        ({"fmt": "e5m2"}, "quantization_config.fmt: expected e4m3"),
        ({"scale_fmt": "strange"}, "quantization_config.scale_fmt"),
    ],
)
def test_other_quantisations_are_refused_by_name(
    hub: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    fields = read_object(hub / "config.json")["quantization_config"] | change
    with pytest.raises(CheckpointError, match=says.replace("[", r"\[")):
        check_quantization(fields, "config.json")


def test_infinite_or_nan_weights_are_refused() -> None:
    codes = torch.full((3, 3), 0x7F, dtype=torch.uint8).view(E4M3)
    with pytest.raises(CheckpointError, match=r"x\.weight: expected finite values"):
        dequantise_into(torch.empty(3, 3), codes, torch.ones(1, 1), "x.weight")
