"""People without eckart: a compressed directory must stop the stock loader, and a dense export must load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eckart.allocation import plan
from eckart.calibration.moments import calibrate
from eckart.compression.replace import compress
from eckart.lowrank import build_method
from eckart.models.dense import export_dense
from eckart.models.loading import save
from tiny import ENCODERS, logits_of, tiny_model, tiny_tokens

TYPES = ("llama", "gpt2", "bert")
# Loads every directory named on its command line in the class of its config and as a base model; prints what came.
SCRIPT = """
import json, sys
import torch, transformers
results = {}
for path in sys.argv[2:]:
    for name in (transformers.AutoConfig.from_pretrained(path).architectures[0], "AutoModel"):
        try:
            model = getattr(transformers, name).from_pretrained(path).eval()
            with torch.no_grad():
                output = model(input_ids=torch.tensor(json.loads(sys.argv[1])))
            results[f"{path} {name == 'AutoModel'}"] = output[0].tolist()
        except Exception as error:
            results[f"{path} {name == 'AutoModel'}"] = f"{type(error).__name__}: {error}"
assert "eckart" not in sys.modules
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, bool], Any]:
    """{(model type, "compressed" or "dense", as base model): logits or an error}, from one process without eckart."""
    folder, expected = tmp_path_factory.mktemp("without"), {}
    tokens = tiny_tokens(2, 12)
    for model_type in TYPES:
        method, model = build_method("sfsd"), tiny_model(model_type)
        compress(model, method, plan(model, 0.6), calibrate(model, tiny_tokens(4, 12), method))
        save(model, folder / f"{model_type}-compressed")
        expected[model_type] = logits_of(export_dense(model), tokens)
        save(model, folder / f"{model_type}-dense")
    paths = sorted(str(path) for path in folder.iterdir())
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(tokens.ids.tolist()), *paths],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    results: dict[tuple[str, str, bool], Any] = {}
    for key, outcome in json.loads(process.stdout.splitlines()[-1]).items():
        path, _, base = key.rpartition(" ")
        model_type, kind = Path(path).name.split("-")
        results[model_type, kind, base == "True"] = outcome
    return {**results, **{(name, "expected", False): logits for name, logits in expected.items()}}


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_compressed_directory_raises(outcomes: dict[Any, Any], model_type: str, base: bool) -> None:
    outcome = outcomes[model_type, "compressed", base]
    assert isinstance(outcome, str), "a dense model with random weights was built"
    assert "mismatch" in outcome or "size" in outcome


@pytest.mark.parametrize("model_type", TYPES)
def test_a_dense_export_loads(outcomes: dict[Any, Any], model_type: str) -> None:
    logits = torch.tensor(outcomes[model_type, "dense", False])
    torch.testing.assert_close(logits, outcomes[model_type, "expected", False], rtol=0, atol=1e-5)
    assert (model_type in ENCODERS) == (model_type == "bert")
    assert not isinstance(outcomes[model_type, "dense", True], str)
