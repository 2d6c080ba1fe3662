"""Palette: the colours of a report, each for a light and for a dark page.

Figures are written in the light tones; the page replaces each by its dark partner where the reader wants a dark page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tone:
    """One colour as "#rrggbb" on a light page and on a dark one."""

    light: str
    dark: str


INK = Tone("#262a33", "#e4e7ec")
QUIET = Tone("#5f6775", "#a3acba")
GRID = Tone("#e6e4de", "#2c323c")
AXIS = Tone("#b9b6ad", "#4b5360")
SURFACE = Tone("#fffffe", "#191d24")
DENSE = Tone("#747c8a", "#98a1b0")
GAIN = Tone("#127c72", "#4cc3b0")
LOSS = Tone("#c4532a", "#ee8f66")

# Of methods, in this order. Every tone has at least 3:1 contrast to its page, and they stay apart for the three
# kinds of colour blindness; marks and dashes tell methods apart as well.
METHODS = (
    Tone("#3b6fca", "#73bdfd"),
    Tone("#be4f32", "#e37a37"),
    Tone("#075f47", "#59996b"),
    Tone("#b15290", "#c580ab"),
    Tone("#b7891c", "#f4da8a"),
    Tone("#5c1d8e", "#8a74ee"),
    Tone("#109ab1", "#4fdfe8"),
    Tone("#5c3b24", "#f7b4a6"),
)
MARKS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "triangle-down", "star")
DASHES = ("solid", "dash", "dot", "dashdot")

# From little to much. Lightness is monotone, so that the order survives without hue.
_ANCHORS_LIGHT = ("#f3ecdc", "#a9cdb9", "#4b98a6", "#2a5f93", "#1c2c5e")
_ANCHORS_DARK = ("#242b38", "#2d5279", "#3c8a9a", "#86c4a3", "#f4e7bd")
_STEPS = 33


def _blend(anchors: Sequence[str], share: float) -> str:
    """The colour at `share` (0 to 1) of the way through the anchors."""
    place = share * (len(anchors) - 1)
    low = min(int(place), len(anchors) - 2)
    parts = [[int(anchors[low + side][at : at + 2], 16) for at in (1, 3, 5)] for side in (0, 1)]
    mixed = [round(a + (b - a) * (place - low)) for a, b in zip(*parts, strict=True)]
    return "#" + "".join(f"{value:02x}" for value in mixed)


RAMP = tuple(
    Tone(_blend(_ANCHORS_LIGHT, step / (_STEPS - 1)), _blend(_ANCHORS_DARK, step / (_STEPS - 1)))
    for step in range(_STEPS)
)

DARK = {
    tone.light: tone.dark for tone in (INK, QUIET, GRID, AXIS, SURFACE, DENSE, GAIN, LOSS, *METHODS, *RAMP)
}  # what the page replaces on a dark page


def ramp(share: float) -> str:
    """The light tone at `share` (0 to 1) of the ramp."""
    return RAMP[round(min(max(share, 0.0), 1.0) * (_STEPS - 1))].light


def ramp_scale(start: float = 0.0) -> list[list[float | str]]:
    """The ramp from `start` to 1 as plotly's colour scale."""
    return [[step / 16, ramp(start + (1 - start) * step / 16)] for step in range(17)]


@dataclass(frozen=True)
class Look:
    """How a method is drawn: a tone, a mark, a dash."""

    color: str
    mark: str
    dash: str


def give_looks(series: Sequence[tuple[str, str]]) -> dict[str, Look]:
    """{series: look} for (method, series) pairs in order: one tone a method, one dash for each of its series."""
    methods: list[str] = []
    seen: dict[str, int] = {}
    looks: dict[str, Look] = {}
    for method, name in series:
        if name in looks:
            continue
        if method not in methods:
            methods.append(method)
        place, variant = methods.index(method), seen.get(method, 0)
        seen[method] = variant + 1
        looks[name] = Look(
            METHODS[place % len(METHODS)].light, MARKS[place % len(MARKS)], DASHES[variant % len(DASHES)]
        )
    return looks
