"""`moe-runtime bench comm`: dispatch and combine against their peers, on rate-limited links and without."""
