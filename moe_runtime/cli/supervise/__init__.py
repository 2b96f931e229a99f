"""What the launcher does while ranks live: watches, restarts, shrinks, and says how it ended."""
