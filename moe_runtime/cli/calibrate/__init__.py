"""`moe-runtime plan --calibrate`: short runs on this machine, and a cluster file of what they took."""
