"""Shelf of pipeline schedules: it has no members yet, since a plan has one stage."""
