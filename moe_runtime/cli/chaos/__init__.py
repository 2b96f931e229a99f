"""`moe-runtime chaos`: train under random faults, and hold the result against a clean run."""
