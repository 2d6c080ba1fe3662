"""Compiling: a low-rank linear and a whole model are one graph each, without a break, and give what they gave."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from eckart.lowrank import Layout
from eckart.lowrank.pivoting import LAYOUTS

from .layouts import KINDS, laid_out
from .test_matmul import SHAPES, expression, group, make_linear, rows

MODES = {"gradients": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_linear_is_one_graph(layout: Layout, bias: bool, mode: str) -> None:
    module = make_linear(layout, torch.float32, bias)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for shape in SHAPES[:4]:
        x = rows(shape, torch.float32)
        with MODES[mode]():
            torch.testing.assert_close(compiled(x), expression(module, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_readers_of_one_right_factor_are_one_graph(layout: Layout, bias: bool, mode: str) -> None:
    modules = torch.nn.ModuleList(group(layout, torch.float32, bias))

    def run(x: torch.Tensor) -> torch.Tensor:
        h = x * 1.5
        return torch.cat([module(h) for module in modules], -1)

    x = rows((2, 5, 12), torch.float32)
    with MODES[mode]():
        outputs = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
        expected = torch.cat([expression(module, 1.5 * x) for module in modules], -1)
        torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_graph_are_those_of_the_expression() -> None:
    module, x = make_linear("pivoted", torch.float64, bias=True), rows((3, 12), torch.float64)
    expression(module, x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    torch.compile(module, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_reads_is_one_graph(kind: str) -> None:
    model = laid_out("llama", kind).eval()
    ids = torch.arange(20).view(2, 10) + 8
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        outputs = compiled(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(outputs, model(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_generates_is_one_graph(kind: str) -> None:
    """A step behind a prompt, with a cache of fixed size, as `generate` compiles it."""
    model = laid_out("llama", kind).eval()
    prompt, token = torch.arange(10).view(2, 5) + 8, torch.tensor([[20], [30]])
    with torch.no_grad():
        expected = model(input_ids=torch.cat((prompt, token), 1), use_cache=False).logits[:, -1:]
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(input_ids=prompt, past_key_values=cache, use_cache=True)
        step = torch.compile(model, backend="aot_eager", fullgraph=True)
        outputs = step(input_ids=token, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
