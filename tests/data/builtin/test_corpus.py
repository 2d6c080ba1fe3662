"""The built-in corpus and model: what they promise to the commands and tests that use them."""

import ast
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from eckart.data.builtin import builtin_model_path, builtin_texts, corpus

WINDOW = 256
SCORED_TOKENS = 8192


@pytest.mark.parametrize("domain", corpus.DOMAINS)
def test_texts_are_the_same_on_every_reading(domain: str) -> None:
    first = builtin_texts(domain, "heldout")
    corpus._texts.cache_clear()
    corpus._sources.cache_clear()
    assert builtin_texts(domain, "heldout") == first
    assert all(text.strip() for text in first)


def test_texts_are_large_enough_to_train_and_measure_on() -> None:
    size = {(d, s): sum(map(len, builtin_texts(d, s))) for d in corpus.DOMAINS for s in corpus.SPLITS}
    assert size["code", "train"] > 4_000_000
    assert size["prose", "train"] > 1_200_000
    assert size["code", "heldout"] > 300_000
    assert size["prose", "heldout"] > 150_000


def test_a_caller_may_change_its_list() -> None:
    builtin_texts("prose", "heldout").clear()
    assert builtin_texts("prose", "heldout")


def test_splits_share_no_source_file_and_no_topic() -> None:
    assert not corpus._sources("train").keys() & corpus._sources("heldout").keys()
    assert not corpus._topics("train").keys() & corpus._topics("heldout").keys()
    assert {f"topic {name}" for name in corpus.HELDOUT_TOPICS} == corpus._topics("heldout").keys()


def test_training_prose_repeats_no_long_paragraph_of_the_heldout_prose() -> None:
    paragraphs = {
        split: {p for text in builtin_texts("prose", split) for p in corpus._long_paragraphs(text)}
        for split in corpus.SPLITS
    }
    assert not paragraphs["train"] & paragraphs["heldout"]


def test_code_parses_and_holds_no_docstring() -> None:
    for text in builtin_texts("code", "heldout"):
        assert not list(corpus._find_docstrings(ast.parse(text)))


def test_docstrings_are_cut_out_whole(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        '"""About the moduλe."""\n'
        "λ = 'not a docstring'\n"
        "class Empty:\n"
        '    """About Empty,\n'
        '       at length."""\n'
        "def stub(): 'About stub.'\n"
        "def shared(): 'About λ.'; return λ\n"
        "if λ:\n"
        "    async def inner():\n"
        "        'About inner.'  # a comment\n"
        "        return 1\n",
        encoding="utf-8",
    )
    source = corpus._take_apart(file)
    assert source.prose == (
        "About the moduλe.\n\nAbout Empty,\nat length.\n\nAbout stub.\n\nAbout λ.\n\nAbout inner.\n"
    )
    assert source.code == (
        "λ = 'not a docstring'\n"
        "class Empty:\n"
        "    pass\n"
        "def stub(): pass\n"
        "def shared(): pass; return λ\n"
        "if λ:\n"
        "    async def inner():\n"
        "        pass  # a comment\n"
        "        return 1\n"
    )


def test_an_unknown_domain_or_split_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="prose, code"):
        builtin_texts("poetry", "train")
    with pytest.raises(ValueError, match="train, heldout"):
        builtin_texts("prose", "test")


def test_an_incomplete_standard_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in corpus.HELDOUT_MODULES[2:]:  # 16 of 18 is under nine tenths
        (tmp_path / f"{module}.py").write_text("x = 1\n", encoding="utf-8")
    monkeypatch.setattr(corpus, "_library", lambda: tmp_path)
    corpus._sources.cache_clear()
    with pytest.raises(RuntimeError, match=r"argparse, calendar.*libpython3-stdlib"):
        corpus._sources("heldout")
    (tmp_path / "argparse.py").write_text("x = 1\n", encoding="utf-8")  # one missing is let pass
    assert len(corpus._sources("heldout")) == 17
    corpus._sources.cache_clear()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(builtin_model_path())


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(builtin_model_path(), dtype=torch.float32).eval()


def test_model_is_small_has_grouped_queries_and_tied_embeddings(model: PreTrainedModel) -> None:
    assert model.config.model_type == "llama"
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert 4_000_000 < model.num_parameters() < 5_000_000
    assert sum(file.stat().st_size for file in builtin_model_path().iterdir()) < 10_500_000


def test_tokenizer_gives_back_any_text_and_marks_its_start(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "def f(x):\n    return 'naïve λ'  # two  spaces\n\n\tA tab."
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in tokens[1:]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_tokenizer_pads_a_batch(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    batch = tokenizer(["one", "one and a longer one"], padding=True, return_tensors="pt")
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert tokenizer.pad_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert batch["attention_mask"].sum().item() < batch["input_ids"].numel()


@pytest.mark.parametrize("domain", corpus.DOMAINS)
def test_model_has_learnt_each_domain(domain: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    heldout = _first_tokens(tokenizer, builtin_texts(domain, "heldout"), SCORED_TOKENS).view(-1, WINDOW)
    train = _first_tokens(tokenizer, builtin_texts(domain, "train"), 10 * SCORED_TOKENS)
    with torch.no_grad():
        logits = model(input_ids=heldout).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), heldout[:, 1:].flatten()).item()
    counts = torch.bincount(train, minlength=model.config.vocab_size) + 1
    unigram_loss = -(counts / counts.sum()).log()[heldout[:, 1:]].mean().item()
    assert math.exp(loss) <= math.exp(unigram_loss) / 3


def _first_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str], count: int) -> torch.Tensor:
    tokens: list[int] = []
    for text in texts:
        if len(tokens) >= count:
            break
        tokens.extend(tokenizer(text, verbose=False)["input_ids"])
    return torch.tensor(tokens[:count])
