"""Runs chunks of the model over ranks: mesh, stages, overlap, transfers, executor, ZeRO."""
