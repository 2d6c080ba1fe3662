"""ONNX: what ONNX Runtime goes on with is what transformers does; what cannot be exported is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from eckart.allocation.rank_plan import in_bits
from eckart.allocation.rules import plan
from eckart.compression.replace import compress
from eckart.models.families import UnsupportedModelError
from eckart.models.loading import save
from eckart.models.sites import low_rank_modules
from eckart.serving.onnx import OnnxExport, export_onnx
from eckart.serving.onnx_check import difference_of
from eckart.serving.onnx_decoder import OnnxDecoder
from eckart.serving.onnx_graph import Signature, signature_of
from models.layouts import laid_out
from tiny import PAD, Run, tiny_model, tiny_tokenizer, tiny_tokens

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

# The families, each in another layout; Gemma's blocks have windows of six tokens.
CASES = {
    "llama": "joint plain",
    "qwen2": "pivoted",
    "gemma2": "plain",
    "gemma3_text": "joint pivoted",
    "gpt2": "pivoted",
    "opt": "plain",
    "gpt_neox": "joint plain",
    "phi3": "joint pivoted",
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return laid_out("llama", "joint pivoted", num_hidden_layers=1)


@pytest.fixture(scope="module")
def written(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> OnnxExport:
    return export_onnx(model, tmp_path_factory.mktemp("onnx") / "out", tiny_tokenizer())


def goes_on_alike(model: PreTrainedModel, folder: Path) -> None:
    """Two rows, one padded on the left, of two lengths: shorter and longer than Gemma's window."""
    decoder = OnnxDecoder(folder)
    for length, new in ((4, 10), (15, 24)):
        ids = tiny_tokens(2, length, seed=length).ids
        mask = torch.ones_like(ids)
        ids[0, :3], mask[0, :3] = PAD, 0
        expected = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
        assert decoder.generate(ids, mask, max_new_tokens=new).tolist() == expected.tolist()


