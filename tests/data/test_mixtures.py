"""Mixtures: shares out of names, samples out of shares, and the samples themselves, interleaved."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from eckart.data.corpora import CORPORA, read_text
from eckart.data.mixtures import BROAD, LANGUAGES, MIXTURES, interleaved, parts_of, share_out, shares_of, spell_out
from eckart.data.samples import read_tokens, sample_windows
from eckart.data.tokens import Tokens
from tiny import tiny_text, tiny_tokenizer

# Names


def test_a_name_is_one_corpus_several_or_a_file(tmp_path: Path) -> None:
    assert parts_of("ptb") == ("ptb",)
    assert parts_of("ptb+c4") == ("ptb", "c4")
    assert parts_of("commonsense") == tuple(MIXTURES["commonsense"])
    file = tmp_path / "a+b.txt"
    file.write_text("text")
    assert parts_of(str(file)) == (str(file),)


# Shares


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("c4", {"c4": 1}),
        ("c4*3", {"c4": 1}),
        ("ptb+c4", {"ptb": 1 / 2, "c4": 1 / 2}),
        ("wikitext2*2+c4", {"wikitext2": 2 / 3, "c4": 1 / 3}),
        ("wikitext2*.5+c4*1.5", {"wikitext2": 1 / 4, "c4": 3 / 4}),
        ("owner/name:en*3+a/b", {"owner/name:en": 3 / 4, "a/b": 1 / 4}),
        ("c4+ptb+c4", {"c4": 2 / 3, "ptb": 1 / 3}),
    ],
)
def test_weights_are_shares(name: str, shares: dict[str, float]) -> None:
    assert {part: float(share) for part, share in shares_of(name).items()} == pytest.approx(shares)
    assert sum(shares_of(name).values()) == 1
    assert parts_of(name) == tuple(shares)


def test_the_shares_of_a_mixture_in_a_mixture_multiply_out() -> None:
    inner, outer = shares_of(BROAD), shares_of("broad*3+mine.jsonl")
    assert outer.pop("mine.jsonl") == Fraction(1, 4)
    assert outer == {part: share * Fraction(3, 4) for part, share in inner.items()}
    assert shares_of("broad+c4")["c4"] == inner["c4"] / 2 + Fraction(1, 2)


def test_a_file_is_taken_by_its_whole_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("a+b.txt", "c*2"):
        Path(file).write_text("text")
        assert shares_of(file) == {file: 1}
    assert shares_of("c*2*3+ptb") == {"c*2": Fraction(3, 4), "ptb": Fraction(1, 4)}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("ptb*x+c4", "weight 'x' of 'ptb' is no positive number"),
        ("ptb+c4*0", "weight '0' of 'c4' is no positive number"),
        ("ptb*-1", "weight '-1'"),
        ("ptb*", "weight ''"),
        ("ptb*1/0", "weight '1/0'"),
        ("ptb+", "the name of a corpus is missing"),
        ("*2+c4", "the name of a corpus is missing"),
    ],
)
def test_what_is_no_weight_is_refused(name: str, what: str) -> None:
    with pytest.raises(ValueError, match=what.replace("*", r"\*")):
        shares_of(name)


@pytest.mark.parametrize("name", [*MIXTURES, "broad*3+mine.jsonl", "commonsense+c4*2", "ptb*2+c4", "c4"])
def test_a_name_spelled_out_is_the_same_mixture(name: str) -> None:
    spelled = spell_out(name)
    assert shares_of(spelled) == shares_of(name)
    assert not set(MIXTURES) & {term.partition("*")[0] for term in spelled.split("+")}
    assert spelled == name or any(mixture in name for mixture in MIXTURES)


def test_every_part_of_a_mixture_is_known_and_has_a_train_split() -> None:
    for mixture in MIXTURES.values():
        for part in mixture:
            assert "train" in CORPORA[part].splits, part
            assert CORPORA[part].files["train"], part


# Samples


def test_samples_are_shared_out_by_largest_remainder() -> None:
    assert share_out("a*2+b", 6) == {"a": 4, "b": 2}
    assert share_out("a*2+b", 7) == {"a": 5, "b": 2}
    assert share_out("a+b+c", 8) == {"a": 3, "b": 3, "c": 2}
    assert share_out("a*6+b*3+c*1", 9) == {"a": 5, "b": 3, "c": 1}


def test_no_part_goes_without() -> None:
    assert share_out("a*98+b+c", 10) == {"a": 8, "b": 1, "c": 1}
    assert share_out("a*98+b+c", 3) == {"a": 1, "b": 1, "c": 1}
    with pytest.raises(ValueError, match=r"2 samples are fewer than the 3 corpora of .*: raise samples"):
        share_out("a*98+b+c", 2)


def test_broad_gives_everyone_a_sample_of_32() -> None:
    assert share_out(BROAD, 32) == MIXTURES[BROAD]
    counts = share_out(BROAD, 256)
    assert counts == {part: 8 * weight for part, weight in MIXTURES[BROAD].items()}
    assert sum(counts[f"wikipedia_{language}"] for language in LANGUAGES) == 80


@pytest.mark.parametrize("counts", [(4, 2), (5, 1, 10), (1, 1, 1), (6, 6, 5, 5, *(1,) * 10)])
def test_the_first_few_are_of_all_parts_by_their_shares(counts: tuple[int, ...]) -> None:
    order, total = interleaved(counts), sum(counts)
    part_of = [part for part, count in enumerate(counts) for _ in range(count)]
    assert sorted(order) == list(range(total))
    for first in range(1, total + 1):
        seen = Counter(part_of[row] for row in order[:first])
        for part, count in enumerate(counts):
            assert abs(seen[part] - first * count / total) <= 1
    for part in range(len(counts)):
        rows = [row for row in order if part_of[row] == part]
        assert rows == sorted(rows)


# Tokens


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two corpora of words of their own, and a third of short documents."""
    tokenizer = tiny_tokenizer()
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    halves = [[word for word, _ in words[7:40]], [word for word, _ in words[40:80]]]
    for name, half in zip(("ptb", "c4"), halves, strict=True):
        (tmp_path / name).mkdir()
        rows = [" ".join(half[(3 * row + at) % len(half)] for at in range(40)) for row in range(12)]
        text = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (tmp_path / name / f"{name}.train.jsonl").write_text(text)
    (tmp_path / "ptb" / "ptb.train.jsonl").rename(tmp_path / "ptb" / "ptb.train.txt")
    (tmp_path / "ptb" / "ptb.train.txt").write_text("\n".join(rows_of(halves[0])))
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"body": f"w80 w81 w{82 + n}"}) + "\n" for n in range(6)))
    return tmp_path


