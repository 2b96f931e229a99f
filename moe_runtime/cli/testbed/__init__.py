"""What benchmarks measure on: namespaces joined by limited links, rank processes, shares of the processor."""
