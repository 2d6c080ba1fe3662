"""Mixtures: several corpora under one name, each with a weight, and how samples are shared out among them.

    ptb+c4                      equal parts
    wikitext2*2+c4              two thirds and one third
    broad*3+mydomain.jsonl      a mixture in a mixture: its shares are shares of three quarters

The mark of a weight is `*`, which neither a data set of the hub, nor its configuration, nor a file on every system can
have in its name; a shell may want the name in quotes.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

# The languages of broad besides English: those that today's multilingual models are most used in, in eight scripts.
LANGUAGES = ("zh", "ja", "ko", "de", "fr", "es", "pt", "ru", "ar", "hi")

# {name: {corpus: weight}}.
MIXTURES: dict[str, dict[str, int]] = {
    # An encyclopaedia, the web, code, conversations, languages. The weights add up to 32, so that 32 samples, and every
    # multiple of them, are shared out exactly.
    "broad": {
        "wikipedia_en": 6,
        "c4": 6,
        "codeparrot": 5,
        "ultrachat": 5,
        **{f"wikipedia_{language}": 1 for language in LANGUAGES},
    },
    # What SFSD calibrates on.
    "commonsense": dict.fromkeys(("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge"), 1),
}
# What calibrates where nobody names a text.
BROAD = "broad"
GOLDEN = (math.sqrt(5) - 1) / 2
WEIGHT = re.compile(r"\d+(\.\d+)?|\.\d+")


def shares_of(name: str) -> dict[str, Fraction]:
    """{corpus: its share}, which add up to one, of a name: one corpus or file, or a mixture as above.

    A corpus that is in it more than once has the sum of its shares.

    Raises:
        ValueError: a weight that is no positive number, or a name that is missing.
    """
    shares: dict[str, Fraction] = {}
    terms = [_weighed(name, term) for term in _terms(name)]
    whole = sum(weight for _, weight in terms)
    for corpus, weight in terms:
        inner = MIXTURES.get(corpus, {corpus: 1})
        for part, own in inner.items():
            shares[part] = shares.get(part, Fraction(0)) + weight / whole * Fraction(own, sum(inner.values()))
    return shares


def parts_of(name: str) -> tuple[str, ...]:
    """The corpora that a name asks for. Raises ValueError as `shares_of`."""
    return tuple(shares_of(name))


def spell_out(name: str) -> str:
    """The name without names of MIXTURES, which a later eckart may mix otherwise: "boolq+piqa", "c4*2+ptb"."""
    if not any(_weighed(name, term)[0] in MIXTURES for term in _terms(name)):
        return name
    shares = shares_of(name)
    whole = math.lcm(*(share.denominator for share in shares.values()))
    weights = {part: int(share * whole) for part, share in shares.items()}
    if len(set(weights.values())) == 1:
        return "+".join(weights)
    return "+".join(part if weight == 1 else f"{part}*{weight}" for part, weight in weights.items())


def share_out(name: str, samples: int) -> dict[str, int]:
    """{corpus: how many of the samples it gets}: by largest remainder, and none gets nothing.

    Where the remainders leave a corpus without a sample, it has one of the corpus that is most above its share.

    Raises:
        ValueError: fewer samples than corpora, and as `shares_of`.
    """
    quotas = {part: share * samples for part, share in shares_of(name).items()}
    if samples < len(quotas):
        raise ValueError(f"{samples} samples are fewer than the {len(quotas)} corpora of {name}: raise samples")
    counts = {part: int(quota) for part, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda part: counts[part] - quotas[part])
    for part in by_remainder[: samples - sum(counts.values())]:
        counts[part] += 1
    for part in [part for part, count in counts.items() if not count]:
        giver = max((other for other in counts if counts[other] > 1), key=lambda other: counts[other] - quotas[other])
        counts[giver] -= 1
        counts[part] = 1
    return counts


def interleaved(counts: Sequence[int]) -> list[int]:
    """The order of rows that lie one part after the other in which every first few are of all parts by their shares.

    Args:
        counts: rows of each part. The rows of a part stay in their order.
    """
    # Each part's rows are evenly spaced, and each part begins elsewhere: otherwise parts of one row would all meet in
    # the middle. Multiples of the golden ratio are spread evenly however many parts there are.
    places = [(row + part * GOLDEN % 1) / count for part, count in enumerate(counts, 1) for row in range(count)]
    return sorted(range(len(places)), key=places.__getitem__)


def describe(shares: Mapping[str, Fraction]) -> str:
    """In words: "c4 0.67, ptb 0.33"."""
    return ", ".join(f"{part} {float(share):.2g}" for part, share in shares.items())


def _terms(name: str) -> list[str]:
    return [name] if name in MIXTURES or Path(name).is_file() else name.split("+")


def _weighed(name: str, term: str) -> tuple[str, Fraction]:
    """A term's corpus and weight."""
    corpus, mark, weight = (term, "", "") if Path(term).is_file() else term.rpartition("*")
    if not mark:
        corpus = term
    elif WEIGHT.fullmatch(weight) is None or not Fraction(weight):
        raise ValueError(f"{name!r}: weight {weight!r} of {corpus!r} is no positive number, as in wikitext2*2+c4")
    if not corpus:
        raise ValueError(f"{name!r}: the name of a corpus is missing")
    if Path(corpus).is_file():
        corpus = os.path.normpath(corpus)  # a file that is named in two ways is one part
    return corpus, Fraction(weight) if mark else Fraction(1)