def rows_of(words: list[str]) -> list[str]:
    return [" ".join(words[(5 * row + at) % len(words)] for at in range(40)) for row in range(12)]


def rows(tokens: Tokens) -> list[list[int]]:
    return sorted(tokens.ids.tolist())


def test_an_unweighted_mixture_has_the_samples_of_each_in_equal_parts(data: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokens = read_tokens("ptb+c4", tokenizer, samples=7, length=16, seed=3, data=data)
    alone = [
        sample_windows(read_text(name, data=data), tokenizer, samples=count, length=16, seed=3)
        for name, count in (("ptb", 4), ("c4", 3))
    ]
    assert rows(tokens) == rows(alone[0] + alone[1])
    assert tokens.part_of is not None
    for part, own in enumerate(alone):
        assert torch.equal(tokens.ids[tokens.part_of == part], own.ids)
    assert tokens.source == {"parts": [each.source for each in alone]}


def test_what_is_held_out_is_of_every_part_and_does_not_depend_on_the_order(data: Path) -> None:
    tokens = read_tokens("ptb+c4", tiny_tokenizer(), samples=16, length=8, data=data)
    used, held_out = tokens.hold_out(0.25)
    assert [part["samples"] for part in held_out.parts] == [2, 2]
    assert [part["samples"] for part in used.parts] == [6, 6]
    assert rows(used + held_out) == rows(tokens)
    assert tokens.part_of is not None
    one_after_the_other = tokens.take(tokens.part_of.argsort(stable=True))
    assert rows(one_after_the_other.hold_out(0.25)[1]) == rows(held_out)


def test_parts_of_other_lengths_are_padded_and_counted(data: Path) -> None:
    mine = str(data / "mine.jsonl")
    tokens = read_tokens(
        f"c4*2+{mine}", tiny_tokenizer(), samples=6, length=16, cut="documents", data=data, column="body"
    )
    assert tokens.ids.shape == (6, 16)
    assert tokens.parts == [
        {"corpus": "c4", "samples": 4, "tokens": 64},
        {"corpus": "mine.jsonl", "samples": 2, "tokens": 6},
    ]
    assert sum(part["tokens"] for part in tokens.parts) == tokens.count
    assert len(tokens.source["parts"]) == 2


def test_a_field_is_of_the_parts_that_have_one(data: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("\n\n".join(tiny_text(20, seed=seed) for seed in range(4)))
    both = f"{plain}+{data / 'mine.jsonl'}"
    tokens = read_tokens(both, tiny_tokenizer(), samples=4, length=16, cut="documents", column="body")
    assert [part["corpus"] for part in tokens.parts] == ["plain.txt", "mine.jsonl"]
    with pytest.raises(ValueError, match=r"no part of .*plain\.txt\+builtin has a field to choose: leave column"):
        read_tokens(f"{plain}+builtin", tiny_tokenizer(), samples=4, length=16, column="body")


def test_a_split_of_files_alone_is_refused(data: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text(tiny_text(80, seed=1))
    with pytest.raises(ValueError, match=r"plain\.txt is read whole, a file has no split 'test': leave split out"):
        read_tokens(str(plain), tiny_tokenizer(), samples=2, length=16, split="test")
    read_tokens(f"{plain}+builtin/prose", tiny_tokenizer(), samples=4, length=16, split="test")


def test_a_seed_draws_the_same_samples_again(data: Path) -> None:
    def draw(seed: int) -> Tokens:
        return read_tokens("ptb*2+c4", tiny_tokenizer(), samples=9, length=8, seed=seed, data=data)

    assert draw(1).digest == draw(1).digest != draw(2).digest


def test_one_corpus_is_what_it_was(data: Path) -> None:
    tokens = read_tokens("c4", tiny_tokenizer(), samples=5, length=16, seed=2, data=data)
    alone = sample_windows(read_text("c4", data=data), tiny_tokenizer(), samples=5, length=16, seed=2)
    assert tokens.digest == alone.digest
    assert tokens.source == alone.source
    assert tokens.parts == [{"corpus": "c4", "samples": 5, "tokens": 80}]


# What is missing


def test_a_part_without_its_folder_is_named_and_nothing_is_read_in_its_place(data: Path) -> None:
    (data / "train.jsonl").write_text(json.dumps({"text": tiny_text(500)}) + "\n")  # everybody's, where it were read
    with pytest.raises(ValueError, match=r"broad lacks its parts wikipedia_en, codeparrot, .*not made smaller.*--data"):
        read_tokens(BROAD, tiny_tokenizer(), samples=32, length=8, data=data)


def test_a_part_that_the_hub_does_not_give_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(ValueError, match=r"broad lacks its part wikipedia_en: .*no route.*--data.*--calibration NAME"):
        read_tokens(BROAD, tiny_tokenizer(), samples=32, length=8)


def test_a_part_that_is_too_short_is_named(data: Path) -> None:
    with pytest.raises(ValueError, match=r"ptb\*9\+c4 lacks its part ptb: .* were asked for: lower samples"):
        read_tokens("ptb*9+c4", tiny_tokenizer(), samples=100, length=16, data=data)


def test_a_mixture_is_no_text_to_evaluate_on() -> None:
    for name in (BROAD, "c4*2+ptb"):
        with pytest.raises(ValueError, match=r"is a mixture, which is for calibration: name one of its parts, .*c4"):
            read_text(name)


# Conversations of a known corpus


@pytest.mark.parametrize("template", [None, "{% for m in messages %}<s> {{ m.content }}</s>{% endfor %}"])
def test_conversations_of_a_mixture_need_no_chat_template(tmp_path: Path, template: str | None) -> None:
    (tmp_path / "ultrachat").mkdir()
    messages = [{"role": "user", "content": "w0 w1"}, {"role": "assistant", "content": "w2"}]
    (tmp_path / "ultrachat" / "train.jsonl").write_text(json.dumps({"prompt": "w0 w1", "messages": messages}) + "\n")
    text = read_text("ultrachat", data=tmp_path, tokenizer=tiny_tokenizer(chat_template=template))
    assert text.documents == (("w0 w1\n\nw2",) if template is None else ("<s> w0 w1</s><s> w2</s>",))
    assert text.templated is (template is not None)
    assert ("conversations" in text.source) is (template is None)


def test_files_of_one_name_are_told_apart_and_one_file_is_one_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.txt").write_text(" ".join(f"w{number % 50}" for number in range(400)))
    tokens = read_tokens("x/t.txt+y/t.txt*3", tiny_tokenizer(), samples=4, length=16)
    assert [(part["corpus"], part["samples"]) for part in tokens.parts] == [("x/t.txt", 1), ("y/t.txt", 3)]
    assert shares_of("x/t.txt+./x/t.txt") == {"x/t.txt": 1}
