"""The face: `import eckart` and `eckart --help` are quick, and teach stock transformers to read our checkpoints."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import eckart
from tiny import tiny_model, tiny_tokens

HEAVY = ("torch", "transformers", "datasets", "sklearn", "scipy", "plotly", "matplotlib", "ray", "lm_eval", "torchao")


def python(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """What a new process prints, on both streams; an error of it is one of the test."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=600
    )


@pytest.mark.parametrize(
    "code",
    [
        "import eckart",
        "import eckart; dir(eckart); eckart.__all__; eckart.__doc__",
        "from eckart.cli import main; sys.argv = ['eckart', '--help']; main()",
        "from eckart.cli import main; sys.argv = ['eckart', '--version']; main()",
    ],
)
def test_what_is_quick_imports_nothing_large(code: str) -> None:
    told = f"import sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); {code}"
    modules = set(python(told).stderr.split())
    assert "eckart" in modules
    assert not modules & set(HEAVY)


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys; from eckart.cli.app import load_command; load_command(sys.argv[1]); print(*sys.modules)"
    for name in ("report", "pitfalls"):
        assert not set(python(code, name).stdout.split()) & {"torch", "transformers"}, name


def test_the_names_of_the_face() -> None:
    tree = ast.parse(Path(eckart.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    written = [alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(alias.name for alias in written) == eckart.__all__ == dir(eckart)
    assert all(alias.asname == alias.name for alias in written)  # otherwise a type checker takes it for private
    with pytest.raises(AttributeError, match="decompress"):
        eckart.decompress  # type: ignore[attr-defined]  # noqa: B018


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny compressed model."""
    out = tmp_path_factory.mktemp("face") / "small"
    model, method = tiny_model("llama"), eckart.build_method("svd")
    eckart.compress(model, method, eckart.plan(model, 0.5), eckart.calibrate(model, tiny_tokens(4, 12), method))
    eckart.save(model, out)
    return out


LOAD = """
import logging, sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(*(name for name, module in model.named_modules() if type(module).__name__ == "LowRankLinear"))
print(type(model.config.quantization_config).__module__)
print(logging.getLogger("torchao").level, logging.getLogger("torch.utils._pytree").level)
"""


@pytest.mark.parametrize(
    "first",
    [
        "import eckart",
        "import transformers.modeling_utils, eckart",
        pytest.param("import eckart.models.sites", marks=pytest.mark.slow),
        pytest.param("from transformers import LlamaForCausalLM; import eckart; eckart.plan", marks=pytest.mark.slow),
    ],
)
def test_stock_transformers_reads_our_checkpoints_whoever_is_imported_first(compressed: Path, first: str) -> None:
    done = python(first + LOAD, compressed)
    sites = json.loads((compressed / "config.json").read_text())["quantization_config"]["sites"]
    names, module, levels = done.stdout.splitlines()
    assert set(names.split()) == set(sites)
    assert module == "eckart.models.checkpoint"
    assert levels == "0 0"  # held back while transformers is imported, and given back
    if first.startswith("import eckart"):
        assert "torchao" not in done.stderr
