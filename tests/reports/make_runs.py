"""Run directories that look real and cost nothing: numbers from closed forms and a seed, no model anywhere."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import yaml

from eckart.evals.result import EvalResult, Score

MODELS = {"example-org/sable-60M": (6, 288, 768), "example-org/heron-15M": (4, 192, 512)}
METHODS = ("svd", "asvd-0", "asvd-i", "nsvd-i")
KEEPS = (0.9, 0.7, 0.5)
CORPORA = ("wikitext2", "ptb", "snips", "cmrc")
TASKS = ("boolq", "piqa", "arc_easy")
ROLES = {
    "self_attn.q_proj": "attention",
    "self_attn.k_proj": "attention",
    "self_attn.v_proj": "attention",
    "self_attn.o_proj": "attention",
    "mlp.gate_proj": "mlp",
    "mlp.up_proj": "mlp",
    "mlp.down_proj": "mlp",
}
# How much worse than the best a method is, and how much of that is felt away from the calibration text.
HARM = {"svd": 6.0, "asvd-0": 2.2, "asvd-i": 1.0, "nsvd-i": 0.9, "int8": 0.02}
AWAY = {"svd": 1.0, "asvd-0": 1.2, "asvd-i": 2.2, "nsvd-i": 1.5, "int8": 1.0}
EXAMPLES = 400


def make_study(folder: Path, *, models: int = 2, seed: int = 0) -> Path:
    """A study directory: 2 models by 4 methods by 3 shares, int8 for each model, and study.json."""
    for model in list(MODELS)[:models]:
        for method in METHODS:
            for keep in KEEPS:
                make_run(folder / "runs" / f"{model.split('/')[1]}-{method}-{keep}", model, method, keep, seed=seed)
        make_run(folder / "runs" / f"{model.split('/')[1]}-int8", model, "int8", None, seed=seed)
    write_json(folder / "study.json", study_data())
    return folder


def make_run(
    folder: Path,
    model: str = "example-org/heron-15M",
    method: str = "asvd-i",
    keep: float | None = 0.7,
    *,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    corpus: str = "wikitext2",
) -> Path:
    """One run directory with every kind of evaluation."""
    draw = random.Random(f"{seed} {model} {method} {keep}")
    recipe: dict[str, Any] = {
        "model": model,
        "dtype": "auto",
        "method": {"name": method, "options": options or {}},
        "calibration": {"corpus": corpus, "split": "train", "samples": 256, "length": 256, "seed": 0},
        "evaluate": [
            *({"task": f"perplexity:{name}", "length": 256} for name in CORPORA),
            *({"task": f"lm-eval:{name}"} for name in TASKS),
            *({"task": name} for name in ("stereoset", "divergence:wikitext2", "similarity:wikitext2", "cost")),
        ],
    }
    if keep is not None:
        recipe["keep"] = keep
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
    packages = {"eckart": "0.2.0", "torch": "2.13.0", "transformers": "5.23.0", "datasets": "4.4.1"}
    write_json(
        folder / "environment.json",
        {
            "when": "2026-11-22T10:00:00+00:00",
            "python": "3.12.4",
            "packages": packages,
            "machine": "x86_64",
            "system": "Linux",
            "cores": 8,
            "cuda": None,
        },
    )
    facts = _compression(model, method, keep, draw)
    write_json(folder / "model" / "compression.json", facts)
    before, after = ({"params": facts["params"][side], "bytes": facts["bytes"][side]} for side in (0, 1))
    loss = _loss(method, keep)
    dense_draw = random.Random(f"{seed} {model}")
    for place, name in enumerate(CORPORA):
        nll = 2.6 + 0.5 * place + (0.4 if "heron" in model else 0)
        task = f"perplexity:{name}"
        write_result(folder, task, ".dense", _perplexity(task, nll, dense_draw))
        felt = loss * (1 + (AWAY.get(method, 1.5) - 1) * place / 3)
        write_result(folder, task, "", _perplexity(task, nll + felt, draw))
        write_result(folder, f"similarity:{name}", ".dense", _similarity(name, 0.93 - 0.17 * place, dense_draw))
        divergence = EvalResult(
            f"divergence:{name}",
            "kl",
            0.6 * felt,
            0.02 * felt,
            32,
            "lower",
            {"length": 256},
            scores={"top1": Score(math.exp(-0.5 * felt), 0.01, 32)},
        )
        write_result(folder, divergence.task, "", divergence)
    for place, name in enumerate(TASKS):
        top = 0.72 - 0.09 * place
        ability = 0.5 + (top - 0.5) * math.exp(-0.7 * loss)
        dense, compressed = _accuracy(name, top, dense_draw), _accuracy(name, ability, draw)
        write_result(folder, dense.task, ".dense", dense)
        write_result(folder, dense.task, "", compressed)
        write_result(folder, dense.task, ".agreement", _agreement(dense, compressed, draw))
    write_result(folder, "stereoset", ".dense", _stereoset(90, 63, dense_draw))
    write_result(folder, "stereoset", "", _stereoset(50 + 40 * math.exp(-0.3 * loss), 50 + 13 * math.exp(-loss), draw))
    write_result(folder, "cost", ".dense", _cost(before, before, 1.0))
    write_result(folder, "cost", "", _cost(before, after, after["params"] / before["params"]))
    return folder


def change_recipe(folder: Path, **keys: Any) -> Path:
    """Change keys of a run's recipe, those that are None away."""
    file = folder / "recipe.yaml"
    recipe = {**yaml.safe_load(file.read_text(encoding="utf-8")), **keys}
    said = {key: value for key, value in recipe.items() if value is not None}
    file.write_text(yaml.safe_dump(said, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return folder


def make_probing_study(folder: Path, *, models: int = 1, recover: bool = True) -> Path:
    """Runs with a probing of two tasks and a classifier's score: 2 methods by 3 shares, some fine-tuned afterwards."""
    for model in list(MODELS)[-models:]:
        for method in ("svd", "fwsvd"):
            for keep in KEEPS:
                place = folder / "runs" / f"{model.split('/')[1]}-{method}-{keep}"
                make_probing_run(place, model, method, keep)
                if recover and keep == min(KEEPS):
                    make_probing_run(place.with_name(f"{place.name}-recover"), model, method, keep, steps=64)
    return folder


def make_probing_run(
    folder: Path,
    model: str = "example-org/heron-15M",
    method: str = "svd",
    keep: float = 0.7,
    *,
    steps: int = 0,
    results: dict[str, tuple[EvalResult, EvalResult]] | None = None,
) -> Path:
    """One run directory with probing and classification, and perhaps a fine-tuning after the compression.

    Args:
        steps: of that fine-tuning, which wins half of the loss back.
        results: {task: (dense, compressed)} in place of numbers from closed forms.
    """
    blocks = MODELS[model][0]
    loss = (0.4 if method == "fwsvd" else 1.0) * (1 - keep) * (0.5 if steps else 1.0)
    if results is None:
        results = {
            f"probing:{name}": (
                probing_result(f"probing:{name}", _profile(blocks, 0.0, share)),
                probing_result(f"probing:{name}", _profile(blocks, loss, share)),
            )
            for name, share in (("cola", 0.7), ("sst2", 0.5))
        }
        results["classification:cola"] = (classification_result(0.5), classification_result(0.5 - 0.6 * loss))
    recipe: dict[str, Any] = {"model": model, "method": {"name": method}, "keep": keep, "evaluate": list(results)}
    if steps:
        recipe["recover"] = {"steps": steps}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    write_json(folder / "environment.json", {"when": "2026-11-22T10:00:00+00:00", "python": "3.12.4"})
    draw = random.Random(f"{model} {method} {keep}")
    write_json(folder / "model" / "compression.json", _compression(model, method, keep, draw))
    for task, (dense, compressed) in results.items():
        write_result(folder, task, ".dense", dense)
        write_result(folder, task, "", compressed)
    return folder


def probing_result(
    task: str, layers: list[tuple[float, float]], *, spread: float = 0.01, seeds: int = 3, majority: float = 0.57
) -> EvalResult:
    """A probing result as `evals.probing` writes it, of (F1, control) by layer, the embeddings first.

    Args:
        spread: half the distance between the scores of the outer seeds.
    """
    offsets = [spread * (2 * seed / (seeds - 1) - 1) if seeds > 1 else 0.0 for seed in range(seeds)]
    by_seed = [{"f1": [f1 + o for o in offsets], "control": [control - o for o in offsets]} for f1, control in layers]
    for layer in by_seed:
        layer["selectivity"] = [a - b for a, b in zip(layer["f1"], layer["control"], strict=True)]

    def mean(probes: list[dict[str, list[float]]], name: str) -> Score:
        values = [sum(layer[name][seed] for layer in probes) / len(probes) for seed in range(seeds)]
        error = statistics.stdev(values) / math.sqrt(seeds) if seeds > 1 else None
        return Score(sum(values) / seeds, error, 500)

    passes = [sum(layer["selectivity"]) / seeds >= 0.2 for layer in by_seed]
    names = ("f1", "control", "selectivity")
    whole = mean(by_seed[1:], "f1")
    return EvalResult(
        task,
        "f1",
        whole.value,
        whole.stderr,
        500,
        "higher",
        {"corpus": task.partition(":")[2], "split": "test", "pooling": "mean", "control": "text", "seeds": seeds},
        scores={
            **{name: mean(by_seed[1:], name) for name in names[1:]},
            "passed": Score(sum(passes[1:]) / len(passes[1:]), None, len(passes) - 1),
            **{f"{name}.{k}": mean([layer], name) for k, layer in enumerate(by_seed) for name in names},
        },
        details={
            "layers": [
                {"layer": k, **layer, "accuracy": layer["f1"], "mcc": [2 * f - 1 for f in layer["f1"]], "passes": ok}
                for k, (layer, ok) in enumerate(zip(by_seed, passes, strict=True))
            ],
            "majority": majority,
            "truncated": 0,
        },
    )


def classification_result(mcc: float, task: str = "classification:cola") -> EvalResult:
    """A classifier's result."""
    scores = {"accuracy": Score(0.5 + mcc / 2, 0.01, 500), "f1": Score(0.5 + mcc / 2, 0.01, 500)}
    return EvalResult(task, "mcc", mcc, 0.02, 500, "higher", {"rows": 500}, scores=scores)


def _profile(blocks: int, loss: float, share: float) -> list[tuple[float, float]]:
    """(F1, control) by layer: deeper layers know more, and lose more."""
    return [(0.58 + 0.27 * k / blocks - share * loss * k / blocks, 0.5) for k in range(blocks + 1)]


def write_json(file: Path, data: Any) -> None:
    """Write JSON, with its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=1), encoding="utf-8")


def write_result(folder: Path, task: str, kind: str, result: EvalResult) -> None:
    """Write a result where a run keeps it; `kind` is "", ".dense" or ".agreement"."""
    file = folder / "evals" / f"{task.replace(':', '-')}{kind}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(result.to_json(), encoding="utf-8")


def change_result(file: Path, **changes: Any) -> None:
    """Change fields of a result that is on disk."""
    write_json(file, {**json.loads(file.read_text(encoding="utf-8")), **changes})


def _loss(method: str, keep: float | None) -> float:
    """Added NLL per token."""
    removed = 0.25 if keep is None else 1 - keep
    return HARM.get(method, 1.3) * 2.4 * removed**1.6


def _perplexity(task: str, nll: float, draw: random.Random) -> EvalResult:
    windows = [nll + draw.gauss(0, 0.12) for _ in range(32)]
    mean = sum(windows) / len(windows)
    stderr = math.exp(mean) * 0.12 / math.sqrt(len(windows))
    return EvalResult(task, "perplexity", math.exp(mean), stderr, 32, "lower", {"length": 256, "windows": 32}, windows)


def _similarity(corpus: str, mean: float, draw: random.Random) -> EvalResult:
    values = [min(1.0, max(-1.0, draw.gauss(mean, 0.02 + 0.25 * (1 - mean)))) for _ in range(600)]
    edges = [round(-1 + step / 25, 4) for step in range(51)]
    counts = [0] * 50
    for value in values:
        counts[min(int((value + 1) * 25), 49)] += 1
    average = sum(values) / len(values)
    spread = math.sqrt(sum((value - average) ** 2 for value in values) / len(values))
    return EvalResult(
        f"similarity:{corpus}",
        "cosine",
        average,
        spread / math.sqrt(600),
        32,
        settings={"length": 256},
        scores={"std": Score(spread, None, 600), "calibration": Score(0.97, None, 256)},
        details={"histogram": {"edges": edges, "counts": counts}},
    )


def _accuracy(name: str, share: float, draw: random.Random) -> EvalResult:
    examples = [float(draw.random() < share) for _ in range(EXAMPLES)]
    mean = sum(examples) / EXAMPLES
    stderr = math.sqrt(mean * (1 - mean) / (EXAMPLES - 1))
    return EvalResult(
        f"lm-eval:{name}",
        "acc",
        mean,
        stderr,
        EXAMPLES,
        "higher",
        {"shots": 0},
        examples,
        {"acc_norm": Score(min(mean + 0.01, 1), stderr, EXAMPLES)} if name != "boolq" else {},
    )


def _agreement(dense: EvalResult, compressed: EvalResult, draw: random.Random) -> EvalResult:
    pairs = list(zip(dense.examples, compressed.examples, strict=True))
    learned, unlearned = sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)
    differ = min(EXAMPLES, learned + unlearned + draw.randrange(12)) / EXAMPLES
    stderr = math.sqrt(differ * (1 - differ) / EXAMPLES)
    scores = {
        "accuracy.dense": Score(dense.value, dense.stderr, EXAMPLES),
        "accuracy.compressed": Score(compressed.value, compressed.stderr, EXAMPLES),
        "delta": Score(compressed.value - dense.value, 0.02, EXAMPLES),
        "learned": Score(float(learned), None, EXAMPLES),
        "unlearned": Score(float(unlearned), None, EXAMPLES),
        "p_value": Score(0.31, None, learned + unlearned),
    }
    return EvalResult(f"agreement:{dense.task}", "disagreement", differ, stderr, EXAMPLES, "lower", scores=scores)


def _stereoset(lms: float, ss: float, draw: random.Random) -> EvalResult:
    scores: dict[str, Score] = {}
    places = {"": "{}", **{d: "{}." + d for d in ("gender", "profession", "race", "religion")}}
    places |= {part: part + ".{}" for part in ("intrasentence", "intersentence")}
    for name, form in places.items():
        sense = min(100.0, lms + (draw.gauss(0, 2) if name else 0))
        bias = ss + (draw.gauss(0, 3) if name else 0)
        values = {"lms": sense, "ss": bias, "icat": sense * min(bias, 100 - bias) / 50}
        scores |= {form.format(key): Score(value, 1.1, 2106) for key, value in values.items()}
    overall = scores.pop("icat")
    return EvalResult("stereoset", "icat", overall.value, overall.stderr, 2106, "higher", scores=scores)


def _cost(before: dict[str, int], now: dict[str, int], share: float) -> EvalResult:
    macs = 2.0 * before["params"]
    scores = {
        "bytes.resident": Score(float(now["bytes"])),
        "bytes.disk": Score(now["bytes"] + 4096.0),
        "macs": Score(macs * share),
        "macs.linear": Score(0.9 * macs * share),
        "macs.attention": Score(0.1 * macs),
        "prefill_speed": Score(1 + 0.6 * (1 - share), 0.02, 5),
        "decode_speed": Score(1 + 0.3 * (1 - share), 0.02, 5),
        "params.kept": Score(share),
        "bytes.kept": Score(now["bytes"] / before["bytes"]),
        "macs.kept": Score(share),
    }
    return EvalResult("cost", "params", float(now["params"]), None, 1, "lower", scores=scores)


def _compression(model: str, method: str, keep: float | None, draw: random.Random) -> dict[str, Any]:
    blocks, width, inner = MODELS[model]
    embedding = 32000 * width
    shapes = {
        role: [inner, width] if "gate" in role or "up" in role else [width, inner] if "down" in role else [width, width]
        for role in ROLES
    }
    linears = blocks * sum(a * b for a, b in shapes.values())
    before = embedding + linears
    if keep is None:
        return {
            "params": [before, before],
            "bytes": [4 * before, 4 * embedding + linears],
            "bits": 8,
            "sites": 7 * blocks,
        }
    sites: dict[str, Any] = {}
    stored = 0
    for block in range(blocks):
        for role, part in ROLES.items():
            d_out, d_in = shapes[role]
            share = min(1.0, keep * (0.82 + 0.36 * draw.random() + 0.06 * (part == "mlp")))
            rank = None if share > 0.97 else int(share * d_out * d_in / (d_out + d_in))
            stored += d_out * d_in if rank is None else rank * (d_out + d_in)
            decay = 2.5 + 0.8 * block + (2.0 if part == "attention" else 0.0) + (0 if method == "svd" else 3)
            spectrum = [(math.exp(-decay * s / 64) - math.exp(-decay)) / (1 - math.exp(-decay)) for s in range(65)]
            full = min(d_out, d_in)
            error = None if method == "svd" or rank is None else spectrum[round(64 * rank / full)]
            sites[f"model.layers.{block}.{role}"] = {
                "block": block,
                "role": role,
                "part": part,
                "shape": [d_out, d_in],
                "rank": rank,
                "relative_error": error,
                "tail": None if rank is None else 10 * spectrum[round(64 * rank / full)],
                "spectrum": spectrum,
            }
    after = embedding + stored
    return {
        "params": [before, after],
        "bytes": [4 * before, 4 * after],
        "keep_of_linears": stored / linears,
        "keep_of_model": after / before,
        "sites_low_rank": sum(site["rank"] is not None for site in sites.values()),
        "sites_dense": sum(site["rank"] is None for site in sites.values()),
        "seconds": {"calibrate": 3.1, "factor": 8.4},
        "sites": sites,
    }


def study_data() -> dict[str, Any]:
    rows = []
    for method, published in (
        ("svd", [20083, 20436, None]),
        ("asvd-i", [7.89, 16.1, 62.0]),
        ("nsvd-i", [7.92, 15.8, 63.5]),
    ):
        ours = [13.5 * HARM[method], 22.0 * HARM[method], 60.0]
        rows.append(
            {
                "label": f"{method}, keep 0.9",
                "run": f"sable-60M-{method}-0.9",
                "ours": ours,
                "published": published,
                "difference": [None if p is None else o - p for o, p in zip(ours, published, strict=True)],
            }
        )
    rows.append({"label": "nsvd-i, keep 0.6", "run": None, "ours": [None] * 3, "published": [9.64, 20.4, 60.2]})
    return {
        "title": "NSVD, Table 1 (small)",
        "paper": "Lu et al., arXiv 2503.17101",
        "about": "The paper compresses LLaMA-7B; ours is a small model, so only the order of methods can be compared.",
        "columns": ["perplexity:wikitext2", "perplexity:ptb", "stereoset#icat.gender"],
        "rows": rows,
        "notes": ["Window 256 instead of 2048."],
    }
