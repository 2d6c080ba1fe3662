"""Extras: packages that a user may do without."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def import_extra(package: str, extra: str, need: str) -> ModuleType:
    """A package that an extra of eckart brings.

    Args:
        need: what it is for, as the error begins.

    Raises:
        ValueError: it is not installed; says which extra to install.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise ValueError(f"{need}: pip install 'eckart[{extra}]' ({error})") from error
