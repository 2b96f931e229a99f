"""What `eval` and `compare` do once their options are read."""
