"""How good a model is: loss on text, tasks, comparisons. Reads checkpoints and data, trains nothing."""
