"""Training runtime for Mixture-of-Experts language models of the DeepSeek-V3 kind."""
