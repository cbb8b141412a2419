"""Nouns: the frozen values that pass between the steps."""
