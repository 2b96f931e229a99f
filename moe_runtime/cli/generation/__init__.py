"""What `moe-runtime generate` does: opening a model, answering prompts, talking."""
