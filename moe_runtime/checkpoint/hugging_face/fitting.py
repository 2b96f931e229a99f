"""Whether the tensors of a Hugging Face model are those of the model that its config.json describes.

Everything is decided from names, shapes and dtypes in the shards' headers, before any value is read.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from moe_runtime.checkpoint.hugging_face import fp8_form
from moe_runtime.checkpoint.hugging_face.names import Parameter, empty_parts, mtp_parameters
from moe_runtime.checkpoint.hugging_face.shard_reader import Stored
from moe_runtime.config.schema import ModelConfig
from moe_runtime.errors import CheckpointError

_PLAIN = ("F32", "BF16", "F16")
# Tables that some old programs saved with the weights; the model here computes its own.
_COMPUTED = "rotary_emb.inv_freq"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def check_counts(model: ModelConfig, stored: Mapping[str, Stored], hub: Path) -> None:
    """Refuse more layers or experts than there are tensors, before anything is counted out layer by layer.

    Raises:
        CheckpointError: names the key of config.json.
    """
    moe_layers = model.num_layers - model.num_dense_layers
    counts = {
        "num_hidden_layers": model.num_layers,
        "num_nextn_predict_layers": model.mtp_depth,
        "n_routed_experts": moe_layers * model.num_experts,
    }
    for key, count in counts.items():
        if count > len(stored):
            raise CheckpointError(
                f"{hub}: {key}: expected no more than the shards' {len(stored)} tensors are enough for"
            )


def present_mtp_depth(model: ModelConfig, stored: Mapping[str, Stored], hub: Path) -> tuple[int, list[str]]:
    """How many of the declared MTP layers have weights, and what to warn of.

    transformers writes `num_nextn_predict_layers: 1` for every model and MTP weights for none.

    Raises:
        CheckpointError: a layer is there in part, or after one that is not there.
    """
    depth = 0
    filled = {match[1] for name in stored if (match := _LAYER.match(name))}
    for number in range(model.mtp_depth):
        layer = model.num_layers + number
        if str(layer) not in filled:
            continue
        absent = next((name for name in _mtp_names(model, number) if name not in stored), None)
        if absent is not None:
            raise CheckpointError(
                f"{hub}: expected tensor {absent}, got none of that name: MTP layer {layer} is there in part"
            )
        if depth < number:
            raise CheckpointError(
                f"{hub}: model.layers.{layer}: expected no MTP layer after one without weights"
            )
        depth += 1
    if depth == model.mtp_depth:
        return depth, []
    said = f"config.json declares {model.mtp_depth} MTP layers, there are weights of {depth}"
    return depth, [f"{hub}: {said}: imported with mtp_depth {depth}"]


def check_fit(
    model: ModelConfig,
    parameters: Iterable[Parameter],
    stored: Mapping[str, Stored],
    hub: Path,
    is_quantised: bool,
) -> None:
    """Refuse a model with a tensor too few, too many, or of another shape or dtype.

    Args:
        parameters: of the model, MTP layers included.
        stored: what the shards hold.
        is_quantised: config.json has a `quantization_config`.

    Raises:
        CheckpointError: names the tensor.
    """
    known = {name for name in stored if name.endswith(_COMPUTED)}
    for parameter in parameters:
        for part in parameter.parts:
            known |= _check_part(part, parameter, stored, hub, is_quantised)
        for copy in parameter.copies:
            _check(copy, parameter.shape, _PLAIN, stored, hub)
            known.add(copy)
    empty = {name for name, shape in empty_parts(model) if name in stored and stored[name].shape == shape}
    strange = [name for name in stored if name not in known | empty]
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise CheckpointError(
            f"{hub}: expected no tensor {strange[0]}{more}: config.json describes a model without it "
            f"({model.num_layers} layers, {model.mtp_depth} MTP layers)"
        )


def _mtp_names(model: ModelConfig, depth: int) -> Iterator[str]:
    layer = f"model.layers.{model.num_layers + depth}."
    yield f"{layer}embed_tokens.weight"
    yield f"{layer}shared_head.head.weight"
    for each in mtp_parameters(model, depth):
        yield from each.parts


def _check_part(
    name: str, parameter: Parameter, stored: Mapping[str, Stored], hub: Path, is_quantised: bool
) -> set[str]:
    """Check one part, with its scales if it holds codes; gives the names that are accounted for."""
    is_matrix = len(parameter.shape) == 2
    dtypes = (*_PLAIN, fp8_form.CODES) if is_matrix and not parameter.copies else _PLAIN
    _check(name, parameter.part_shape, dtypes, stored, hub)
    if stored[name].dtype != fp8_form.CODES:
        return {name}
    if not is_quantised:
        raise CheckpointError(
            f"{hub}: {name}: expected quantization_config in config.json, got FP8 without one"
        )
    scale = name + fp8_form.SCALE_SUFFIX
    _check(scale, fp8_form.scale_shape(parameter.part_shape), fp8_form.SCALE_DTYPES, stored, hub)
    return {name, scale}


def _check(
    name: str, shape: tuple[int, ...], dtypes: tuple[str, ...], stored: Mapping[str, Stored], hub: Path
) -> None:
    got = stored.get(name)
    if got is None:
        raise CheckpointError(f"{hub}: expected tensor {name}, got none of that name")
    where = f"{hub / got.file}: {name}"
    if got.shape != shape:
        raise CheckpointError(f"{where}: expected shape {list(shape)}, got {list(got.shape)}")
    if got.dtype not in dtypes:
        raise CheckpointError(f"{where}: expected one of {', '.join(dtypes)}, got {got.dtype}")
