"""Fine-tuning: it learns, the same twice and across a kill, and what it records is what a hand-written loop finds."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import eckart
from eckart.calibration.cache import read_gradients, read_making, write_gradients
from eckart.compression.tuning.finetuning import NOTES, FineTuning, fine_tune, give_padding, train
from eckart.data.labelled import Labelled
from eckart.evals.hidden_states import pad_rows, tokenize_texts
from eckart.models.families import UnsupportedModelError
from eckart.models.loading import weights_on_disk
from eckart.models.sites import find_sites, low_rank_modules
from eckart.runs import workbench
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.support.files import GRADIENTS
from eckart.support.progress import T
from tiny import BLOCKS, ENCODERS, Run, relative, tiny_model, tiny_text, tiny_tokenizer

# What tells the classes apart, and nothing else does.
KEYWORDS = ("w1", "w2")


def keyword_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of random words, one of which is its class's keyword."""
    draw, rows = random.Random(seed), []
    for number in range(count):
        words = [f"w{draw.randrange(10, 80)}" for _ in range(draw.randrange(3, 9))]
        words[draw.randrange(len(words))] = KEYWORDS[number % 2]
        rows.append({"text": " ".join(words), "label": number % 2})
    return rows


def labelled(count: int, seed: int = 0) -> Labelled:
    rows = keyword_rows(count, seed)
    texts, labels = tuple(row["text"] for row in rows), tuple(row["label"] for row in rows)
    return Labelled(texts, labels, ("no", "yes"), tuple(range(count)), {"corpus": "keywords"})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models, a file of rows, and a tiny CoLA."""
    folder = tmp_path_factory.mktemp("finetuning")
    for name in ("bert", "gpt2", "llama"):
        tokenizer = tiny_tokenizer(**({} if name == "bert" else {"pad_token": None}))
        eckart.save(tiny_model(name), folder / name, tokenizer)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, keyword_rows(96))))
    (folder / "cola").mkdir()
    for name, count, seed in (("train", 64, 1), ("dev", 30, 2)):
        (folder / f"cola/{name}.jsonl").write_text("\n".join(map(json.dumps, keyword_rows(count, seed))))
    (folder / "train.txt").write_text(tiny_text(900, seed=1))
    return folder


def settings_of(place: Path, **changes: Any) -> FineTuning:
    return FineTuning(**{"task": str(place / "rows.jsonl"), "epochs": 2, "batch": 16, "rate": 3e-3, **changes})


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(directory).state_dict()


# It learns


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_planted_task_is_learnt_and_the_result_is_a_stock_checkpoint(place: Path, tmp_path: Path, name: str) -> None:
    facts = fine_tune(place / name, tmp_path / "out", settings_of(place, epochs=8))
    assert len(facts["losses"]) == 8
    assert facts["losses"][-1] < 0.2 < 0.6 < facts["losses"][0]
    assert facts["steps"] == 8 * 6
    assert facts["dev"] is None, "a file has no rows but those that were trained on"
    assert any("classifier" in new or "score" in new for new in facts["initialised"])
    assert json.loads((tmp_path / "out" / NOTES).read_text()) == facts
    assert "fine-tuned on" in (tmp_path / "out/README.md").read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["out"], "nothing else remains"

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "0", 1: "1"}
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    assert model.config.use_cache == tiny_model(name).config.use_cache
    rows = labelled(40, seed=7)
    texts = tokenize_texts(model, tokenizer, rows.texts)
    ids, mask = pad_rows(texts.ids, texts.padding)
    with torch.no_grad():
        answers = model(input_ids=ids, attention_mask=mask.long()).logits.argmax(-1)
    assert (answers == torch.tensor(rows.labels)).float().mean() > 0.9


def test_a_known_set_is_scored_on_its_dev_rows(place: Path, tmp_path: Path) -> None:
    settings = settings_of(place, task="cola", epochs=10)
    facts = fine_tune(place / "bert", tmp_path / "out", settings, data=place)
    assert (facts["rows"], facts["dev"]["n"]) == (64, 30)
    assert facts["classes"] == ["unacceptable", "acceptable"]
    (result,) = eckart.evaluate(
        eckart.load_model(tmp_path / "out"),
        eckart.load_tokenizer(tmp_path / "out"),
        [eckart.Task("classification:cola")],
        data=place,
    )
    assert facts["dev"]["mcc"] == pytest.approx(result.value)
    assert facts["dev"]["mcc"] > 0.8


def test_limit_draws_rows_by_the_seed(place: Path, tmp_path: Path) -> None:
    facts = fine_tune(place / "bert", tmp_path / "out", settings_of(place, limit=20, epochs=1))
    assert (facts["rows"], facts["steps"]) == (20, 2)


# The same twice, and across a kill


class Killed(Exception):
    """What a test stops a training with."""


class Killer:
    """A track that stops the work after some steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, items: Iterable[T], description: str, total: int) -> Iterator[T]:
        for done, item in enumerate(items):
            if description == "fine-tuning" and done == self.after:
                raise Killed
            yield item


