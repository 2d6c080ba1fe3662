"""Runs: recipes carried out."""
