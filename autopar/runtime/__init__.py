"""Torch's door out: a plan becomes a running program, is verified, and measured."""
