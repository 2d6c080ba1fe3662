"""The cache of moments: what was computed is read, what is of anything else is not, and a killed run goes on."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

import eckart.calibration.moments
from eckart.allocation import plan
from eckart.calibration.cache import CHECKSUM, is_sound, read_gradients, write_gradients
from eckart.calibration.moments import Calibration, calibrate, calibrate_by_block, calibration_digest, gather_gradients
from eckart.compression.replace import compress
from eckart.data.tokens import Tokens
from eckart.lowrank import GradientMoments, Method, build_method
from eckart.models.sites import blocks_of, find_sites
from tiny import BLOCKS, ENCODERS, HEADS, relative, tiny_model, tiny_tokens
from walks import Noted, alike, refuse_to_run

METHOD = build_method("asvd-i")


def digest(model: PreTrainedModel, tokens: Tokens, method: Method = METHOD, sites: slice = slice(None)) -> str:
    return calibration_digest(model, tokens, method.needs, find_sites(model)[sites])


def one_weight(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.lm_head.weight[5, 7] += 1e-3


def one_norm(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[2].input_layernorm.weight[0] *= 1.001


def one_option(model: PreTrainedModel) -> None:
    model.config.rms_norm_eps *= 2


def one_type(model: PreTrainedModel) -> None:
    model.bfloat16()


@pytest.mark.parametrize("change", [one_weight, one_norm, one_option, one_type])
def test_the_digest_is_of_the_model(change: Callable[[PreTrainedModel], None]) -> None:
    model = tiny_model("llama")
    before = digest(model, tiny_tokens())
    change(model)
    assert digest(model, tiny_tokens()) != before


def test_the_digest_is_of_the_tokens() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens()
    before = digest(model, tokens)
    ids, mask = tokens.ids.clone(), tokens.mask.clone()
    ids[0, 0] += 1
    mask[0, -1] = False
    others = [
        dataclasses.replace(tokens, ids=ids),
        dataclasses.replace(tokens, mask=mask),
        dataclasses.replace(tokens, mask_token=5),
        dataclasses.replace(tokens, ids=tokens.ids.view(12, 8), mask=tokens.mask.view(12, 8)),
        dataclasses.replace(tokens, ids=tokens.ids[:5], mask=tokens.mask[:5]),
        dataclasses.replace(tokens, ids=tokens.ids.flip(0)),
    ]
    assert len({before, *(digest(model, other) for other in others)}) == 1 + len(others)


def test_the_digest_is_of_what_is_collected() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens()
    digests = [digest(model, tokens, build_method(name)) for name in ("asvd-i", "asvd-0", "fwsvd")]
    digests += [digest(model, tokens, sites=slice(7)), digest(model, tokens, sites=slice(7, 14))]
    assert len(set(digests)) == len(digests)


def test_the_digest_is_not_of_names(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "a")
    first = HEADS["causal"].from_pretrained(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    second = HEADS["causal"].from_pretrained(tmp_path / "b")
    tokens = tiny_tokens()
    renamed = dataclasses.replace(tokens, source={"corpus": "another name"})
    assert digest(first, tokens) == digest(second, renamed)
    # and methods with the same needs share their moments
    assert digest(first, tokens, build_method("nsvd-i")) == digest(first, tokens, build_method("sfsd"))


@pytest.mark.parametrize("method", ["asvd-i", "fwsvd"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_second_run_computes_nothing(model_type: str, method: str, tmp_path: Path) -> None:
    built, tokens = build_method(method), tiny_tokens()
    plain, first, second = (tiny_model(model_type) for _ in range(3))
    compress(plain, built, plan(plain, 0.5), calibrate(plain, tokens, built))
    compress(first, built, plan(first, 0.5), calibrate_by_block(first, tokens, built, cache=tmp_path))
    (folder,) = tmp_path.iterdir()
    assert folder.name == digest(tiny_model(model_type), tokens, built)
    second.base_model.register_forward_pre_hook(refuse_to_run)
    blocks_of(second)[0].register_forward_pre_hook(refuse_to_run)
    compress(second, built, plan(second, 0.5), calibrate_by_block(second, tokens, built, cache=tmp_path))
    for model in (first, second):
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert not list(folder.glob("*.partial"))


def test_another_model_or_text_reuses_nothing(tmp_path: Path) -> None:
    for model, tokens in (
        (tiny_model("llama"), tiny_tokens()),
        (tiny_model("llama", seed=1), tiny_tokens()),
        (tiny_model("llama"), tiny_tokens(seed=1)),
    ):
        blocks = list(calibrate_by_block(model, tokens, METHOD, cache=tmp_path))
        assert alike(blocks, calibrate(model, tokens, METHOD))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_method_without_needs_writes_nothing(tmp_path: Path) -> None:
    list(calibrate_by_block(tiny_model("llama"), tiny_tokens(), build_method("svd"), cache=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def killed(tmp_path: Path) -> tuple[Path, Calibration]:
    """A cache in which a run was stopped in the middle of block 2, and what it would have given."""
    model, tokens = tiny_model("llama"), tiny_tokens()
    with pytest.raises(KeyboardInterrupt):
        list(calibrate_by_block(model, tokens, METHOD, cache=tmp_path, batch_size=2, track=Noted("block 2: moments")))
    (folder,) = tmp_path.iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["block-000.safetensors", "block-001.safetensors"]
    return tmp_path, calibrate(model, tokens, METHOD, batch_size=2)


def test_a_killed_run_goes_on_where_it_was(killed: tuple[Path, Calibration]) -> None:
    cache, expected = killed
    (folder,) = cache.iterdir()
    times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    noted = Noted()
    model = tiny_model("llama")
    blocks = list(calibrate_by_block(model, tiny_tokens(), METHOD, cache=cache, batch_size=2, track=noted))
    assert alike(blocks, expected)
    assert [step for step in noted.seen if step.endswith("moments")] == ["block 2: moments"]
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert len(list(folder.iterdir())) == BLOCKS


def test_a_killed_compression_goes_on_with_the_dense_inputs(killed: tuple[Path, Calibration]) -> None:
    # Blocks that were read from the cache are replaced while later ones are still to be computed: those must
    # not see the compressed ones.
    cache, expected = killed
    whole, resumed = tiny_model("llama"), tiny_model("llama")
    compress(whole, METHOD, plan(whole, 0.4), expected)
    walk = calibrate_by_block(resumed, tiny_tokens(), METHOD, cache=cache, batch_size=2)
    compress(resumed, METHOD, plan(resumed, 0.4), walk)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    again = list(calibrate_by_block(tiny_model("llama"), tiny_tokens(), METHOD, cache=cache))
    assert alike(again, expected)


def test_a_block_in_the_middle_is_computed_alone(tmp_path: Path) -> None:
    tokens = tiny_tokens()
    expected = list(calibrate_by_block(tiny_model("llama"), tokens, METHOD, cache=tmp_path))
    (folder,) = tmp_path.iterdir()
    (folder / "block-001.safetensors").unlink()
    model, noted = tiny_model("llama"), Noted()
    compress(model, METHOD, plan(model, 0.4), calibrate_by_block(model, tokens, METHOD, cache=tmp_path, track=noted))
    assert [step for step in noted.seen if step.endswith(("moments", "forward"))] == [
        "block 0: forward",
        "block 1: moments",
    ]
    assert alike(calibrate_by_block(tiny_model("llama"), tokens, METHOD, cache=tmp_path), expected)


@pytest.mark.parametrize("cut", [100, 1000, 10**9])
def test_a_truncated_file_is_not_read(killed: tuple[Path, Calibration], cut: int) -> None:
    cache, expected = killed
    (folder,) = cache.iterdir()
    file = folder / "block-001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    with pytest.warns(UserWarning, match="is damaged"):
        blocks = list(calibrate_by_block(tiny_model("llama"), tiny_tokens(), METHOD, cache=cache, batch_size=2))
    assert alike(blocks, expected)
    assert len(file.read_bytes()) == len(whole)


def test_a_partial_file_is_not_read(killed: tuple[Path, Calibration]) -> None:
    cache, expected = killed
    (folder,) = cache.iterdir()
    (folder / "block-001.safetensors").rename(folder / "block-001.1.partial")
    noted = Noted()
    blocks = calibrate_by_block(tiny_model("llama"), tiny_tokens(), METHOD, cache=cache, batch_size=2, track=noted)
    assert alike(blocks, expected)
    assert "block 1: moments" in noted.seen


def test_gradients_are_kept_as_soon_as_they_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eckart.calibration.moments, "IN_ONE_PASS", -1)
    method = dataclasses.replace(METHOD, needs=frozenset({"second_moment", "fisher_in"}))
    model, tokens = tiny_model("llama"), tiny_tokens()
    with pytest.raises(KeyboardInterrupt):
        list(calibrate_by_block(model, tokens, method, cache=tmp_path, batch_size=2, track=Noted("block 0: moments")))
    noted = Noted()
    blocks = list(calibrate_by_block(model, tokens, method, cache=tmp_path, batch_size=2, track=noted))
    assert "gradients" not in noted.seen
    assert alike(blocks, calibrate(model, tokens, method, batch_size=2))


def test_copies_of_a_model_share_a_cache(tmp_path: Path) -> None:
    model = tiny_model("bert")
    assert "bert" in ENCODERS
    list(calibrate_by_block(model, tiny_tokens(), METHOD, cache=tmp_path))
    list(calibrate_by_block(copy.deepcopy(model), tiny_tokens(), METHOD, cache=tmp_path))
    assert len(list(tmp_path.iterdir())) == 1


# Gradients have a folder of their own


KFAC = build_method("kfac", {"weighted": False})


def test_inputs_and_gradients_are_kept_apart(tmp_path: Path) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(3, 10)
    list(calibrate_by_block(model, tokens, KFAC, cache=tmp_path))
    inputs, gradients = (
        calibration_digest(model, tokens, frozenset({need}), find_sites(model))
        for need in ("second_moment", "gradient_covariance")
    )
    assert {folder.name for folder in tmp_path.iterdir()} == {inputs, gradients}
    assert [file.name for file in (tmp_path / gradients).iterdir()] == ["gradients.safetensors"]
    assert len(list((tmp_path / inputs).iterdir())) == BLOCKS


def test_moments_of_weighed_tokens_are_no_other_method_s(tmp_path: Path) -> None:
    """Nor those of other gradients: of fewer of the linears that read an input."""
    model, tokens, method = tiny_model("llama"), tiny_tokens(3, 10), build_method("kfac", {"weighted": True})
    sites = [site for site in find_sites(model) if "q_proj" in site.name]
    gradients = gather_gradients(model, tokens, method)
    few = {name: moments for name, moments in gradients.items() if "q_proj" in name}
    calibrations = [
        list(calibrate_by_block(model, tokens, each, sites=sites, gradients=known, cache=tmp_path))
        for each, known in ((method, gradients), (method, few), (KFAC, gradients))
    ]
    assert len(list(tmp_path.iterdir())) == 3
    first, second, third = ({**blocks[0].inputs}.popitem()[1].second_moment for blocks in calibrations)
    assert relative(first, second) > 1e-3 < relative(first, third)
    again = list(calibrate_by_block(model, tokens, method, sites=sites, gradients=gradients, cache=tmp_path))
    assert alike(again, calibrations[0])


def test_methods_share_what_they_have_in_common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(3, 10)
    walked = list(calibrate_by_block(model, tokens, METHOD, cache=tmp_path))
    gathered = gather_gradients(model, tokens, KFAC.anchored(0.1), cache=tmp_path)
    names = {block.block: [s.name for s in find_sites(model) if s.block == block.block] for block in walked}
    expected = [
        dataclasses.replace(block, gradients={name: gathered[name] for name in names[block.block]}) for block in walked
    ]
    monkeypatch.setattr(eckart.calibration.moments, "collect_gradients", refuse_to_run)
    blocks_of(model)[0].register_forward_pre_hook(refuse_to_run)
    assert alike(calibrate_by_block(model, tokens, KFAC, cache=tmp_path), expected)
    assert gathered.keys() == {site.name for site in find_sites(model)}


def test_gradients_that_are_there_are_not_gathered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(3, 10)
    expected, gradients = calibrate(model, tokens, KFAC), gather_gradients(model, tokens, KFAC)
    monkeypatch.setattr(eckart.calibration.moments, "gather_gradients", refuse_to_run)
    assert alike(calibrate_by_block(model, tokens, KFAC, gradients=gradients), expected)
    # only those of the sites that are asked for
    sites = [site for site in find_sites(model) if site.part == "mlp"]
    blocks = list(calibrate_by_block(model, tokens, KFAC, sites=sites, gradients=gradients, cache=tmp_path))
    assert {name for block in blocks for name in block.gradients} == {site.name for site in sites}
    assert not list(tmp_path.rglob("gradients*"))


def test_a_method_without_gradients_gathers_none(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.base_model.register_forward_pre_hook(refuse_to_run)
    assert gather_gradients(model, tiny_tokens(), METHOD, cache=tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [100, 10**9])
def test_truncated_gradients_are_gathered_again(tmp_path: Path, cut: int) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(3, 10)
    expected = list(calibrate_by_block(model, tokens, KFAC, cache=tmp_path))
    (file,) = tmp_path.rglob("gradients.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    with pytest.warns(UserWarning, match="is damaged"):
        assert alike(calibrate_by_block(model, tokens, KFAC, cache=tmp_path), expected)
    assert len(file.read_bytes()) == len(whole)


# Integrity: what was written is what is read


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_every_flipped_bit_is_caught(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("flips") / "gradients.safetensors"
    needs = frozenset({"fisher_in", "fisher_out"})
    sums = {f"layers.{number}": GradientMoments(3, 2, needs) for number in range(2)}
    write_gradients(file, sums, made_by={"steps": 3})
    assert read_gradients(file).keys() == {"layers.0", "layers.1"}
    flip(file, data.draw(st.integers(0, 8 * file.stat().st_size - 1)))
    with pytest.raises(ValueError, match=r"gradients\.safetensors (is damaged|holds no gradient statistics)"):
        read_gradients(file)
    with pytest.warns(UserWarning, match=r"gradients\.safetensors is damaged: .* is computed again"):
        assert not is_sound(file)
    assert not file.exists()
    assert file.with_name("gradients.safetensors.damaged").exists()


def test_a_damaged_block_is_computed_again(killed: tuple[Path, Calibration]) -> None:
    cache, expected = killed
    (folder,) = cache.iterdir()
    flip(folder / "block-001.safetensors", 8 * ((folder / "block-001.safetensors").stat().st_size - 100))
    with pytest.warns(UserWarning, match=r"block-001\.safetensors is damaged"):
        blocks = list(calibrate_by_block(tiny_model("llama"), tiny_tokens(), METHOD, cache=cache, batch_size=2))
    assert alike(blocks, expected)


def test_a_file_without_a_checksum_is_believed(tmp_path: Path) -> None:
    file = tmp_path / "gradients.safetensors"
    write_gradients(file, {"a": GradientMoments(3, 2, frozenset({"fisher_in"}))})
    with safe_open(file, framework="pt") as opened:
        metadata = {key: value for key, value in opened.metadata().items() if key != CHECKSUM}
        tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
    save_file(tensors, file, metadata=metadata)
    assert is_sound(file)
    assert read_gradients(file).keys() == {"a"}
