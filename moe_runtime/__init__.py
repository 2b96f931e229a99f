"""Training runtime for Mixture-of-Experts language models of the DeepSeek-V3 kind."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`moe_runtime.load_model`, without importing torch before it is asked for."""
    if name == "load_model":
        from moe_runtime.checkpoint.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
