"""The command line: one command a verb. It says how and where; what is computed is in the recipe."""

from eckart.cli import looking, making, measuring, running, searching
from eckart.cli.app import app, main

__all__ = ["app", "looking", "main", "making", "measuring", "running", "searching"]
