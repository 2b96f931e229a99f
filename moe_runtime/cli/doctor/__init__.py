"""What of this machine and this installation would keep a run from starting, or make it slow."""
