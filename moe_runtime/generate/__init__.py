"""Continues a prompt from a trained model."""
