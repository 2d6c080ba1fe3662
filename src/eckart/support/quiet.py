"""Quiet: other libraries' chatter, held back while they are imported or called."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# Who warns of kernels for other machines while torchao is imported.
TORCHAO = ("torchao", "torch.utils._pytree")


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Inside, the named loggers give errors only; afterwards their levels are what they were."""
    named = [logging.getLogger(name) for name in loggers]
    before = [logger.level for logger in named]
    try:
        for logger in named:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(named, before, strict=True):
            logger.setLevel(level)
