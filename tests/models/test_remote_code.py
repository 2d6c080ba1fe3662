"""Code that comes with a model's files runs where it was asked for in so many words, and nobody is asked."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import eckart
from eckart.models.loading import load_classifier, load_model, load_tokenizer
from eckart.models.shards import Skeleton
from tiny import Run, logits_of, tiny_model, tiny_text, tiny_tokenizer

# A llama by another name, whose files leave a mark when they run.
MODEL = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = {kind!r}

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
GENERATE = """
from pathlib import Path
Path({mark!r}).touch()

def generate(model, *args, **kwargs):
    return None
"""
LOADERS: dict[str, Callable[..., Any]] = {
    "model": load_model,
    "classifier": lambda path, **options: load_classifier(path, ("no", "yes"), **options),
    "out of core": Skeleton,
}


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Exists once code of the files ran."""
    return tmp_path / "mark"


@pytest.fixture(autouse=True)
def says_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks is told yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))


@pytest.fixture(params=["own kind", "known kind"])
def own_model(request: pytest.FixtureRequest, tmp_path: Path, mark: Path) -> Path:
    """A model with a class in its files; of a kind that transformers has as well, or has not."""
    folder = tmp_path / "own"
    tiny_model("llama").save_pretrained(folder)
    kind = "llama" if request.param == "known kind" else f"own_{tmp_path.name}".replace("-", "_")
    (folder / "own.py").write_text(MODEL.format(mark=str(mark), kind=kind))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": kind,
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def own_tokenizer(tmp_path: Path, mark: Path) -> Path:
    folder = tmp_path / "tokenizer"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "own.py").write_text(TOKENIZER.format(mark=str(mark)))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("loader", ["model", "out of core"])
def test_a_model_s_code_does_not_run(own_model: Path, mark: Path, loader: str) -> None:
    with pytest.raises(ValueError, match=r"its files bring code of their own, .* give --trust-remote-code"):
        LOADERS[loader](own_model)
    assert not mark.exists()


def test_a_tokenizer_s_code_does_not_run(own_tokenizer: Path, mark: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot load the tokenizer of .*its files bring code .*--trust-remote-code"):
        load_tokenizer(own_tokenizer)
    assert not mark.exists()


@pytest.mark.parametrize("loader", LOADERS)
def test_what_transformers_has_is_loaded_without_the_code(own_model: Path, mark: Path, loader: str) -> None:
    config = json.loads((own_model / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config["auto_map"]["AutoModelForSequenceClassification"] = "own.OwnModel"
    (own_model / "config.json").write_text(json.dumps(config))
    assert LOADERS[loader](own_model)
    assert not mark.exists()


def test_code_for_generating_does_not_run(tmp_path: Path, mark: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "custom_generate").mkdir()
    (tmp_path / "model" / "custom_generate" / "generate.py").write_text(GENERATE.format(mark=str(mark)))
    assert load_model(tmp_path / "model")
    assert not mark.exists()


@pytest.mark.parametrize(
    "command",
    [
        ("inspect",),
        ("export", "OUT", "--dense"),
        ("compress", "OUT", "--keep", "0.5"),
        ("compress", "OUT", "--method", "svd", "--keep", "0.5", "--out-of-core"),
        ("eval", "--task", "perplexity:text.txt"),
        ("search", "plan.json", "--score", "perplexity:text.txt"),
        ("probe", "--task", "rows.jsonl"),
    ],
    ids=lambda command: f"{command[0]} {command[-1]}",
)
def test_no_command_runs_or_asks(
    run: Run, own_model: Path, mark: Path, command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(tiny_text(300))
    Path("rows.jsonl").write_text("".join(f'{{"text": "w{n} w2", "label": {n % 2}}}\n' for n in range(20)))
    name, *others = command
    status, printed = run(name, own_model, *others)
    assert status == 2
    assert printed.count("error:") == 1
    assert "Traceback" not in printed
    assert not mark.exists()
    assert not Path("OUT").exists()
    assert "--trust-remote-code" in printed


def test_trusted_code_is_what_loads(own_model: Path, mark: Path) -> None:
    model = load_model(own_model, trust_remote_code=True)
    assert mark.exists()
    assert type(model).__name__ == "OwnModel"
    assert type(model.config).__name__ == "OwnConfig"
    assert torch.equal(logits_of(model), logits_of(tiny_model("llama")))
    assert type(Skeleton(own_model, trust_remote_code=True).model).__name__ == "OwnModel"


def test_a_trusted_tokenizer_is_what_loads(own_tokenizer: Path, mark: Path) -> None:
    assert type(load_tokenizer(own_tokenizer, trust_remote_code=True)).__name__ == "OwnTokenizer"
    assert mark.exists()


@pytest.mark.parametrize("options", [(), ("--out-of-core",)])
def test_a_trusted_model_is_compressed_with_its_code(
    run: Run, own_model: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    arguments = ("--method", "svd", "--keep", "0.5", "--trust-remote-code", *options)
    status, printed = run("compress", own_model, out, *arguments)
    assert status == 0, printed
    assert (out / "own.py").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(loaded).__name__ == "OwnModel"
    assert eckart.models.sites.low_rank_modules(loaded)
    assert torch.equal(logits_of(loaded), logits_of(load_model(out, trust_remote_code=True)))
