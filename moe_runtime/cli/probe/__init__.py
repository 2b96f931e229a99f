"""What this machine's cores reach: products, attention, copies and messages, measured for a cluster file."""
