"""docs/families.md, from the tests: what was tried with each family of models, and what refuses it.

python tools/families_page.py        # writes docs/families.md

A cell is what a test says: the families that the test is run with, by its parameters, or that stand in its text. The
tests are read, and not imported, so that the page is the same where an optional package is missing.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from eckart.models.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
PAGE = ROOT / "docs" / "families.md"
YES, REFUSED = "+", "no"
HEAD = """# Families: what was tried with which

{yes} a test holds it with a tiny model of this family; {refused} a test holds that it is refused, by name and with what
to do. An empty cell was not tried: nothing is known against it. The tests of each column are named under its table.
Rows are `model_type` of a configuration; those marked \\* have no row in `models/families.py` and take the default.
[methods.md](methods.md#models) says what is compressed of each, [serving.md](serving.md) how a result is served. This
page is made from the tests by `python tools/families_page.py`, and a test compares them.
"""


@dataclass(frozen=True)
class Column:
    """An ability.

    Attributes:
        tests, refusals: "FILE::NAME" of tests, or of what they use, that hold it or hold that it is refused.
    """

    name: str
    tests: tuple[str, ...]
    refusals: tuple[str, ...] = ()


PAIRS = "runs/test_encoder_decoders.py::test_every_family_comes_out_of_core_as_in_memory_and_loads_and_generates"
WHISPER = "runs/test_encoder_decoders.py::test_whisper_is_compressed_without_text_and_generates"
SOUNDS = "runs/test_encoder_decoders.py::test_whisper_is_calibrated_on_sounds_and_transcripts"
HYBRID = "models/test_hybrids.py::test_it_is_compressed_saved_loaded_generated_with_and_exported"
MIXTURE = "models/test_experts.py::test_compressed_experts_are_loaded_again_and_exported"
OPEN = "models/test_experts.py::test_what_cannot_run_open_experts_says_so"
BOTH = "evals/test_mixtures_and_hybrids.py"
BY_HAND = f"{BOTH}::test_perplexity_and_divergence"
TOKENS = f"{BOTH}::test_distance_and_similarity_are_of_what_reads_every_token"
OTHERS = "runs/test_encoder_decoders.py::test_other_evaluations_are_refused"
UNTOLD = "runs/test_encoder_decoders.py::test_whisper_cannot_be_calibrated_or_measured_on_text"
TABLES: dict[str, tuple[Column, ...]] = {
    "Made smaller, kept and loaded": (
        Column(
            "calibrated",
            (
                "calibration/test_moments.py::test_moments_equal_those_of_plain_hooks",
                "calibration/test_routes.py::test_every_method_has_what_it_needs_of_every_expert",
                "calibration/test_encoder_decoders.py::test_moments_are_of_what_each_linear_reads",
                "models/test_hybrids.py::test_what_each_linear_reads_is_what_hooks_see_in_every_order",
                "runs/test_encoder_decoders.py::test_what_whisper_calibrates_on_is_what_it_reads",
            ),
        ),
        Column(
            "reloaded exactly",
            (
                "models/test_checkpoint.py::test_round_trip_is_exact_and_repeats",
                *(MIXTURE, HYBRID, PAIRS, WHISPER),
            ),
        ),
        Column(
            "generates",
            ("models/test_checkpoint.py::test_generates_with_a_cache", MIXTURE, HYBRID, PAIRS, WHISPER),
        ),
        Column(
            "out of core",
            (
                "runs/test_out_of_core.py::test_every_family_comes_out_as_in_memory",
                "runs/test_out_of_core_walk.py::test_every_mixture_comes_out_as_in_memory",
                "models/test_hybrids.py::test_best_comes_out_of_core_as_in_memory",
                *(PAIRS, SOUNDS),
            ),
        ),
        Column(
            "dense export",
            ("models/test_dense.py::test_export_equals_the_factored_model", MIXTURE, HYBRID, PAIRS),
        ),
    ),
    "Run elsewhere, on a cluster, corrected": (
        Column(
            "remote code",
            ("models/test_standalone.py::CASES", "models/test_standalone.py::test_the_file_computes_what_eckart_does"),
            (OPEN,),
        ),
        Column(
            "ONNX",
            (
                "serving/test_onnx.py::test_every_family_goes_on_as_transformers_does",
                "serving/test_onnx.py::test_an_encoder_is_one_pass",
            ),
            (
                "serving/test_not_served.py::test_onnx_refuses_encoder_decoders",
                "serving/test_not_served.py::test_onnx_refuses_experts_that_are_open",
            ),
        ),
        Column("vLLM", ("serving/test_vllm.py::CHECKPOINTS",)),
        Column("to GGUF", ("serving/test_gguf_export.py::test_transformers_reads_back_the_same_model",)),
        Column("from GGUF", ("models/test_gguf.py::test_the_model_that_was_written",)),
        Column(
            "Ray",
            (
                "runs/engine/test_on_cluster.py::test_any_number_of_workers_gives_the_same_factors",
                "runs/engine/test_on_cluster.py::test_workers_calibrate_and_cut_encoder_decoders",
            ),
        ),
        Column("correct", ("compression/test_correction.py::test_peft_runs_the_dense_sum",)),
    ),
    "Measured": (
        Column(
            "perplexity",
            (
                "evals/test_perplexity.py::test_equals_a_loop_by_hand",
                BY_HAND,
                "runs/test_encoder_decoders.py::test_perplexity_is_of_the_targets",
            ),
            (UNTOLD,),
        ),
        Column(
            "divergence",
            (
                "evals/test_divergence.py::test_equals_a_loop_by_hand",
                BY_HAND,
                "evals/test_of_pairs.py::test_divergence_is_at_the_targets",
            ),
        ),
        Column(
            "distance",
            (
                "evals/test_distance.py::test_every_family_has_a_distance_and_keeps_no_hook",
                TOKENS,
                "evals/test_of_pairs.py::test_distance_is_of_both_stacks",
            ),
        ),
        Column(
            "similarity",
            (
                "evals/test_similarity.py::test_every_family_can_be_watched_and_keeps_no_hook",
                TOKENS,
                "evals/test_of_pairs.py::test_similarity_is_of_both_stacks",
            ),
        ),
        Column(
            "accumulation",
            (
                "evals/test_accumulation.py::test_by_whole_models_in_which_one_block_is_compressed",
                f"{BOTH}::test_accumulation_of_a_model_that_is_its_own_reference",
            ),
            (OTHERS,),
        ),
        Column("probing", ("evals/test_hidden_states.py::test_states_are_those_of_each_text_alone",), (OTHERS,)),
        Column(
            "cost",
            (
                "evals/test_cost.py::test_every_family_has_a_cost",
                f"{BOTH}::test_cost",
                "evals/test_of_pairs.py::test_cost_is_of_both_stacks",
                "evals/test_of_pairs.py::test_the_cost_of_a_model_of_sound",
            ),
        ),
    ),
}


@cache
def _tiny() -> Mapping[str, Any]:
    """The tests' tables of tiny models."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    tiny, gguf_files, pytest = (importlib.import_module(name) for name in ("tiny", "gguf_files", "pytest"))
    return {**vars(tiny), "MODELS": gguf_files.MODELS, "pytest": pytest}


def kinds() -> dict[str, tuple[str, ...]]:
    """{heading: model types}, in the order of the page."""
    tables = _tiny()
    families = tables["FAMILY_CONFIGS"]
    return {
        "decoders": tuple(name for name in families if name not in tables["ENCODERS"]),
        "encoders": tuple(name for name in families if name in tables["ENCODERS"]),
        "mixtures of experts": tuple(tables["MIXTURE_CONFIGS"]),
        "hybrids": tuple(tables["HYBRID_CONFIGS"]),
        "encoder-decoders": (*tables["ENCODER_DECODER_CONFIGS"], "whisper"),
        "others": tuple(tables["DEFAULT_CONFIGS"]),
    }


@cache
def _parsed(file: str) -> tuple[ast.Module, Mapping[str, Any]]:
    """A test file, and what the names at its top are worth, as far as the tables of tiny models say."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    names: dict[str, Any] = dict(_tiny())
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and getattr(node, "value", None) is not None:
            try:
                names[target.id] = _worth(node.value, names)  # type: ignore[attr-defined]
            except Exception:  # noqa: BLE001 (what needs more than the tables is no list of families)
                names.pop(target.id, None)
    return tree, names


def _worth(expression: ast.expr, names: Mapping[str, Any]) -> Any:
    code = compile(ast.fix_missing_locations(ast.Expression(expression)), "<test>", "eval")
    return eval(code, dict(names))


def families_in(test: str) -> set[str]:
    """The model types that a test is run with, or that stand in its text or among its fixtures.

    Args:
        test: "FILE::NAME", of a function or of a name at the top of the file.

    Raises:
        ValueError: the file has no such name, or no model type is found in it.
    """
    file, _, name = test.partition("::")
    known = {each for types in kinds().values() for each in types}
    tree, names = _parsed(file)
    node = next((node for node in tree.body if _name_of(node) == name), None)
    if node is None:
        raise ValueError(f"tests/{file} has no {name}: enter the test's name of today in tools/families_page.py")
    found = {each for inner in ast.walk(node) for each in _words(inner)} & known
    if not isinstance(node, ast.FunctionDef):
        found |= set(_strings(names.get(name))) & known
    for decorator in getattr(node, "decorator_list", []):
        found |= {each for value in _parameters(decorator, names) for each in _strings(value)} & known
    if "architecture" in {word for inner in ast.walk(node) for word in _words(inner)}:
        found |= {kind for kind, _ in _tiny()["MODELS"].values()} & known
    if not found:
        raise ValueError(f"tests/{test}: no family of models is found in it")
    return found


def _name_of(node: ast.stmt) -> str | None:
    if isinstance(node, ast.FunctionDef):
        return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return target.id if isinstance(target, ast.Name) else None


def _words(node: ast.AST) -> Iterator[str]:
    """Strings and arguments: a model type is named by either."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    if isinstance(node, ast.arg):
        yield node.arg


def _parameters(decorator: ast.expr, names: Mapping[str, Any]) -> list[Any]:
    """The values of a `pytest.mark.parametrize`, as far as they are worked out from the tables."""
    if not isinstance(decorator, ast.Call) or not ast.unparse(decorator.func).endswith("parametrize"):
        return []
    try:
        return list(_worth(decorator.args[1], names))
    except Exception:  # noqa: BLE001 (values that are no families)
        return []


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if hasattr(value, "marks"):  # a pytest.param
        return _strings(list(value.values))
    return [each for part in value for each in _strings(part)] if isinstance(value, Collection) else []


def cells(column: Column) -> dict[str, str]:
    """{model type: what its cell says}. Raises ValueError as `families_in`; or where a test of each kind has it."""
    held = {each for test in column.tests for each in families_in(test)}
    refused = {each for test in column.refusals for each in families_in(test)}
    if both := held & refused:
        raise ValueError(f"{column.name}: {min(both)} is both held and refused by tests")
    return dict.fromkeys(held, YES) | dict.fromkeys(refused, REFUSED)


def page() -> str:
    """The whole document. Raises ValueError as `cells`."""
    text = HEAD.format(yes=f"`{YES}`", refused=f"`{REFUSED}`")
    return text + "".join(_section(title, columns) for title, columns in TABLES.items())


def _section(title: str, columns: Sequence[Column]) -> str:
    found = [cells(column) for column in columns]
    lines = [
        "",
        f"## {title}",
        "",
        f"| | {' | '.join(column.name for column in columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for kind, types in kinds().items():
        lines.append(f"| **{kind}** |" + " |" * len(columns))
        for each in types:
            name = each if each in FAMILIES else f"{each} \\*"
            lines.append(f"| {name} |" + "".join(f" {known.get(each, '')} |".replace("  ", " ") for known in found))
    lines.append("")
    for column in columns:
        lines += [f"- **{column.name}**:", *(f"  - {each}" for each in _places(column.tests))]
        if column.refusals:
            lines += ["  - refused:", *(f"    - {each}" for each in _places(column.refusals))]
    return "\n".join(lines) + "\n"


def _places(tests: Sequence[str]) -> list[str]:
    return [f"`tests/{test.partition('::')[0]}`: {test.partition('::')[2]}" for test in tests]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
