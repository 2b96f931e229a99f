"""What a run takes on a machine: memory, traffic, time, money, reckoned from its config alone."""
