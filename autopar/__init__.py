"""Finds the fastest way to train a PyTorch model on a cluster, says how good it is, and runs it."""

__version__ = "0.1.0"
