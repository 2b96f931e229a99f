"""Checkpoints: safetensors files and one JSON manifest, written whole or not at all."""
