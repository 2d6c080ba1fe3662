"""HTML: small tables for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as a notebook shows it; every title and cell is text, whatever is in it."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def span(values: Iterable[float], form: str = ",") -> str:
    """ "12 to 96", or "12" where all are alike; a dash for none."""
    shown = sorted(values)
    if not shown:
        return "\u2013"
    ends = list(dict.fromkeys(f"{value:{form}}" for value in (shown[0], shown[-1])))
    return " to ".join(ends)
