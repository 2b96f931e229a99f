"""One optimizer step, the loop around it, validation within it and recovery."""
