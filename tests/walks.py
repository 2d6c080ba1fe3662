"""Walks: calibrations seen from outside, and sequential ones carried out with cuts that do not depend on moments."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.calibration.moments import BlockCalibration
from eckart.calibration.sequential import BlockPass, Order, PassReport, SequentialCalibration
from eckart.calibration.streams import Sample
from eckart.data.pairs import is_encoder_decoder
from eckart.data.tokens import Tokens
from eckart.lowrank import InputMoments, Method, build_method, factor
from eckart.models.sites import Site, blocks_of, replace_module
from eckart.models.units import units_of
from eckart.support.progress import Track
from tiny import relative, site_inputs, tiny_pairs, tiny_tokens

PLAIN = build_method("asvd-i")
ANCHORED = PLAIN.anchored(0.1)
METHOD_OF: dict[Order, Method] = {"one-shot": PLAIN, "sequential": PLAIN, "anchored": ANCHORED}
T = TypeVar("T")


def pairs_of(seed: int = 0) -> tuple[Tokens, Tokens]:
    """The same for an encoder-decoder; what is held out has other lengths of source and target."""
    return tiny_pairs(3, 12, 8, padded=True, seed=seed), tiny_pairs(2, 7, 9, padded=True, seed=seed + 10)


def tokens_of(seed: int = 0) -> tuple[Tokens, Tokens]:
    """Calibration samples and some to hold out, of another length, both padded."""
    return tiny_tokens(3, 12, padded=True, seed=seed), tiny_tokens(2, 9, padded=True, seed=seed + 10)


def cut(model: PreTrainedModel, sites: Sequence[Site], rank: int = 5, *, joint: bool = False) -> None:
    """Replace the sites by plain SVD's factors, whatever their moments are: a loss that every later site sees.

    Args:
        joint: as one stack, pivoted.
    """
    for unit in units_of(sites, {site.input_group for site in sites} if joint else ()):
        factors = factor(unit.weight(model)).cut(rank)
        for name, module in unit.modules(model, factors, "pivoted" if joint else "plain").items():
            replace_module(model, name, module)


def members_of(part: BlockCalibration, sites: Iterable[Site]) -> list[Site]:
    """The sites whose moments a part has."""
    return [site for site in sites if site.input_group in part.inputs]


def walk(model: PreTrainedModel, calibration: SequentialCalibration) -> list[BlockCalibration]:
    """All parts; every site is cut as soon as its part came."""
    parts = []
    for part in calibration:
        cut(model, members_of(part, calibration.sites))
        parts.append(part)
    return parts


def tensors_of(parts: Iterable[BlockCalibration], *, held_out: bool = False) -> dict[str, Tensor]:
    """Every number of a calibration, flat; or of what was held out."""
    numbers: dict[str, Tensor] = {}
    for part in parts:
        for group, moments in (part.held_out if held_out else part.inputs).items():
            numbers[f"{group} count"] = torch.tensor(moments.count)
            numbers.update({f"{group} {name}": value for name, value in moments.sums.items()})
        for site, gradients in ({} if held_out else part.gradients).items():
            numbers[f"{site} examples"] = torch.tensor(gradients.examples)
            numbers.update({f"{site} {name}": value for name, value in gradients.sums.items()})
    return numbers


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def alike(first: Iterable[BlockCalibration], second: Iterable[BlockCalibration]) -> bool:
    """Whether two calibrations have the same numbers, bit for bit."""
    return same(tensors_of(first), tensors_of(second))


class Noted:
    """A track that records the descriptions, and fails on one of them."""

    def __init__(self, fail: str = "") -> None:
        self.fail, self.seen = fail, []  # type: ignore[var-annotated]

    def __call__(self, items: Iterable[T], description: str, total: int) -> Iterable[T]:
        self.seen.append(description)
        for number, item in enumerate(items):
            if description == self.fail and number:
                raise KeyboardInterrupt(description)
            yield item


def refuse_to_run(*_: object) -> None:
    raise AssertionError("the model ran")


def assert_are_of(moments: InputMoments, xh: Tensor, x: Tensor | None) -> None:
    """The moments are of the rows xh, and of x as well where there is a reference."""
    xh = xh.double()
    assert moments.count == len(xh)
    assert relative(moments.mean, xh.mean(0)) < 1e-5
    assert relative(moments.abs_mean, xh.abs().mean(0)) < 5e-6
    assert relative(moments.second_moment, xh.T @ xh / len(xh)) < 5e-6
    assert (x is not None) == (moments.keeps("cross_covariance") is not None)
    if x is not None:
        x = x.double()
        assert relative(moments.reference_mean, x.mean(0)) < 1e-5
        assert relative(moments.reference_second_moment, x.T @ x / len(x)) < 5e-6
        assert relative(moments.cross_moment, x.T @ xh / len(x)) < 5e-6


class Nudge:
    """A pass that changes every weight of the block a little, so that what comes after it shows."""

    def __call__(
        self, number: int, block: nn.Module, samples: Sequence[Sample], held_out: Sequence[Sample], track: Track
    ) -> PassReport | None:
        for parameter in block.parameters():
            parameter.mul_(1.1)
        return PassReport("nudge", f"block {number}", 1.0, 0.5, True)


class Collect:
    """A pass that keeps its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, nn.Module, list[Sample], list[Sample]]] = []

    def __call__(
        self, number: int, block: nn.Module, samples: Sequence[Sample], held_out: Sequence[Sample], track: Track
    ) -> PassReport | None:
        self.calls.append((number, block, list(samples), list(held_out)))
        return PassReport("collect", f"block {number}", 1.0, 1.0, False) if number != 1 else None


