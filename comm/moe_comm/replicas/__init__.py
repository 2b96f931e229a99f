"""The search behind `moe_comm.rebalance`: copies of experts, their ranks, few moves between placements."""
