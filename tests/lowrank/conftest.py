"""Shape types are checked in every test of this folder; `as_users_see_it` turns the checks off again."""

from collections.abc import Iterator

import pytest
from jaxtyping import config


@pytest.fixture(scope="module", autouse=True)
def shape_checks() -> Iterator[None]:
    """Module scope, because hypothesis runs many examples inside one function scope."""
    config.update("jaxtyping_disable", False)
    yield
    config.update("jaxtyping_disable", True)


@pytest.fixture
def as_users_see_it() -> Iterator[None]:
    """Without the checks, which would refuse a wrong shape before the library's own message does."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
