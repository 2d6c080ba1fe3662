"""Card: the README of a compressed checkpoint, for the person who finds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from eckart.allocation.speed import describe_rows
from eckart.evals.result import EvalResult
from eckart.models.remote_code import FILE, auto_class_of
from eckart.runs.facts import Facts
from eckart.runs.recipe import Recipe

# How a checkpoint that carries code is loaded by it.
REMOTE_CODE = (
    f"- Without eckart, as it is: `from_pretrained(..., trust_remote_code=True)` runs {FILE}, which is here to be\n"
    "  read first. It needs transformers alone, and is slower than eckart."
)


def write_card(
    recipe: Recipe,
    facts: Facts,
    results: Sequence[tuple[EvalResult, EvalResult]] = (),
    *,
    architecture: str,
    remote_code: bool = False,
) -> str:
    """Markdown with the front matter that the hub reads.

    Args:
        architecture: the model's class.
        results: (dense, compressed) pairs of the same task.
        remote_code: the checkpoint carries code by which it loads without eckart.
    """
    composition = dataclasses.replace(recipe.composition, layout=facts.layout, joint=bool(facts.joint))
    method, ranks = composition.method, "as in plan.json" if recipe.plan else "by rules" if recipe.rules else None
    errors = [site["relative_error"] for site in facts.sites.values() if site["relative_error"] is not None]
    params, size = facts.params, facts.bytes
    lines = [
        "---",
        "library_name: transformers",
        f"base_model: {recipe.model}",
        "tags: [eckart, low-rank, compressed]",
        "---",
        "",
        f"# {recipe.model} by {recipe.method.name}",
        "",
        f"Low-rank factors of {recipe.model}, made by eckart with **{method.name}**",
        f"({method.paper}; {method.equation}).",
        f"{composition.describe(ranks)}.",
        "",
        *ways_to_load(architecture, remote_code=remote_code),
        "",
        "| | dense | compressed |",
        "|---|---|---|",
        f"| parameters | {params[0]:,} | {params[1]:,} |",
        f"| bytes | {size[0]:,} | {size[1]:,} |",
        *([] if facts.keep_of_planned is None else [_share("planned linears", facts.keep_of_planned)]),
        _share("compressible linears", facts.keep_of_linears),
        _share("whole model", params[1] / params[0]),
    ]
    for before, after in results:
        lines.append(
            f"| {before.task} ({before.metric}, length {before.settings.get('length')}) "
            f"| {before.value:.4g} | {after.value:.4g} |"
        )
    lines += [
        "",
        f"{facts.sites_low_rank} linears are low-rank, {facts.sites_dense} compressible ones stay dense.",
    ]
    if facts.origin is not None:
        lines.append(describe_origin(facts.origin))
    if facts.no_bias is not None:
        lines.append(f"No bias: {facts.no_bias}.")
    if facts.speed is not None:
        lines.append(describe_speed(facts.speed))
    if facts.cache is not None:
        lines.append(describe_cache(facts.cache))
    when = " before gradient steps," if any(report["kept"] for report in facts.passes) else ""
    if errors:
        lines.append(
            f"Relative squared error of the stored factors at their outputs,{when} on the calibration tokens: "
            f"mean {sum(errors) / len(errors):.4g}, largest {max(errors):.4g}."
        )
    lines += calibration_lines(facts.calibration)
    undone = [report["place"] for report in facts.passes if not report["kept"]]
    if undone:
        lines.append(f"Gradient steps were undone where they did not help on held-out samples: {', '.join(undone)}.")
    lines += ["", "## Recipe", "", "```yaml", recipe.to_yaml().rstrip(), "```", ""]
    return "\n".join(lines)


def ways_to_load(architecture: str, *, remote_code: bool) -> list[str]:
    """Lines on how a checkpoint is loaded, by whom.

    Args:
        architecture: the model's class.
        remote_code: the checkpoint carries code by which it loads without eckart.
    """
    auto = auto_class_of(architecture)
    return [
        "```python",
        "import eckart  # teaches transformers to read this checkpoint",
        f"from transformers import {auto}",
        f'model = {auto}.from_pretrained("path/to/this")',
        "```",
        "",
        "- A program that does not import eckart: `eckart exec -- lm_eval --model hf --model_args pretrained=...`,",
        "  `eckart exec -- python script.py`.",
        *([REMOTE_CODE] if remote_code else []),
        "- vLLM: `pip install 'eckart[vllm]'`, and then as any model; nothing is imported by hand.",
        "- Without eckart, at the full size: `eckart export path/to/this DENSE --dense` writes an ordinary checkpoint.",
        "",
        "In any other way loading stops with a shape mismatch; it never builds a random model.",
    ]


def describe_origin(origin: Mapping[str, Any]) -> str:
    """A line on a model that was no plain checkpoint, of `Facts.origin`."""
    digests = [digest for files in origin["files"].values() for digest in files.values()]
    if "gguf" in origin:
        return (
            f"The dense model was read of the GGUF file {origin['gguf']} (SHA-256 {digests[0]}), whose weights were "
            f"stored as {origin['quantised']}: no figure here can be better than those weights are."
        )
    return (
        f"The dense model is {origin['base']} with an adapter ({origin['adapter']}) merged into it; compression.json "
        "has the digests of both."
    )


def describe_speed(speed: Mapping[str, Any]) -> str:
    """A line on a budget in speed, of `Facts.speed`."""
    machine = speed["machine"]
    where = ", ".join(f"{machine[key]}" for key in ("name", "dtype") if key in machine)
    threads = f", {machine['threads']} threads" if machine.get("device") == "cpu" else ""
    return (
        f"Speed, modelled: {speed['modelled']:.2f} times the dense model's where {speed['asked']:g} was asked for, "
        f"{describe_rows(speed['rows'])} ({where}{threads}); `eckart eval --task cost --reference` measures it."
    )


def describe_cache(cache: Mapping[str, Any]) -> str:
    """A line on a cache of latents, of `Facts.cache`."""
    before, after = cache["numbers_per_token"]
    return (
        f"Cache: {after:,} numbers a token where whole keys and values take {before:,} ({after / before:.3f}), with "
        f"heads in groups of {cache['heads']}: model.generate(..., past_key_values=eckart.LatentCache(model.config))."
    )


def calibration_lines(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines on the texts that it was calibrated on: their shares of the tokens."""
    total = sum(part["tokens"] for part in parts)
    if not total:
        return []
    return [
        f"Calibrated on {total:,} tokens:",
        "",
        "| text | samples | tokens | share of the tokens |",
        "|---|---|---|---|",
        *(
            f"| {part['corpus']} | {part['samples']} | {part['tokens']:,} | {part['tokens'] / total:.3f} |"
            for part in parts
        ),
        "",
    ]


def _share(whole: str, kept: float) -> str:
    """A row of the table of sizes."""
    return f"| share of the {whole} kept | 1 | {kept:.4f} |"
