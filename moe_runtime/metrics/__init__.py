"""What a run reports: one JSON record a step, and the sinks that read it."""
