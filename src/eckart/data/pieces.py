"""Pieces: where a long text can be cut so that the tokens of its pieces are, one by one, those of the whole.

A tokenizer of the `tokenizers` library looks for added tokens, then normalises, splits into words (pre-tokenizes), and
runs its model on each word. A cut is made before a single space between two letters or digits: "one| two". Tokens to
both sides are those of the whole text where each of these steps works on both sides as if the other were not there.
That is shown below for the steps in use by the families of models; a tokenizer with any other step is given the whole
text.

1. Added tokens: none has a space in it, and none swallows the spaces to its right.
2. Normalisers that work on one character at a time or, as NFC, on one with its combining marks: a letter or a digit
   followed by a space, and a space followed by one, are never changed together.
3. Words. Either a step splits at every single space, and what is a word to one side does not depend on the other side;
   then any model will do. Or nothing splits there, as in Llama's and Gemma's tokenizers, where a space is written as
   "▁": then the model must be a BPE in whose vocabulary no token holds a letter or digit followed by "▁", so that no
   merge ever goes across the cut, and merges to one side do not depend on the other side.
4. Where "▁" is put in front of the whole text, it would be put in front of each piece: such a piece begins after the
   space of the cut, for which that "▁" stands.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

# Characters of a piece: its tokens' records take some tens of MB.
PIECE = 2**18
SPACE = "▁"
CUT = re.compile(r"(?<=[^\W_]) (?=[^\W_])")
JOINED = re.compile(rf"[^\W_]{SPACE}")
# Of one character each, or of one with its combining marks.
NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"}
# Split at every space, by what is to the left and to the right of it alone.
SPLITTERS = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer"}
# Split somewhere, by one character and the next; not at a space.
OTHERS = {"Digits", "Punctuation"}
LETTERS, ENDING = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# Regular expressions whose matches never hold a space after a letter or digit, and look ahead only over spaces.
EXPRESSIONS = {
    # GPT-2, as ByteLevel has it built in
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Llama 3, and others that take after GPT-4
    rf"{SHORT}|{LETTERS}|\p{{N}}{{1,3}}|{ENDING}",
    # Qwen 2 and 3
    rf"{SHORT}|{LETTERS}|\p{{N}}|{ENDING}",
}

_prefixed: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, bool | None]] = weakref.WeakKeyDictionary()


def pieces(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Pieces of the text whose tokens (without special ones) make up the text's; the whole, where that is not certain.

    Each has PIECE characters, or more where there is no single space between letters or digits.
    """
    if len(text) <= PIECE:
        return [text]
    prefixed = prefixes(tokenizer)
    if prefixed is None:
        return [text]
    return list(_cut(text, skip=int(prefixed)))


def _cut(text: str, skip: int) -> Iterator[str]:
    start = 0
    while start + PIECE < len(text) and (place := CUT.search(text, start + PIECE)) is not None:
        yield text[start : place.start()]
        start = place.start() + skip
    yield text[start:]


def prefixes(tokenizer: PreTrainedTokenizerBase) -> bool | None:
    """Whether the tokenizer puts "▁" in front of a text; None where pieces are not certain to have the whole's tokens.

    Cost: one look through the vocabulary; kept as long as the tokenizer is and has as many tokens.
    """
    if not tokenizer.is_fast:
        return None
    known = _prefixed.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        known = (len(tokenizer), _judge(json.loads(tokenizer.backend_tokenizer.to_str())))
        _prefixed[tokenizer] = known
    return known[1]


def _judge(parts: Mapping[str, Any]) -> bool | None:
    """`prefixes` of a tokenizer's description."""
    model, added = parts["model"], parts["added_tokens"]
    normalizers = _steps(parts["normalizer"], "normalizers")
    written = [step for step in normalizers if step["type"] == "Replace"]  # spaces as "▁"
    in_front = [step for step in normalizers if step["type"] == "Prepend"]
    by_character = [step for step in normalizers if step["type"] in NORMALIZERS]
    if len(written) + len(in_front) + len(by_character) < len(normalizers):
        return None
    if any(step["pattern"] != {"String": " "} or step["content"] != SPACE for step in written):
        return None
    if any(step["prepend"] != SPACE for step in in_front):
        return None
    spaces, splits, prefixed = not written, False, bool(in_front)
    for step in _steps(parts["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace" and step["replacement"] == SPACE and not splits:
            prefixed |= step["prepend_scheme"] != "never"
            spaces, splits = False, step["split"]
        elif spaces and (step["type"] in SPLITTERS or _matches(step)):
            splits = True
        elif step["type"] not in OTHERS and not _writes_bytes(step) and (spaces or not _splits_at_spaces(step)):
            return None
    # A character may become several, of which the last is no letter: only where a space alone decides.
    if by_character and (prefixed or not splits):
        return None
    if any(" " in token["content"] or SPACE in token["content"] or token["rstrip"] for token in added):
        return None
    # "▁" would be put before an added token that is looked for in the normalised text, too.
    if model.get("dropout") or (prefixed and any(token["normalized"] for token in added)):
        return None
    return prefixed if splits or _merges_stop_at_spaces(model) else None


def _steps(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """A normaliser or pre-tokenizer as the list of its steps."""
    if part is None:
        return []
    return [step for inner in part[name] for step in _steps(inner, name)] if part["type"] == "Sequence" else [part]


def _matches(step: Mapping[str, Any]) -> bool:
    """Whether it splits by one of EXPRESSIONS. The space that ByteLevel puts in front it only puts where none is."""
    if step["type"] == "ByteLevel":
        return bool(step["use_regex"])
    return (
        step["type"] == "Split"
        and step["pattern"].get("Regex") in EXPRESSIONS
        and (step["behavior"], step["invert"]) in {("Isolated", False), ("Removed", True)}
    )


def _writes_bytes(step: Mapping[str, Any]) -> bool:
    """ByteLevel that neither splits nor puts a space in front."""
    return step["type"] == "ByteLevel" and not step["use_regex"] and not step["add_prefix_space"]


def _splits_at_spaces(step: Mapping[str, Any]) -> bool:
    """Gemma's, which finds none: they are written "▁" by then."""
    return step["type"] == "Split" and step["pattern"] == {"String": " "} and not step["invert"]


def _merges_stop_at_spaces(model: Mapping[str, Any]) -> bool:
    if model["type"] != "BPE" or model["ignore_merges"]:
        return False
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"] or SPACE not in model["vocab"]:
        return False
    return not any(JOINED.search(token) for token in model["vocab"])
