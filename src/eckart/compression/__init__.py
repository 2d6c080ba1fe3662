"""Compression: moments and ranks into a low-rank model."""
