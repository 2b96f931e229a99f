"""What is measured of a step on every rank, and how it becomes one record."""
