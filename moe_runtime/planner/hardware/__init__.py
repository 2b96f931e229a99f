"""Machines as data: what a plan may know about where a run will be."""
