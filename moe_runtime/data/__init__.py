"""Text to token shards, and token shards to the same global batch for every layout."""
