"""`moe-runtime bench optim`: the AdamW step against the optimizers of others, and against memory."""
