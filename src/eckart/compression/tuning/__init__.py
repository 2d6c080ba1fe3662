"""Tuning: gradient steps on a compressed model, a block or all of it."""
