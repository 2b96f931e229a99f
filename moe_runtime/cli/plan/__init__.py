"""`moe-runtime plan`: the command, and how a plan reads in a terminal."""
