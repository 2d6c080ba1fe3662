"""Names of files and folders: two texts that become the same with dashes have names of their own with a digest."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from eckart.support.names import LONGEST, dashed, dashed_apart


def test_what_stands_in_no_file_name_is_a_dash() -> None:
    assert dashed("a/b: c=1") == dashed("a-b c=1") == "a-b-c=1"
    assert dashed("../..") == dashed("散文") == ""


@given(st.text(max_size=400), st.text(max_size=400))
@example("散文.txt", "代码.txt")
@example("a" * 300 + "b", "a" * 300 + "c")
@example("\ud800", "\ud801")
def test_no_two_texts_have_one_name(one: str, other: str) -> None:
    assert (dashed_apart(one) == dashed_apart(other)) == (one == other)
    assert dashed_apart(one).isascii()
    assert 0 < len(dashed_apart(one)) <= LONGEST
