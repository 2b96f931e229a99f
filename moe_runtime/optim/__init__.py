"""AdamW over flat FP32 partitions, how its moments are stored, schedules and parameter groups."""
