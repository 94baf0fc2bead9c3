"""Weights of a run for other programs."""
