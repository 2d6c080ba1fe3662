"""Extras: a package that is there, and one that is not."""

from __future__ import annotations

import json

import pytest

from eckart.support.extras import import_extra


def test_a_package_that_is_there_is_given() -> None:
    assert import_extra("json", "gguf", "a test needs it") is json


def test_one_that_is_not_is_an_error_with_what_to_install() -> None:
    with pytest.raises(
        ValueError, match=r"^a test needs it: pip install 'eckart\[peft\]' \(No module named 'nowhere'\)$"
    ):
        import_extra("nowhere", "peft", "a test needs it")
