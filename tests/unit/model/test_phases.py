"""Phases keep the contract of their slots, and the phases of slices in a row are the whole model."""

from typing import Any

import pytest
import torch
from moe_comm.local import LocalDispatcher
from torch import Tensor

from moe_runtime.model.phase import SCALARS, Combine, Compute, Dispatch
from moe_runtime.model.transformer import Transformer
from tests.unit.model.samples import draw, draw_tokens, small_config, small_model

NAMES = {"mask", "embed", "attend", "shared", "experts", "dense", "merge", "norm", "loss", "mtp_in"}
SEQUENCES, SEQ_LEN = 2, 7
SLICES: dict[str, dict[str, Any]] = {
    "whole": {},
    "first": {"layers": range(2), "has_head": False},
    "middle": {"layers": range(1, 2), "has_embedding": False, "has_head": False},
    "last": {"layers": range(2, 3), "has_embedding": False},
    "head alone": {"layers": range(0), "has_embedding": False},
    "embedding alone": {"layers": range(0), "has_head": False},
}


def starting_state(model: Transformer) -> dict[str, Tensor]:
    config = model.config
    state = {"tokens": draw_tokens(config, SEQUENCES, SEQ_LEN + 1 + config.mtp_depth)}
    if not model.has_embedding:
        state["resid"] = draw(SEQUENCES, SEQ_LEN, config.hidden_size)
    return state


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def check_shapes(model: Transformer, slots: dict[str, Tensor]) -> None:
    """Shapes of the outputs of one phase, by slot, as `phase.py` gives them."""
    stream = (SEQUENCES, SEQ_LEN, model.config.hidden_size)
    tokens, top_k = SEQUENCES * SEQ_LEN, model.config.top_k
    wanted = {
        **dict.fromkeys(("resid", "routed", "ffn_in", "hidden"), stream),
        **dict.fromkeys(("gate_weights", "expert_ids"), (tokens, top_k)),
        **dict.fromkeys(("rows", "expert_out"), (tokens * top_k, model.config.hidden_size)),
        "row_weights": (tokens * top_k,),
        "row_counts": (model.config.num_experts,),
        "mask": (SEQUENCES, 1, SEQ_LEN, SEQ_LEN),
        **dict.fromkeys(SCALARS, ()),
    }
    for slot, tensor in slots.items():
        assert tuple(tensor.shape) == wanted[slot], slot


def run(model: Transformer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run all phases on detached slots, as a stage does, checking each; scalars add up."""
    dispatcher = LocalDispatcher(model.config.num_experts)
    handle: Any = None
    for phase in model.phases():
        assert set(phase.inputs) <= state.keys(), f"{phase.layer} {phase.name} reads what nobody wrote"
        inputs = [state[slot] for slot in phase.inputs]
        before = [tensor.clone() for tensor in inputs]
        if isinstance(phase, Dispatch):
            received = dispatcher.dispatch(inputs[0].flatten(0, 1), *inputs[1:]).wait()
            handle = received.handle
            outputs: tuple[Tensor, ...] = (received.rows, received.row_weights, received.row_counts)
        elif isinstance(phase, Combine):
            stream = (SEQUENCES, SEQ_LEN, model.config.hidden_size)
            outputs = (dispatcher.combine(inputs[0], handle).wait().view(stream),)
        else:
            outputs = phase.fn(*(x.requires_grad_() if x.is_floating_point() else x for x in inputs))
            places = {storage(tensor) for tensor in outputs}
            assert len(places) == len(outputs), f"{phase.name}: outputs share memory"
            assert not places & {storage(tensor) for tensor in inputs}, f"{phase.name} returns a view"
        assert all(torch.equal(x, old) for x, old in zip(inputs, before, strict=True)), "an input was changed"
        written = dict(zip(phase.outputs, (x.detach() for x in outputs), strict=True))
        check_shapes(model, written)
        for slot, value in written.items():
            state[slot] = state.get(slot, 0) + value if slot in SCALARS else value
    return state


@pytest.mark.parametrize("separator", [None, 5], ids=["causal", "documents"])
@pytest.mark.parametrize("name", SLICES)
def test_each_slot_is_written_before_it_is_read_and_no_output_is_a_view(
    name: str, separator: int | None
) -> None:
    model = small_model(document_separator=separator, **SLICES[name])
    state = run(model, starting_state(model))
    assert ("loss" in state) == ("loss_mtp" in state) == model.has_head
    assert "resid" in state


@pytest.mark.parametrize("separator", [None, 5], ids=["causal", "documents"])
def test_slices_in_a_row_give_the_losses_of_the_whole_bit_for_bit(separator: int | None) -> None:
    config = small_config()
    whole = small_model(document_separator=separator)
    tokens = draw_tokens(config, SEQUENCES, SEQ_LEN + 3)
    wanted = whole.losses(tokens)
    state: dict[str, Tensor] = {}
    total = torch.zeros((), dtype=torch.float64)
    for name in ("embedding alone", "middle", "last"):
        slice_of = {**SLICES[name]}
        if name == "embedding alone":
            slice_of["layers"] = range(1)
        model = Transformer(config, dtype=torch.float64, document_separator=separator, **slice_of)
        model.load_state_dict({key: whole.state_dict()[key] for key in model.state_dict()})
        state = {slot: state[slot] for slot in ("resid",) if slot in state}
        state = run(model, {**state, "tokens": tokens})
        total = total + state.get("balance", 0)
    assert torch.equal(state["loss"], wanted.loss) and torch.equal(state["loss_mtp"], wanted.loss_mtp)
    torch.testing.assert_close(total, wanted.balance, rtol=1e-14, atol=0)


def test_phases_come_in_the_documented_order_with_the_names_of_their_layers() -> None:
    listed = [(phase.layer, phase.name) for phase in small_model(small_config(mtp_depth=1)).phases()]
    routed = ["attend", "dispatch", "shared", "experts", "combine"]
    assert listed == [
        ("embed", "embed"),
        ("layers.0", "dense"),
        *(("layers.1", name) for name in routed),
        *(("layers.2", name) for name in routed),
        ("layers.2", "merge"),
        ("norm", "norm"),
        ("head", "loss"),
        ("mtp.0", "mtp_in"),
        *(("mtp.0.block", name) for name in [*routed, "merge"]),
        ("mtp.0", "norm"),
        ("mtp.0", "loss"),
    ]


@pytest.mark.parametrize("name", SLICES)
def test_names_are_the_known_ones_and_a_slice_without_ends_needs_no_tokens(name: str) -> None:
    phases = small_model(**SLICES[name]).phases()
    assert {phase.name for phase in phases if isinstance(phase, Compute)} <= NAMES
    if name == "middle":
        assert not any("tokens" in phase.inputs for phase in phases)
