"""The kernel of latent attention in Triton's interpreter, run as a module by the test beside it.

The interpreter cannot multiply BF16, so operands are FP32 and FP16 here; BF16 is for a GPU. Each case raises
where something is wrong; the last line printed is what went wrong by case, as JSON.
"""

import json
import traceback
from unittest.mock import Mock, patch

import numpy
import torch
from torch import Tensor

from moe_runtime.model import latent_attention, latent_attention_triton
from moe_runtime.model.inference import InferenceModel
from moe_runtime.model.latent_attention_triton import Tile
from moe_runtime.model.transformer import Transformer
from tests.unit.interpreted import let_sizes_be_loop_bounds
from tests.unit.model.latent_attention_texts import compare
from tests.unit.model.samples import draw_tokens, small_config, unsettle

SMALL = Tile(16, 4, 2)


def case_one_query_of_texts_that_end_at_and_around_the_borders_of_blocks() -> None:
    compare([0, 15, 16, 17, 31, 63], heads=4, tile=SMALL)


def case_a_text_shared_by_several_programs() -> None:
    for parts in (2, 3, 7):
        compare([0, 1, 47, 100], heads=4, parts=parts, tile=SMALL)


def case_drafts_each_see_their_own_end() -> None:
    compare([0, 14, 30], new=3, heads=5, tile=SMALL)
    compare([0, 14, 30, 60], new=3, heads=5, parts=4, tile=SMALL)


def case_more_rows_than_a_tile() -> None:
    compare([3, 40], new=2, heads=40, parts=2, tile=SMALL)


def case_slots_of_a_module_begin_late() -> None:
    compare([2, 33], new=2, heads=4, first=2, parts=2, tile=SMALL)


def case_documents_begin_inside_the_cache() -> None:
    compare([5, 33, 64], new=2, heads=4, begins=[0, 20, 64], parts=3, tile=SMALL)


def case_half_precision_and_the_tiles_of_the_gpu() -> None:
    compare([0, 70], heads=3, dtype=torch.float16)
    compare([70], new=2, heads=33, dtype=torch.float16, parts=2)


def case_a_text_that_sees_nothing_gives_zeros() -> None:
    compare([-1, 20], heads=4, parts=2, tile=SMALL)


def case_no_text() -> None:
    compare([], heads=4)


def decode(model: InferenceModel, tokens: Tensor) -> list[Tensor]:
    """Logits of ragged prompts, of one token more of each, and of three, as drafts are read."""
    cache = model.new_cache(len(tokens), 32)
    made = [model.logits(model.read(cache, tokens[:, :9], torch.tensor([1, 9, 4])))]
    return made + [model.logits(model.read(cache, part)) for part in tokens[:, 9:].split((1, 3), dim=1)]


def case_a_model_by_the_kernel_is_the_model() -> None:
    config = small_config(kv_lora_rank=16, qk_rope_head_dim=16)
    transformer = Transformer(config, dtype=torch.float32)
    transformer.init_weights(seed=1)
    unsettle(transformer)
    model, tokens = InferenceModel(transformer), draw_tokens(config, 3, 13)
    with torch.no_grad():
        wanted = decode(model, tokens)
        kernel = Mock(wraps=latent_attention_triton.attend)
        with (
            patch.object(latent_attention, "_kernels", lambda *_: latent_attention_triton),
            patch.object(latent_attention_triton, "attend", kernel),
        ):
            found = decode(model, tokens)
    assert kernel.call_count >= 2 * config.num_layers
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def main() -> None:
    """Run all cases."""
    let_sizes_be_loop_bounds()
    wrong = {}
    for name, case in list(globals().items()):
        if name.startswith("case_"):
            try:
                with numpy.errstate(divide="ignore"):  # the logarithm of an empty softmax
                    case()
                wrong[name] = ""
            except Exception:
                wrong[name] = traceback.format_exc()
    print(json.dumps(wrong))


if __name__ == "__main__":
    main()
