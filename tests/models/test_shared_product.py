"""Shared products: one computation for each input, and never a result that a call of its own would not have given."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from eckart.lowrank import Factors, Layout, pivot, split
from eckart.lowrank.pivoting import LAYOUTS
from eckart.models.linear import LowRankLinear
from eckart.models.shared_product import SharedProduct

CPU = torch.device("cpu")


class Group(nn.Module):
    """Three linears that read one tensor, as q, k and v do, and how often their right factor was computed."""

    def __init__(self, layout: Layout = "plain") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((12, 4), (4, 6)))
        whole = pivot(Factors(left, right)) if layout == "pivoted" else Factors(left, right)
        self.computed = 0
        self.members = nn.ModuleList()
        for member in split(whole, (6, 3, 3)):
            lender = self.members[0] if len(self.members) else None
            self.members.append(
                LowRankLinear.from_factors(member, None, device=CPU, dtype=torch.float32, right_of=lender)
            )
        self.members[0].right.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.computed += 1

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        return torch.cat([member(h) for member in self.members], -1)

    def alone(self, x: Tensor) -> Tensor:
        """The same from the members' matrices."""
        return torch.cat([1.5 * x @ member.dense().T for member in self.members], -1)

    @property
    def is_empty(self) -> bool:
        return self.members[0].product.is_empty


@pytest.fixture(params=LAYOUTS)
def group(request: pytest.FixtureRequest) -> Group:
    return Group(request.param)


def rows(seed: int = 0) -> Tensor:
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(seed))


MODES: dict[str, Callable[[], object]] = {
    "gradients": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
def test_is_computed_once_for_each_input_and_then_forgotten(group: Group, mode: str) -> None:
    for number in range(3):
        with MODES[mode]():
            y = group(rows(number))
        assert group.computed == number + 1
        assert group.is_empty
        tolerance = 0.1 if mode == "autocast" else 1e-5
        torch.testing.assert_close(y.float(), group.alone(rows(number)), rtol=tolerance, atol=tolerance)


def test_any_order_will_do(group: Group) -> None:
    x = rows()
    for member in reversed(group.members):
        torch.testing.assert_close(member(x), x @ member.dense().T)
    assert group.computed == 1
    assert group.is_empty


def test_a_linear_of_its_own_holds_nothing() -> None:
    module = LowRankLinear(6, 3, 2, bias=False)
    x = rows()
    torch.testing.assert_close(module(x), module(x))
    assert module.product.is_empty


def test_gradients_are_those_of_the_members_matrices(group: Group) -> None:
    x = rows().requires_grad_()
    group(x).square().sum().backward()
    assert group.computed == 1
    gradients = {name: parameter.grad for name, parameter in group.named_parameters()}
    into_x, x.grad = x.grad, None
    group.zero_grad()
    parts = [
        (p := nn.functional.linear(1.5 * x, member.right.weight), member.left(p), member.order)
        for member in group.members
    ]
    y = [others if order is None else torch.cat([p, others], -1)[..., order] for p, others, order in parts]
    torch.cat(y, -1).square().sum().backward()
    torch.testing.assert_close(into_x, x.grad, rtol=1e-4, atol=1e-4)
    for name, parameter in group.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4)


# What is not read by everybody


def test_dies_with_its_input(group: Group) -> None:
    with torch.no_grad():
        x, products = rows(), []
        group.members[0].left.register_forward_pre_hook(lambda _module, args: products.append(weakref.ref(args[0])))
        group.members[0](x)
        assert not group.is_empty
        del x
        gc.collect()
    assert group.is_empty
    assert products[0]() is None


def test_is_let_go_after_a_backward_pass(group: Group) -> None:
    """Each member's own backward pass frees what its product was made of; another member needs one of its own."""
    x = rows().requires_grad_()
    for member in group.members:
        member(x).sum().backward()
        assert group.is_empty
    assert group.computed == 3


def test_a_member_that_asks_twice_computes_anew(group: Group) -> None:
    x, first = rows(), group.members[0]
    first(x)
    first(x)
    assert group.computed == 2


def change_weight(group: Group, x: Tensor) -> None:
    with torch.no_grad():
        group.members[0].right.weight.mul_(2)


def step(group: Group, x: Tensor) -> None:
    group.members[0].right.weight.grad = torch.ones_like(group.members[0].right.weight)
    torch.optim.SGD(group.parameters(), lr=0.5).step()


def load(group: Group, x: Tensor) -> None:
    group.load_state_dict({name: value * 3 for name, value in group.state_dict().items() if value.is_floating_point()},
                          strict=False)  # fmt: skip