@torch.no_grad()
def hidden_states(model: PreTrainedModel, tokens: Tokens) -> list[list[Tensor]]:
    """Per sample and per block, the block's output, (tokens, width); samples without their padding."""
    seen: list[list[Tensor]] = []
    handles = [
        block.register_forward_hook(
            lambda _module, _args, output: seen[-1].append((output[0] if isinstance(output, tuple) else output)[0])
        )
        for block in blocks_of(model)
    ]
    for ids, mask in zip(tokens.ids, tokens.mask, strict=True):
        seen.append([])
        model(input_ids=ids[mask][None])
    for handle in handles:
        handle.remove()
    return seen


def assert_walks_as_hooks_see_it(
    model: PreTrainedModel,
    sites: Sequence[Site],
    order: Order,
    *,
    passes: Sequence[BlockPass] = (),
    joint: bool = False,
) -> list[str]:
    """The law. Returns the groups in the order in which they came.

    Args:
        joint: the sites of a group get pivoted factors that share the right one.
    """
    dense = copy.deepcopy(model)
    texts = pairs_of() if is_encoder_decoder(model) else tokens_of()
    calibration = SequentialCalibration(
        model, texts[0], METHOD_OF[order], order=order, held_out=texts[1], sites=sites, passes=passes, batch_size=2
    )
    came = []
    with torch.no_grad():
        for part in calibration:
            ((group, moments),) = part.inputs.items()
            members = members_of(part, sites)
            assert {site.block for site in members} == {part.block}
            for text, collected in zip(texts, (moments, part.held_out[group]), strict=True):
                xh = site_inputs(model, text, members)
                x = site_inputs(dense, text, members) if order == "anchored" else {}
                for site in members:
                    assert_are_of(collected, xh[site.name], x.get(site.name))
            cut(model, members, joint=joint)
            came.append(group)
    return came


def traces(model: PreTrainedModel) -> list[str]:
    """Hooks and forwards that a walk may have forgotten on the model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooked = [
        f"{name}.{attribute}" for name, m in model.named_modules() for attribute in hooks if getattr(m, attribute)
    ]
    return hooked + [f"{name}.forward" for name, m in model.named_modules() if "forward" in vars(m)]
