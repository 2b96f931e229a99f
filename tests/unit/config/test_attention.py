"""The kind of attention: MLA goes without saying, MHA is told, and what it lacks is refused."""

from pathlib import Path

import pytest

from moe_runtime.config.counts import attention_weights, cache_elements, cache_width
from moe_runtime.config.load import dump_config, load_config
from tests.unit.config.samples import MODEL, refusal, values, write


def test_mla_is_not_in_a_dump_and_mha_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml")
    mla = load_config(path)
    named, mha = (load_config(path, [f"model.attention={kind}"]) for kind in ("mla", "mha"))
    assert mla == named and dump_config(mla) == dump_config(named)
    assert "attention" not in mla.model_dump()["model"]
    assert mha.model_dump(mode="json")["model"] == mla.model_dump(mode="json")["model"] | {"attention": "mha"}
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(mha))
    assert load_config(again) == mha


def test_mha_does_without_latent_widths_and_mla_does_not(tmp_path: Path) -> None:
    run = values()
    del run["model"]["kv_lora_rank"], run["model"]["top_k"]
    path = write(tmp_path / "a.yaml")
    path.write_text(str(run))
    assert refusal(path, "model.top_k=2", "model.attention=mha") == []
    lines = refusal(path)
    for key in ("kv_lora_rank", "top_k"):
        assert f"{path}:1: model.{key}: required key is missing" in lines, lines


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("recompute.mla_up=true", "recompute.mla_up: model.attention mha has no latents to make"),
        ("precision=fp8", "precision: fp8 is for model.attention mla, got mha; set bf16"),
        ("model.attention=gqa", "model.attention: expected one of 'mla' or 'mha', got text 'gqa'"),
    ],
)
def test_what_mha_lacks_is_refused_in_one_line(tmp_path: Path, override: str, says: str) -> None:
    (line,) = refusal(write(tmp_path / "a.yaml", model={"attention": "mha"}), override)
    assert line.startswith(f"override: {says}")


def test_weights_and_cache_are_those_of_the_heads(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml")
    mla, mha = (load_config(path, [f"model.attention={kind}"]).model for kind in ("mla", "mha"))
    heads, hidden = MODEL["num_heads"], MODEL["hidden_size"]
    assert attention_weights(mha) == heads * hidden * (12 + 12 + 8 + 8)
    assert (cache_width(mla), cache_width(mha)) == (8 + 4, heads * (12 + 8))
    assert cache_elements(mha) == 5 * cache_width(mha) == cache_elements(mha, drafts=False) + cache_width(mha)
