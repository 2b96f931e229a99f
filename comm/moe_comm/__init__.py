"""Expert-parallel communication: move tokens to the ranks that hold their experts, and back."""

from moe_comm.factory import open_dispatcher
from moe_comm.placement import Placement

__all__ = ["Placement", "open_dispatcher"]
