"""Names of the files in a run folder that readers of a run look for."""

CONFIG_FILE = "config.yaml"  # resolved: every key, defaults too
METRICS_FILE = "metrics.jsonl"  # one record a step
EVENTS_FILE = "events.jsonl"  # what happened beside the steps
TRACE_FILE = "trace.json"  # every span of one step
