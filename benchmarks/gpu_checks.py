"""Checks that a device computes what the processor computes: one function a path, for gpu.py and tests/test_gpu.py.

Each check takes a device and an empty folder, does something on the processor and on the device, and gives
{what: (difference, tolerance)}. Differences are relative: the largest one over the largest number. Where a computation
is in float32 on both sides the tolerance is a small multiple of its rounding; where a discrete choice hangs on a number
(a rank, an early stop), what is compared is the quality of the model that comes out.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import eckart
from eckart import load_model, load_tokenizer
from eckart.calibration.gradients import collect_gradients
from eckart.calibration.moments import calibrate
from eckart.cli.app import main
from eckart.compression.baselines import BASELINES
from eckart.data.builtin import builtin_model_path
from eckart.data.tokens import Tokens
from eckart.evals.tasks import evaluate
from eckart.lowrank import (
    METHODS,
    Factors,
    GradientMoments,
    InputMoments,
    Moments,
    build_method,
    pivot,
    split,
)
from eckart.lowrank.input_moments import INPUT_STATISTICS
from eckart.lowrank.moments import OF_GRADIENTS
from eckart.models.linear import LowRankLinear
from eckart.models.sites import find_sites
from eckart.runs.how import How
from eckart.runs.in_memory import make_baseline, make_checkpoint
from eckart.runs.out_of_core import compress_out_of_core
from eckart.runs.recipe import parse_recipe
from eckart.support.sizes import num_params

Differences = dict[str, tuple[float, float]]
# Of two float32 computations of one thing, in another order; and of what a few of them in a row lead to.
ROUNDING, FEW = 2e-6, 2e-4
# Of products of 16 bits, which a GPU's units add up in float32 by cutting off: 8e-6 on an H200, over 4096 rows.
UNITS = 2e-5
# Of logarithms of perplexities of two models that were made of sums that differ by rounding: ranks may differ by some.
QUALITY = 1e-2
# Recipes that between them pass through every stage; each is for the model that `put_model` makes.
RECIPES: dict[str, dict[str, Any]] = {
    "asvd-i": {"method": "asvd-i"},
    "fwsvd": {"method": "fwsvd"},
    "best": {"method": "best"},
    "best, joint, refit": {"method": "best", "joint": True, "refit": True},
    "best-distilled": {"method": "best-distilled", "distil": {"steps": 4}},
    "sequential, recovered": {"method": "kfac", "order": "sequential", "recover": {"steps": 4, "batch": 4}},
    "losses weighed by probes": {"method": "asvd-i", "allocation": {"name": "global", "weights": "probes"}},
    "surgical": {"method": "asvd-i", "keep": None, "allocation": {"name": "surgical", "score": "perplexity:TEXT"}},
    "float16": {"method": "kfac", "dtype": "float16"},
    "bfloat16": {"method": "best", "dtype": "bfloat16"},
}
KEEP = 0.6


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest number; NaN where either has one."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(torch.finfo(torch.float64).tiny))


def put_model(folder: Path) -> Path:
    """A random Llama of two blocks with the built-in tokenizer, in files; the same one whatever the torch."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model, generator = LlamaForCausalLM(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                scale = torch.logspace(0, -2, parameter.shape[1])  # inputs that matter less and less
                parameter.copy_(noise * scale / float(scale.norm()))
    place = folder / "model"
    model.save_pretrained(place)
    tokenizer = load_tokenizer(builtin_model_path())
    tokenizer.save_pretrained(place)
    drawn = torch.randint(3, 4096, (200, 12), generator=generator)
    text_of(place).write_text("\n".join(tokenizer.batch_decode(drawn)), encoding="utf-8")
    return place


def text_of(place: Path) -> Path:
    """A text of random words next to a model."""
    return place.with_suffix(".txt")


def tasks_on(text: Path) -> list[eckart.Task]:
    """What models are evaluated on."""
    return [eckart.Task(f"{kind}:{text}", length=48, limit=8) for kind in ("perplexity", "divergence")]


