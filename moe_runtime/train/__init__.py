"""One optimizer step, the loop around it, evaluation and recovery."""
