"""Single-device mathematics of the model; parallelism arrives from outside, by injection."""
