"""Shelf of searchers: from a problem to the best strategy, with a bound."""
