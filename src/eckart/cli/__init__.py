"""The command line: one command a verb. It says how and where; what is computed is in the recipe."""

from eckart.cli import answering, looking, making, measuring, probing, running, searching, training
from eckart.cli.app import app, main

__all__ = ["answering", "app", "looking", "main", "making", "measuring", "probing", "running", "searching", "training"]
