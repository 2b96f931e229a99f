"""Expert-parallel communication: move tokens to the ranks that hold their experts, and back."""
