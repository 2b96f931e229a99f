"""`moe-runtime ablate`: arms that differ in one thing, on the same data and seeds, in pairs."""
