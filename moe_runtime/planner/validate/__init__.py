"""A plan held against a run that was made."""
