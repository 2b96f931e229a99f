"""Runs whose ranks are processes of one machine and share its cores: a step is simulated phase by phase."""
