"""What `moe-runtime context` does: measuring models beyond their old length, and showing what was found."""
