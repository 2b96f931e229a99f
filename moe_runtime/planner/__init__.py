"""What a program or a run will cost, reckoned without running it. No torch here."""
