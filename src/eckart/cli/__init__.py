"""The command line: one command a verb. It says how and where; what is computed is in the recipe."""

from eckart.cli import compress as making
from eckart.cli import eval as measuring
from eckart.cli import finetune as training
from eckart.cli import inspect as looking
from eckart.cli import pitfalls as answering
from eckart.cli import probe as probing
from eckart.cli import run as running
from eckart.cli import search as searching
from eckart.cli.app import app, main

__all__ = ["answering", "app", "looking", "main", "making", "measuring", "probing", "running", "searching", "training"]