def test_goes_on_as_transformers_does(model: PreTrainedModel, written: OnnxExport) -> None:
    assert written.cached
    goes_on_alike(model, written.folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_every_family_goes_on_as_transformers_does(family: str, tmp_path: Path) -> None:
    model = laid_out(family, CASES[family])
    goes_on_alike(model, export_onnx(model, tmp_path / "out").folder)


@pytest.mark.slow
def test_a_dense_model_goes_on_as_transformers_does(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text")
    goes_on_alike(model, export_onnx(model, tmp_path / "out").folder)


def test_factors_stay_two_products_and_a_shared_one_is_stored_once(model: PreTrainedModel, written: OnnxExport) -> None:
    import onnx

    graph = onnx.load(written.folder / "model.onnx").graph
    stored = sorted(sorted(weight.dims) for weight in graph.initializer if len(weight.dims) == 2)
    parameters = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    assert stored == sorted(sorted(parameter.shape) for parameter in parameters)
    assert not any(part.metadata_props for part in (*graph.node, *graph.value_info))  # no places in anybody's files


@pytest.mark.slow
def test_names_are_those_of_optimum_and_genai(model: PreTrainedModel, written: OnnxExport) -> None:
    session = OnnxDecoder(written.folder).session
    assert {given.name: given.shape for given in session.get_inputs()} == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        "past_key_values.0.key": ["batch_size", 2, "past_sequence_length", 8],
        "past_key_values.0.value": ["batch_size", 2, "past_sequence_length", 8],
    }
    assert [given.name for given in session.get_outputs()] == ["logits", "present.0.key", "present.0.value"]


def test_configs_and_the_tokenizer_are_next_to_the_graph(written: OnnxExport) -> None:
    files = {file.name for file in written.folder.iterdir()}
    assert files >= {"model.onnx", "model.onnx.data", "config.json", "generation_config.json", "tokenizer.json"}
    assert written.num_bytes == sum(file.stat().st_size for file in written.folder.glob("model.onnx*"))
    config = json.loads((written.folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    genai = json.loads((written.folder / "genai_config.json").read_text())["model"]
    assert (genai["decoder"]["num_key_value_heads"], genai["decoder"]["head_size"]) == (2, 8)


def test_a_graph_that_computes_something_else_is_refused(
    model: PreTrainedModel, written: OnnxExport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = laid_out("llama", "joint pivoted", num_hidden_layers=1, seed=1)
    assert difference_of(model, signature_of(model), written.folder) == written.difference < 1e-5

    def copy_of_another(model: PreTrainedModel, signature: Signature, file: Path, *, tied: bool) -> None:
        for name in ("model.onnx", "model.onnx.data"):
            shutil.copy(written.folder / name, file.parent)

    monkeypatch.setattr("eckart.serving.onnx.trace", copy_of_another)
    with pytest.raises(UnsupportedModelError, match="would be exported to ONNX wrongly"):
        export_onnx(other, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_row_that_has_ended_is_filled(model: PreTrainedModel, written: OnnxExport) -> None:
    decoder, ids = OnnxDecoder(written.folder), tiny_tokens(2, 5).ids.numpy()
    free = decoder.generate(ids, max_new_tokens=8)
    decoder.end, decoder.pad = (int(free[0, 6]),), 3
    ended = decoder.generate(ids, max_new_tokens=8)
    last = 5 + free[0, 5:].tolist().index(free[0, 6])
    assert (ended[0, : last + 1] == free[0, : last + 1]).all()
    assert (ended[0, last + 1 :] == 3).all()
    decoder.end = tuple(range(96))
    assert decoder.generate(ids, max_new_tokens=8).shape == (2, 6)


def test_bad_input_is_refused(written: OnnxExport, tmp_path: Path) -> None:
    decoder, ids = OnnxDecoder(written.folder), np.ones((2, 5), dtype=np.int64)
    mask = ids.copy()
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="pad on the left"):
        decoder.generate(ids, mask)
    with pytest.raises(ValueError, match=r"are not both \(batch, length\)"):
        decoder.generate(ids, mask[:1])
    with pytest.raises(ValueError, match="more than the 64 positions"):
        decoder.generate(ids, max_new_tokens=60)
    with pytest.raises(ValueError, match="max_new_tokens 0"):
        decoder.generate(ids, max_new_tokens=0)
    with pytest.raises(FileNotFoundError, match=r"has no model\.onnx"):
        OnnxDecoder(tmp_path)


def test_what_onnx_cannot_hold_is_refused_and_nothing_is_written(model: PreTrainedModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = T5Config(vocab_size=96, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=1)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        export_onnx(T5ForConditionalGeneration(config), out)
    with pytest.raises(ValueError, match="no kernels for bfloat16"):
        export_onnx(tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=1), out)
    with pytest.raises(ValueError, match="no kernels for int8 of float16"):
        export_onnx(tiny_model("llama", dtype=torch.float16, num_hidden_layers=1), out, int8=True)
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists"):
        export_onnx(model, out)
    assert [file.name for file in out.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_an_encoder_is_one_pass(tmp_path: Path) -> None:
    import onnxruntime

    model = laid_out("bert", "pivoted")
    assert not export_onnx(model, tmp_path / "out").cached
    tokens = tiny_tokens(3, 9, padded=True)
    ids, mask = tokens.ids, tokens.mask.long()
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        expected = model(**given).logits
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {name: value.numpy() for name, value in given.items()})
    torch.testing.assert_close(torch.from_numpy(logits)[tokens.mask], expected[tokens.mask], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="is it an encoder"):
        OnnxDecoder(tmp_path / "out")


@pytest.mark.slow
def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    import onnx

    model = tiny_model("gemma3_text", num_hidden_layers=1, layer_types=["full_attention"], tie_word_embeddings=True)
    export_onnx(model, tmp_path / "out")
    stored = onnx.load(tmp_path / "out" / "model.onnx").graph.initializer
    assert [list(weight.dims) for weight in stored if 96 in weight.dims] == [[96, 32]]


@pytest.mark.slow
def test_int8_on_the_command_line(run: Run, tmp_path: Path) -> None:
    """Of a checkpoint of few bits, whose numbers are multiplied out; factors are among what is rounded."""
    import onnx

    model = tiny_model("llama", num_hidden_layers=1)
    compress(model, "svd", in_bits(plan(model, keep=0.6), 4))
    count = len(low_rank_modules(model))
    save(model, tmp_path / "small", tiny_tokenizer())
    status, printed = run("export", tmp_path / "small", tmp_path / "out", "--onnx", "--int8")
    assert status == 0, printed
    assert f"{count} linears of few bits became numbers in 8 bits" in printed
    told = re.search(r"differ by up to (\d+)%", printed)
    assert told is not None
    assert int(told[1]) < 25, "products of 8 bits overflow without instructions for them, unless weights use 7"
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    integer = [weight for weight in graph.initializer if weight.data_type == onnx.TensorProto.INT8 and weight.dims]
    assert len([weight for weight in integer if len(weight.dims) == 2]) == 2 * count + 1
    assert OnnxDecoder(tmp_path / "out").generate([[7, 8, 9]], max_new_tokens=3).shape == (1, 6)


def test_the_command_asks_for_one_form(run: Run, tmp_path: Path) -> None:
    for options in ([], ["--dense", "--onnx"]):
        status, printed = run("export", "builtin", tmp_path / "out", *options)
        assert (status, "say which form" in printed) == (2, True)
    status, printed = run("export", "builtin", tmp_path / "out", "--dense", "--int8")
    assert (status, "--int8 is for --onnx" in printed) == (2, True)