def random_rows(count: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows with means and channels of different size."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator) * torch.logspace(0, -1, width) + 0.1
    return rows.to(dtype)


def random_tokens(samples: int = 6, length: int = 24) -> Tokens:
    """Random ids, the second half of the last row padded."""
    ids = torch.randint(3, 4096, (samples, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[-1, length // 2 :] = False
    return Tokens(ids, mask)


def check_moments(device: torch.device, folder: Path) -> Differences:
    """Sums of rows of every type, against float64 on the processor."""
    answer: Differences = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows, dense = (random_rows(9000, 96, dtype, seed) for seed in (0, 1))
        mask = torch.arange(9000) % 7 != 0
        sums = []
        for where, kind in ((torch.device("cpu"), torch.float64), (device, dtype)):
            moments = InputMoments(96, INPUT_STATISTICS, device=where)
            moments.update(rows.to(where, kind), mask, reference=dense.to(where, kind))
            gradients = GradientMoments(96, 32, OF_GRADIENTS, device=where)
            gradients.update_covariance(rows.to(where, kind), mask)
            gradients.update_fisher(rows[:96, :32].to(where, kind))
            sums.append({**moments.sums, **gradients.sums})
        for name, total in sums[0].items():
            half = dtype != torch.float32 and name.endswith(("moment", "covariance"))
            answer[f"{dtype}, {name}"] = difference(sums[1][name], total), UNITS if half else ROUNDING
    return answer


def check_calibration(device: torch.device, folder: Path) -> Differences:
    """Moments and gradient statistics of a model."""
    place, tokens, answer = put_model(folder), random_tokens(), Differences()
    for dtype, tolerance in (("float32", FEW), ("bfloat16", 5e-2)):
        models = [load_model(place, dtype=dtype, device=where) for where in ("cpu", str(device))]
        blocks = [calibrate(model, tokens, build_method("asvd-i"), batch_size=4).blocks for model in models]
        for expected, part in zip(*blocks, strict=True):
            for group, moments in expected.inputs.items():
                answer[f"{dtype}, {group}"] = difference(part.inputs[group].moment(), moments.moment()), tolerance
        kinds = OF_GRADIENTS
        theirs, ours = (collect_gradients(model, tokens, find_sites(model), kinds) for model in models)
        for name, gradients in theirs.items():
            for kind, total in gradients.sums.items():
                answer[f"{dtype}, {name} {kind}"] = difference(ours[name].sums[kind], total), tolerance
    return answer


def check_factors(device: torch.device, folder: Path) -> Differences:
    """Every method of the catalogue on a wide and a tall weight, plain and anchored: losses, and the map at a rank."""
    answer: Differences = {}
    for d_out, d_in in ((48, 80), (80, 48)):
        weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(2))
        for name in METHODS:
            for method in (build_method(name), build_method(name).anchored(0.01)):
                moments = _moments(d_out, d_in, method.needs)
                for rank in (None, 20):
                    theirs = method.factor(weight, moments, rank=rank)
                    ours = method.factor(weight.to(device), _moved(moments, device), rank=rank)
                    label = f"{name}{' anchored' * (method.anchor is not None)}, {d_out} x {d_in}, {rank}"
                    answer[f"{label}: losses"] = difference(ours.tails(), theirs.tails()), FEW
                    answer[f"{label}: map"] = difference(ours.cut(20).dense(), theirs.cut(20).dense()), 10 * FEW
    return answer


def _moments(d_out: int, d_in: int, needs: frozenset[str]) -> Moments:
    """All that a method may ask for, of random rows."""
    inputs = InputMoments(d_in, needs & INPUT_STATISTICS)
    rows = random_rows(2000, d_in, torch.float32)
    dense = rows + 0.1 * random_rows(2000, d_in, torch.float32, 1)
    inputs.update(rows, reference=dense if "cross_moment" in needs else None)
    gradients = GradientMoments(d_out, d_in)
    gradients.update_covariance(random_rows(2000, d_out, torch.float32, 3), None)
    gradients.update_fisher(random_rows(d_out, d_in, torch.float32, 4))
    return Moments(inputs.compact(), gradients)


def _moved(moments: Moments, device: torch.device) -> Moments:
    """The same on the device."""
    inputs, gradients = moments.require_inputs(), moments.require_gradients()
    assert isinstance(gradients, GradientMoments)
    return Moments(
        InputMoments.from_state(inputs.count, {name: total.to(device) for name, total in inputs.sums.items()}),
        GradientMoments.from_state(
            gradients.examples, gradients.tokens, {name: total.to(device) for name, total in gradients.sums.items()}
        ),
    )


@torch.inference_mode()
def check_inference(device: torch.device, folder: Path) -> Differences:
    """Low-rank linears in the plain, the pivoted and the joint layout, for few rows and for many, against their map."""
    answer: Differences = {}
    generator = torch.Generator().manual_seed(5)
    left, right, bias = (torch.randn(*shape, generator=generator) for shape in ((96, 24), (24, 64), (96,)))
    whole = Factors(left.double(), right.double(), bias.double()).balanced()
    expected_map = whole.dense()
    for layout in ("plain", "pivoted"):
        for sizes in ((96,), (48, 24, 24)):
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
                modules: list[LowRankLinear] = []
                for member in split(pivot(whole) if layout == "pivoted" else whole, sizes):
                    lender = next(iter(modules), None)
                    modules.append(
                        LowRankLinear.from_factors(member, None, device=device, dtype=dtype, right_of=lender)
                    )
                for rows in ((1, 1), (3, 5), (2, 200)):
                    x = torch.randn(*rows, 64, generator=generator).to(dtype)
                    there = x.to(device)
                    y = torch.cat([module(there) for module in modules], -1)
                    expected = x.double() @ expected_map.T + bias.double()
                    label = f"{layout}, {len(sizes)} linears, {dtype}, {rows[0] * rows[1]} rows"
                    answer[label] = difference(y, expected), tolerance
                dense = torch.cat([module.dense() for module in modules])
                answer[f"{layout}, {len(sizes)} linears, {dtype}, dense"] = difference(dense, expected_map), tolerance
    return answer


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    """On some tokens."""
    logits: Tensor = model(input_ids=random_tokens().ids.to(model.device)).logits
    return logits.float().cpu()


def _make(place: Path, out: Path, device: torch.device | str, make: Callable[..., Any], keys: dict[str, Any]) -> None:
    """Compress the model."""
    calibration = {"corpus": str(text_of(place)), "samples": 16, "length": 48}
    keys = {"keep": KEEP, "context": 48, "calibration": calibration, **keys}
    recipe = parse_recipe({"model": str(place), **{key: value for key, value in keys.items() if value is not None}})
    make(recipe, out, How(str(device), batch_size=8))


def check_recipe(name: str, device: torch.device, folder: Path) -> Differences:
    """A recipe of RECIPES carried out: what the two models that come out say, and what they evaluate to."""
    place, tokenizer = put_model(folder), load_tokenizer(builtin_model_path())
    keys = json.loads(json.dumps(RECIPES[name]).replace("TEXT", str(text_of(place))))
    values = []
    for where in dict.fromkeys(("cpu", str(device))):
        out = folder / where.replace(":", "-")
        _make(place, out, where, make_checkpoint, keys)
        model, dense = (load_model(path, device=where) for path in (out, place))
        assert math.isfinite(float(_logits(model).abs().max()))
        results = evaluate(model, tokenizer, tasks_on(text_of(place)), reference=dense)
        values.append([*(result.value for result in results), num_params(model)])
    (perplexity, divergence, size), theirs = values[-1], values[0]
    return {
        "log-perplexity": (abs(math.log(perplexity) - math.log(theirs[0])), QUALITY),
        "divergence": (abs(divergence - theirs[1]), QUALITY),
        "size": (abs(size / theirs[2] - 1), QUALITY),
    }


def check_out_of_core(device: torch.device, folder: Path) -> Differences:
    """Moments and gradients from one block at a time, against all in memory on the processor: the same logits."""
    place, answer = put_model(folder), Differences()
    for method in ("asvd-i", "kfac"):
        outs = [folder / f"{method}-{what}" for what in ("cpu", "device")]
        _make(place, outs[0], "cpu", make_checkpoint, {"method": method})
        _make(place, outs[1], device, compress_out_of_core, {"method": method})
        theirs, ours = (_logits(load_model(out)) for out in outs)
        answer[method] = difference(ours, theirs), 10 * FEW
    return answer


def check_evaluations(device: torch.device, folder: Path) -> Differences:
    """What the built-in model evaluates to, and what it predicts next when it generates."""
    answer, tokenizer = Differences(), load_tokenizer(builtin_model_path())
    models = [load_model("builtin", dtype="float32", device=where) for where in ("cpu", str(device))]
    text = text_of(put_model(folder))
    results = [evaluate(model, tokenizer, tasks_on(text), reference=model) for model in models]
    for theirs, ours in zip(*results, strict=True):
        answer[theirs.task] = abs(ours.value - theirs.value) / max(abs(theirs.value), 1), FEW
    ids = torch.tensor([tokenizer("The function returns the").input_ids])
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    texts = [model.generate(ids.to(model.device), **settings).cpu() for model in models]  # type: ignore[operator]
    answer["generated"] = float(not torch.equal(*texts)), 0.0
    return answer


def check_baselines(device: torch.device, folder: Path) -> Differences:
    """Rivals: their logits."""
    place, answer = put_model(folder), Differences()
    for name in BASELINES if find_spec("torchao") else ["llm-pruner"]:
        keys: dict[str, Any] = {"model": str(place), "method": name, "context": 48}
        keys["calibration"] = {"corpus": str(text_of(place)), "samples": 12, "length": 32}
        if name == "llm-pruner":
            keys |= {"keep": KEEP, "method": {"name": name, "options": {"first": 0, "last": 0, "length": 32}}}
        logits: list[Tensor] = []
        for where in ("cpu", str(device)):
            made = make_baseline(parse_recipe(keys), folder / f"{name}-{len(logits)}", How(where))
            logits.append(_logits(made))
        answer[name] = difference(logits[1], logits[0]), 10 * FEW
    return answer


def check_commands(device: torch.device, folder: Path) -> Differences:
    """`eckart compress` and `eckart eval` with --device."""
    text, out = text_of(put_model(folder)), folder / "out"
    where = ["--length", "64", "--device", str(device)]
    calibration = ["--calibration", str(text), "--samples", "8", "--no-cache"]
    for command in (
        ["compress", "builtin", str(out), "--keep", "0.7", "--method", "kfac", *calibration, *where],
        ["eval", str(out), "--task", f"perplexity:{text}", "--limit", "4", *where],
    ):
        with mock.patch.object(sys, "argv", ["eckart", *command]):
            try:
                main()
                status: object = 0
            except SystemExit as stop:
                status = stop.code
        assert not status, f"eckart {' '.join(command)} ended with {status}"
    return {"finite": (float(not torch.isfinite(_logits(load_model(out, device=str(device)))).all()), 0.0)}


CHECKS: dict[str, Callable[[torch.device, Path], Differences]] = {
    "moments": check_moments,
    "calibration": check_calibration,
    "factors": check_factors,
    "inference": check_inference,
    "evaluations": check_evaluations,
    "out of core": check_out_of_core,
    "baselines": check_baselines,
    "commands": check_commands,
    **{
        f"recipe: {name}": lambda device, folder, name=name: check_recipe(name, device, folder)  # type: ignore[misc]
        for name in RECIPES
    },
}


def failures(differences: Differences) -> dict[str, tuple[float, float]]:
    """Those above their tolerance, NaN among them."""
    return {what: pair for what, pair in differences.items() if not pair[0] <= pair[1]}
