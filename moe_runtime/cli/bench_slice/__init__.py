"""Training speed of a slice of DeepSeek-V3 on one GPU, BF16 and FP8 in turn."""
