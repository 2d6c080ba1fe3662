"""Plain data, YAML and JSON: read whole of files that anybody may have written, or refused with the file's name."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

# Largest files that are read, in bytes. A recipe or a study is a few KB, and YAML takes a second a MB; what a run
# writes as JSON, a plan or what is known of each linear, is a few MB for the largest models.
LARGEST_YAML = 1 << 20
LARGEST_JSON = 1 << 28
# Values in one YAML document, those that an alias repeats counted each time.
MOST_VALUES = 100_000


def read_yaml(file: Path) -> dict[str, Any]:
    """The keys and values of a YAML file; an empty one has none.

    Raises:
        ValueError: as `parse_yaml` raises it, the file is larger than LARGEST_YAML, or holds no keys and values.
        OSError: it cannot be read.
    """
    data = parse_yaml(_text(file, LARGEST_YAML), str(file))
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ValueError(f"{file}: expected keys and values, such as 'model: ...'")
    return data


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML document.

    Args:
        where: names the text in the message.

    Raises:
        ValueError: no YAML, a key that stands twice, nested too deeply, or more than MOST_VALUES values.
    """
    try:
        value = yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{where} is not YAML: {error}") from error
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None
    if _count(value) > MOST_VALUES:
        raise ValueError(f"{where} holds more than {MOST_VALUES:,} values, with what its aliases repeat")
    return value


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: as `parse_json` raises it, or the file is larger than LARGEST_JSON.
        OSError: it cannot be read.
    """
    return parse_json(_text(file, LARGEST_JSON), str(file))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """The object that a text holds as JSON.

    Args:
        where: names the text in the message.

    Raises:
        ValueError: no JSON, no object, a key that stands twice, or nested too deeply.
    """
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError(f"{where} holds no JSON object")
    return data


def finite(value: Any) -> Any:
    """Plain data for JSON: names as text, lists for tuples, null for every number that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(file: Path, largest: int) -> str:
    with file.open("rb") as stream:
        content = stream.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"{file} is larger than {largest:,} bytes, more than any file of its kind")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        (key, _), *_others = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} stands twice")
    return data


class _UniqueKeys(yaml.SafeLoader):
    """Plain values only, and no key twice: of two, YAML's own loader drops the first without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return node


def _count(value: Any) -> int:
    """How many values there are in a value, itself included; it stops past MOST_VALUES."""
    count, waiting = 0, [value]
    while waiting and count <= MOST_VALUES:
        inside = waiting.pop()
        count += 1
        waiting.extend(inside.values() if isinstance(inside, dict) else inside if isinstance(inside, list) else ())
    return count
