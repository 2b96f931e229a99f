"""`moe-runtime bench fp8`: products of every back end against BF16, with the peaks of the same run."""
