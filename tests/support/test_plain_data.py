"""Plain data: what is read, and that everything else is one error that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from eckart.support.plain_data import LARGEST_YAML, MOST_VALUES, parse_json, parse_yaml, read_json, read_yaml

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
LAYERS = (("a", "x"), ("b", "*a"), ("c", "*b"), ("d", "*c"))
REPEATED = "\n".join(f"{key}: &{key} [{','.join([item] * 40)}]" for key, item in LAYERS)


@given(PLAIN)
def test_what_was_written_is_read(value: object) -> None:
    assert parse_yaml(yaml.safe_dump(value), "it") == value
    assert parse_json(json.dumps({"value": value}), "it") == {"value": value}


@given(st.text() | st.text(alphabet="{}[]&*!?:-,'\"#|>% \n\ta0", max_size=60))
def test_any_text_is_a_value_or_one_error_that_names_it(text: str) -> None:
    for parse in (parse_yaml, parse_json):
        refusal = ""
        try:
            parse(text, "recipe.yaml")
        except ValueError as error:
            refusal = str(error)
        assert refusal == "" or refusal.startswith("recipe.yaml ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keep: 0.8\nmodel: x\nkeep: 0.5\n", "the key 'keep' stands twice"),
        ("method: {name: svd, name: asvd}", "the key 'name' stands twice"),
        ("[" * 100_000, "nested too deeply"),
        (REPEATED, f"more than {MOST_VALUES:,} values"),
        ("when: 2026-13-45", "not YAML: month must be in 1..12"),
        ("a: !!python/object/apply:os.system [x]", "not YAML: could not determine a constructor"),
    ],
)
def test_yaml_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^it (is|holds).*{message}"):
        parse_yaml(text, "it")


def test_json_that_is_refused() -> None:
    for text, message in (
        ('{"ranks": {"a": 1, "a": 2}}', "the key 'a' stands twice"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[1]", "holds no JSON object"),
        ("{", "is not JSON"),
    ):
        with pytest.raises(ValueError, match=rf"^it .*{message}|^it {message}"):
            parse_json(text, "it")


def test_merging_keys_override_and_are_not_doubles() -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}\n"
    assert parse_yaml(text, "it")["c"] == {"x": 3, "y": 1}


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "one.yaml"
    file.write_bytes(b"\xef\xbb\xbfmodel: x\n")
    assert read_yaml(file) == {"model": "x"}
    file.write_text("")
    assert read_yaml(file) == {}
    for content, message in (
        (b"- a\n- b\n", "expected keys and values"),
        (b"1: x\n", "expected keys and values"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"# " + b"x" * LARGEST_YAML, "is larger than"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"one.yaml.*{message}"):
            read_yaml(file)
    file.write_text('{"a": 1}')
    assert read_json(file) == {"a": 1}
    with pytest.raises(OSError, match="none"):
        read_json(tmp_path / "none")
