"""Every parameter of a model has the class that its name says."""

from moe_runtime.config.load import load_config
from moe_runtime.model.transformer import Transformer
from moe_runtime.optim.classes import CLASSES, class_of


def test_each_parameter_of_a_model_has_its_class() -> None:
    config = load_config("configs/run/quickstart.yaml", ("model.num_layers=2",))
    found: dict[str, set[str]] = {name: set() for name in CLASSES}
    for name, _ in Transformer(config.model).named_parameters():
        found[class_of(name)].add(name.removeprefix("layers.1.").removeprefix("mtp.0.block."))
    assert found["router"] == {"moe.router.weight"}
    assert found["experts"] == {"moe.experts.gate_up", "moe.experts.down"}
    assert found["embedding"] == {"embed.weight"} and found["head"] == {"head.weight"}
    assert {"moe.shared.gate_up.weight", "moe.shared.down.weight", "mtp.0.eh_proj.weight"} <= found["ffn"]
    assert {"attn.q_a.weight", "attn.o.weight"} <= found["attention"]
    assert {"attn.q_a_norm.weight", "attn_norm.weight", "norm.weight", "mtp.0.enorm.weight"} <= found["norms"]
    assert all("norm" not in name for kind, names in found.items() for name in names if kind != "norms")
