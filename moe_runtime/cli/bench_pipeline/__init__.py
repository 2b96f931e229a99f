"""`moe-runtime bench pipeline`: schedules and overlap against their peers, on limited links and without."""
