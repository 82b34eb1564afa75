"""Frozen parameters: evaluate, predict, export."""