def replace_weight(group: Group, x: Tensor) -> None:
    group.members[0].right.weight = nn.Parameter(torch.ones_like(group.members[0].right.weight))


def replace_right(group: Group, x: Tensor) -> None:
    group.members[0].right = nn.Sequential(group.members[0].right, nn.Tanh())


def change_input(group: Group, x: Tensor) -> None:
    with torch.no_grad():
        x.add_(1)


def freeze(group: Group, x: Tensor) -> None:
    group.members[0].right.requires_grad_(False)


def follow_input(group: Group, x: Tensor) -> None:
    x.requires_grad_()


@pytest.mark.parametrize(
    "change",
    [change_weight, step, load, replace_weight, replace_right, change_input, freeze, follow_input],
    ids=lambda change: change.__name__,
)
def test_never_gives_a_stale_product(group: Group, change: Callable[[Group, Tensor], None]) -> None:
    """Between two members' calls on the same tensor."""
    x = rows()
    first, second = group.members[0], group.members[1]
    first(x)
    change(group, x)
    p = group.members[0].right(x)
    y = second(x)
    expected = second.left(p)
    if second.order is not None:
        expected = torch.cat([p, expected], -1)[..., second.order]
    assert torch.equal(y, expected)
    assert y.requires_grad == expected.requires_grad


@pytest.mark.parametrize("first_mode", MODES)
@pytest.mark.parametrize("second_mode", MODES)
def test_a_product_is_of_its_mode(group: Group, first_mode: str, second_mode: str) -> None:
    x = rows()
    with MODES[first_mode]():
        group.members[0](x)
    with MODES[second_mode]():
        y = group.members[1](x)
    assert y.requires_grad == (second_mode in {"gradients", "autocast"})
    assert (y.dtype == torch.bfloat16) == (second_mode == "autocast")
    assert group.computed == 1 + (first_mode != second_mode)
    if y.requires_grad:
        y.float().sum().backward()
        assert group.members[0].right.weight.grad.abs().sum() > 0


def test_copies_and_pickles_carry_no_product(group: Group) -> None:
    x = rows()
    group.members[0](x)
    assert not group.is_empty
    product = group.members[0].product
    for other in (copy.deepcopy(product), copy.copy(product), pickle.loads(pickle.dumps(product))):
        assert isinstance(other, SharedProduct)
        assert other.readers == 3
        assert other.is_empty


# Under torch's transformations


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(group: Group, reentrant: bool) -> None:
    gradients = []
    for how in (group, lambda x: checkpoint(group, x, use_reentrant=reentrant)):
        group.zero_grad()
        x = rows().requires_grad_()
        how(x).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in group.parameters())])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    del x
    assert group.is_empty


def test_functional_calls_and_per_sample_gradients(group: Group) -> None:
    parameters, x = {n: p.detach() for n, p in group.named_parameters()}, rows()

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(group, parameters, (x,)).square().sum()

    together = torch.func.grad(loss)(parameters, x)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    group(x).square().sum().backward()
    for name, parameter in group.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(each[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-3)


def test_tracing_and_exporting_keep_the_numbers(group: Group) -> None:
    x = rows()
    expected = group(x)
    torch.testing.assert_close(torch.jit.trace(group, (rows(1),))(x), expected)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            torch.testing.assert_close(torch.export.export(group, (rows(1),)).module()(x), expected)
    assert group.is_empty


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("mode", ["gradients", "no_grad"])
def test_compiled_code_computes_it_once(group: Group, mode: str, broken: bool) -> None:
    """In one graph, or over a graph break between the members. With gradients, the compiler merges."""
    products: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        products.append(sum("linear" in str(node.target) for node in graph.graph.nodes if node.op == "call_function"))
        return graph.forward

    def run(x: Tensor) -> Tensor:
        h = x * 1.5
        first = group.members[0](h)
        if broken:
            torch._dynamo.graph_break()
        return torch.cat([first, *(member(h) for member in group.members[1:])], -1)

    group.members[0].right._forward_hooks.clear()  # a hook that counts would break the graph
    torch.compiler.reset()
    compiled = torch.compile(run, backend=backend, fullgraph=not broken)
    with MODES[mode]():
        for number in range(3):
            torch.testing.assert_close(compiled(rows(number)), group(rows(number)))
    assert group.is_empty
    assert len(products) == 1 + broken
    assert sum(products) == (4 if mode == "no_grad" else 6)