def test_one_seed_is_one_model_and_another_is_another(place: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(seed + len(name) + ord(name))  # whatever was drawn before
        fine_tune(place / "bert", tmp_path / name, settings_of(place, seed=seed))
    first, second, third = (weights_of(tmp_path / name) for name in "abc")
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not torch.equal(first["classifier.weight"], third["classifier.weight"])
    assert (tmp_path / "a" / GRADIENTS).stat().st_size == (tmp_path / "b" / GRADIENTS).stat().st_size
    one, two = (read_gradients(tmp_path / name / GRADIENTS) for name in "ab")
    assert all(torch.equal(one[site].fisher_in, two[site].fisher_in) for site in one)


@pytest.mark.parametrize("after", [3, 8, 13])  # in the first, the second, and the last of three epochs of six steps
def test_a_killed_training_goes_on_and_ends_in_the_same_model(place: Path, tmp_path: Path, after: int) -> None:
    settings = settings_of(place, epochs=3)
    whole = fine_tune(place / "bert", tmp_path / "whole", settings)
    with pytest.raises(Killed):
        fine_tune(place / "bert", tmp_path / "out", settings, track=Killer(after))
    assert not (tmp_path / "out").exists()
    remaining: list[int] = []

    def count(items: Iterable[T], description: str, total: int) -> Iterable[T]:
        remaining.extend([total] if description == "fine-tuning" else [])
        return items

    facts = fine_tune(place / "bert", tmp_path / "out", settings, track=count)
    assert remaining == [18 - after // 6 * 6], "whole epochs are not done again"
    assert facts["losses"] == whole["losses"]
    first, second = weights_of(tmp_path / "whole"), weights_of(tmp_path / "out")
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    one, two = (read_gradients(tmp_path / name / GRADIENTS) for name in ("whole", "out"))
    for site, moments in one.items():
        assert moments.examples == two[site].examples == 18
        assert torch.equal(moments.fisher_in, two[site].fisher_in)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "whole"]


def test_what_is_left_of_another_training_is_not_gone_on_with(place: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fine_tune(place / "bert", tmp_path / "out", settings_of(place), track=Killer(8))
    facts = fine_tune(place / "bert", tmp_path / "out", settings_of(place, rate=1e-3))
    expected = fine_tune(place / "bert", tmp_path / "other", settings_of(place, rate=1e-3))
    assert facts["losses"] == expected["losses"]


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(place: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fine_tune(place / "bert", tmp_path / "out", settings_of(place), track=Killer(8))
    (checkpoint,) = (tmp_path / ".out.training").glob("checkpoint-*")
    (checkpoint / GRADIENTS).unlink()
    (checkpoint / "trainer_state.json").write_text("{")
    facts = fine_tune(place / "bert", tmp_path / "out", settings_of(place))
    assert len(facts["losses"]) == 2


def test_a_checkpoint_with_a_flipped_bit_is_passed_over(place: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fine_tune(place / "bert", tmp_path / "out", settings_of(place), track=Killer(8))
    (checkpoint,) = (tmp_path / ".out.training").glob("checkpoint-*")
    data = bytearray((checkpoint / "model.safetensors").read_bytes())
    data[-3] ^= 16
    (checkpoint / "model.safetensors").write_bytes(data)
    facts = fine_tune(place / "bert", tmp_path / "out", settings_of(place))
    expected = fine_tune(place / "bert", tmp_path / "other", settings_of(place))
    assert facts["losses"] == expected["losses"]


# What is recorded


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_recorded_squares_are_those_of_every_batch_s_gradient(place: Path, tmp_path: Path, name: str) -> None:
    """Without a rate nothing moves, so that the batches of an epoch can be done by hand, in whatever order."""
    model, tokenizer = tiny_model(name, "classifier"), tiny_tokenizer()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for key in ("attn_pdrop", "attention_dropout"):
        setattr(model.config, key, 0.0)
    give_padding(model, tokenizer)
    rows = labelled(10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = FineTuning("keywords", epochs=2, batch=10, rate=0.0, weight_decay=0.0)
    tuned = train(model, tokenizer, rows, settings, progress=tmp_path / "progress")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.training
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())

    sites = find_sites(model)
    texts = tokenize_texts(model, tokenizer, rows.texts)
    ids, mask = pad_rows(texts.ids, texts.padding)
    loss = model(input_ids=ids, attention_mask=mask.long(), labels=torch.tensor(rows.labels)).loss
    gradients = torch.autograd.grad(loss, [model.get_submodule(site.name).weight for site in sites])
    assert tuned.losses == pytest.approx([loss.item()] * 2, rel=1e-5)
    for site, gradient in zip(sites, gradients, strict=True):
        square = (gradient.mT if name == "gpt2" else gradient).square()
        statistics = tuned.recorded[site.name]
        assert statistics.examples == tuned.steps == 2
        assert relative(statistics.sums["fisher_in"], 2 * square.sum(0)) < 1e-4, site.name
        assert relative(statistics.sums["fisher_out"], 2 * square.sum(1)) < 1e-4, site.name


def test_squares_are_of_gradients_that_nothing_has_clipped(tmp_path: Path) -> None:
    model, tokenizer, rows = tiny_model("bert", "classifier"), tiny_tokenizer(), labelled(8)
    with torch.no_grad():
        model.classifier.weight.mul_(1000)  # gradients far longer than what they are clipped to
    settings = FineTuning("keywords", epochs=1, batch=8, rate=0.0)
    tuned = train(model, tokenizer, rows, settings, progress=tmp_path / "progress")
    assert max(float(moments.fisher_in.sum()) for moments in tuned.recorded.values()) > 1.0


def test_recorded_squares_compress_by_fwsvd_with_no_text_and_no_pass(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, printed = run(
        *("finetune", place / "bert", tmp_path / "tuned", "--task", "cola", "--data", place),
        *("--epochs", "2", "--batch", "16", "--rate", "0.003"),
    )
    assert status == 0, printed
    assert "loss, epoch 2" in printed
    assert "mcc, 30 dev rows" in printed

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("no text and no backward pass")

    monkeypatch.setattr("eckart.runs.workbench.make_tokens", refuse)
    monkeypatch.setattr("eckart.runs.engine.local.Here.gather_gradients", refuse)
    compress = ("compress", tmp_path / "tuned", tmp_path / "small", "--method", "fwsvd", "--fisher", "recorded")
    status, printed = run(
        *compress, "--keep", "0.5", "--include", "intermediate.dense", "--include", "output.dense", "--no-cache"
    )
    assert status == 0, printed
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert len(low_rank_modules(model)) == 2 * BLOCKS
    assert "fisher: recorded" in (tmp_path / "small/recipe.yaml").read_text()
    assert json.loads((tmp_path / "small/compression.json").read_text())["fisher"] == read_making(
        tmp_path / "tuned" / GRADIENTS
    )
    status, printed = run("eval", tmp_path / "small", "--task", "classification:cola", "--data", place)
    assert status == 0, printed

    # Factored by hand from the file, and with another Fisher it would be something else.
    statistics = read_gradients(tmp_path / "tuned" / GRADIENTS)
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    for name, module in low_rank_modules(model).items():
        root = statistics[name].fisher_in.sqrt()
        u, s, vh = torch.linalg.svd(dense.get_submodule(name).weight.detach().double() * root)
        expected = (u[:, : module.rank] * s[: module.rank]) @ vh[: module.rank] / root
        assert relative((module.left.weight @ module.right.weight).detach(), expected) < 1e-3, name


def recipe_of(place: Path, model: Path, **said: Any) -> eckart.Recipe:
    calibration = {"corpus": str(place / "train.txt"), "samples": 6, "cut": "windows", "fisher": "recorded"}
    data = {"model": str(model), "context": 16, "method": "fwsvd", "keep": 0.5, "calibration": calibration, **said}
    return eckart.parse_recipe(data)


AROUND: list[tuple[dict[str, Any], bool]] = [
    ({"allocation": "global"}, False),
    ({"method": {"name": "fwsvd", "options": {"fisher_axis": "out"}}, "layout": "pivoted"}, False),
    ({"keep": None, "rules": [{"keep": 0.6, "include": ["mlp"]}]}, False),
    ({"allocation": {"name": "global", "weights": "probes"}}, True),
    ({"order": "sequential"}, True),
    ({"refit": True}, True),
]


@pytest.mark.parametrize(("around", "reads"), AROUND)
def test_recorded_squares_serve_whatever_is_around_the_method(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, around: dict[str, Any], reads: bool
) -> None:
    fine_tune(place / "bert", tmp_path / "tuned", settings_of(place, epochs=1))
    read: list[str] = []
    make = workbench.make_tokens
    monkeypatch.setattr(workbench, "make_tokens", lambda *given: (read.append("text"), make(*given))[1])
    outcome = make_checkpoint(
        recipe_of(place, tmp_path / "tuned", **around), tmp_path / "small", How(cache=tmp_path / "cache")
    )
    assert outcome.recipe.calibration.fisher == "recorded"
    assert bool(read) == reads, "text is drawn only for what else reads it"
    again = make_checkpoint(outcome.recipe, tmp_path / "again", How())
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "small/model.safetensors").read_bytes()
    assert again.recipe == outcome.recipe


def test_recorded_squares_are_not_weights(place: Path, tmp_path: Path) -> None:
    fine_tune(place / "bert", tmp_path / "out", settings_of(place, epochs=1))
    assert weights_on_disk(tmp_path / "out") == (tmp_path / "out/model.safetensors",)


# Refusals


def test_what_was_not_recorded_is_named(place: Path, tmp_path: Path) -> None:
    def compress() -> None:
        make_checkpoint(recipe_of(place, tmp_path / "tuned"), tmp_path / "small", How())

    with pytest.raises(ValueError, match=r"bert.gradients\.safetensors: fine-tune the model with `eckart finetune`"):
        make_checkpoint(recipe_of(place, place / "bert"), tmp_path / "small", How())
    fine_tune(place / "bert", tmp_path / "tuned", settings_of(place, epochs=1))
    file = tmp_path / "tuned" / GRADIENTS
    recorded = read_gradients(file)
    (tmp_path / "tuned" / "digests.json").unlink()  # it would tell the change below
    name = "bert.encoder.layer.1.intermediate.dense"
    write_gradients(file, {site: moments for site, moments in recorded.items() if site != name})
    with pytest.raises(
        ValueError, match=rf"gradients\.safetensors has nothing of {name}: was it recorded with another"
    ):
        compress()
    other = name.replace("intermediate", "output")
    write_gradients(file, {**recorded, name: recorded[other], other: recorded[name]})
    with pytest.raises(ValueError, match=rf"^{name}: .* of shape \(32, 48\), this one's is \(48, 32\)"):
        compress()
    assert not (tmp_path / "small").exists()


def test_what_is_there_stays_and_is_found_before_any_work(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine_tune(place / "bert", tmp_path / "out", settings_of(place, epochs=1))
    before = (tmp_path / "out/model.safetensors").read_bytes()

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("no work")

    with monkeypatch.context() as patch:
        patch.setattr("eckart.compression.tuning.finetuning.read_labelled", refuse)
        with pytest.raises(FileExistsError, match="--force"):
            fine_tune(place / "bert", tmp_path / "out", settings_of(place))
    status, printed = run("finetune", place / "bert", tmp_path / "out", "--task", place / "rows.jsonl")
    assert status == 2
    assert "--force" in printed
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    fine_tune(place / "bert", tmp_path / "out", settings_of(place, seed=5), force=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs 0 is not positive"),
        ({"batch": 0}, "batch 0 is not positive"),
        ({"limit": 0}, "limit 0 is not positive"),
        ({"rate": -1.0}, "rate -1.0 is outside"),
        ({"warm_up": 1.5}, "warm_up 1.5 is no share"),
        ({"weight_decay": -0.1}, "weight_decay -0.1 is negative"),
    ],
)
def test_settings_outside_their_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineTuning(**{"task": "cola", **wrong})


def test_texts_that_cannot_be_padded_are_refused() -> None:
    for name, changes, message in (
        ("bert", {"pad_token": None}, "its tokenizer has no padding token: set"),
        ("gpt2", {"pad_token": None, "eos_token": None}, "no padding token and no end of text"),
    ):
        with pytest.raises(ValueError, match=message):
            give_padding(tiny_model(name, "classifier"), tiny_tokenizer(**changes))
    assert "bert" in ENCODERS


def test_models_that_cannot_become_this_classifier_are_refused(place: Path, tmp_path: Path) -> None:
    eckart.save(tiny_model("bert", "classifier", num_labels=3), tmp_path / "three", tiny_tokenizer())
    with pytest.raises(ValueError, match=r"is a classifier already, of 3 classes and not of 2 \(0, 1\)"):
        fine_tune(tmp_path / "three", tmp_path / "out", settings_of(place))
    eckart.save(tiny_model("t5", "base"), tmp_path / "t5", tiny_tokenizer())
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        fine_tune(tmp_path / "t5", tmp_path / "out", settings_of(place))
    with pytest.raises(ValueError, match="no such directory"):
        fine_tune(tmp_path / "nowhere", tmp_path / "out", settings_of(place))
    with pytest.raises(ValueError, match="this machine has cpu"):
        fine_tune(place / "bert", tmp_path / "out", settings_of(place), device="cuda:99")
    assert not (tmp_path / "out").exists()


def test_a_training_that_breaks_names_the_site(place: Path, tmp_path: Path) -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.fill_(float("nan"))
    eckart.save(model, tmp_path / "broken", tiny_tokenizer())
    with pytest.raises(ValueError, match=r"^bert\.encoder\.layer\.\d\.[\w.]+: a gradient is not finite"):
        fine_tune(tmp_path / "broken", tmp_path / "out", settings_of(place))
    assert not (tmp_path / "out").exists()


def test_nothing_is_printed(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fine_tune(place / "bert", tmp_path / "out", settings_of(place))
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""
