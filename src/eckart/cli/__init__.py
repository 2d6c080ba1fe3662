"""The command line: one command a verb. It says how and where; what is computed is in the recipe."""

from eckart.cli.app import main

__all__ = ["main"]
