"""Expert-parallel communication: move tokens to the ranks that hold their experts, and back."""

from moe_comm.factory import open_dispatcher
from moe_comm.layer import moe_layer
from moe_comm.placement import Placement

__all__ = ["Placement", "moe_layer", "open_dispatcher"]
