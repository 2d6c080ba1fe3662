"""Products: every order of operations gives what the plain expression gives, and none where a module must be called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from eckart.lowrank import Factors, Layout, pivot, split
from eckart.lowrank.pivoting import LAYOUTS
from eckart.models import matmul
from eckart.models.linear import LowRankLinear
from eckart.models.matmul import bare_weights, combine, multiply, reorder, spread

CPU = torch.device("cpu")
D_IN, D_OUT, RANK = 12, 20, 6
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# One row, few, many; a prompt, a step of several sequences, and none.
SHAPES = [(D_IN,), (1, 1, D_IN), (2, 1, D_IN), (16, 1, D_IN), (1, 65, D_IN), (3, 50, D_IN), (0, D_IN)]


class Recorder(TorchFunctionMode):
    """Inside, names of torch's functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.called.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices go to torch; here they are treated as large ones."""
    monkeypatch.setattr(matmul, "SMALL", 0)


@pytest.fixture(params=[True, False], ids=["tiles", "no tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor is said to have tiles; the products it then takes run anywhere."""
    monkeypatch.setattr(matmul, "has_tiles", lambda: request.param)
    return bool(request.param)


def factors(seed: int = 0, bias: bool = False) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(D_OUT, RANK), (RANK, D_IN), (D_OUT,)]
    left, right, extra = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return Factors(left, right, extra if bias else None)


def make_linear(layout: Layout, dtype: torch.dtype, bias: bool = False) -> LowRankLinear:
    whole = factors(bias=bias)
    return LowRankLinear.from_factors(
        pivot(whole) if layout == "pivoted" else whole, None, device=CPU, dtype=dtype
    ).requires_grad_(True)


def group(layout: Layout, dtype: torch.dtype, bias: bool = False) -> list[LowRankLinear]:
    """Three that share a right factor."""
    whole = factors(bias=bias)
    modules: list[LowRankLinear] = []
    for member in split(pivot(whole) if layout == "pivoted" else whole, (9, 7, 4)):
        lender = modules[0] if modules else None
        modules.append(LowRankLinear.from_factors(member, None, device=CPU, dtype=dtype, right_of=lender))
    return modules


def rows(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def expression(module: LowRankLinear, x: Tensor) -> Tensor:
    """What the module is: two calls, a reordering, a sum."""
    p = nn.functional.linear(x, module.right.weight)
    y = nn.functional.linear(p, module.left.weight)
    if module.order is not None:
        y = torch.cat((p, y), -1)[..., module.order.long()]
    return y if module.bias is None else y + module.bias


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("tiles")
def test_equals_the_expression(
    layout: Layout, dtype: torch.dtype, bias: bool, shape: tuple[int, ...], mode: Callable[[], torch.no_grad]
) -> None:
    module, x = make_linear(layout, dtype, bias), rows(shape, dtype)
    expected = expression(module, x)
    torch.testing.assert_close(module(x), expected, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
    with mode():
        y = module(x)
    assert y.shape == expected.shape
    assert y.dtype == dtype
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected.detach(), rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("tiles")
def test_readers_of_one_right_factor_equal_the_expression(
    layout: Layout, dtype: torch.dtype, bias: bool, shape: tuple[int, ...]
) -> None:
    modules, x = group(layout, dtype, bias), rows(shape, dtype)
    with torch.no_grad():
        outputs = torch.cat([module(x) for module in modules], -1)
        expected = torch.cat([expression(module, x) for module in modules], -1)
    assert modules[0].product.is_empty
    torch.testing.assert_close(outputs, expected, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "count", "layout", "expected"),
    [
        (torch.bfloat16, 1, "plain", {"mv"}),
        (torch.bfloat16, 1, "pivoted", {"mv", "index_select"}),
        (torch.float32, 1, "plain", {"mv"}),
        (torch.bfloat16, 2, "plain", {"mm"}),
        (torch.bfloat16, 16, "pivoted", {"mm", "index_select"}),
        (torch.bfloat16, 65, "plain", {"linear"}),
        (torch.float32, 15, "plain", {"linear"}),
        (torch.float32, 16, "plain", {"mm"}),
        (torch.float32, 4, "pivoted", {"linear", "index_select"}),
        (torch.float32, 100, "pivoted", {"mm", "index_select"}),
        (torch.bfloat16, 65, "pivoted", {"linear", "index_fill_"}),  # spread
        (torch.float16, 65, "pivoted", {"linear", "mm", "gather"}),
    ],
)
def test_on_tiles_each_has_its_order(
    dtype: torch.dtype, count: int, layout: Layout, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "has_tiles", lambda: True)
    module, x = make_linear(layout, dtype), rows((count, D_IN), dtype)
    with torch.no_grad(), Recorder() as recorder:
        module(x)
    kinds = {"mv", "mm", "linear", "gather", "index_fill_"}
    assert set(recorder.called) & kinds == expected & kinds
    assert expected <= set(recorder.called)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("count", [4, 16, 100])
def test_without_tiles_a_bias_rounds_as_with_gradients(
    count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is added to a rounded product."""
    monkeypatch.setattr(matmul, "has_tiles", lambda: False)
    module, x = make_linear("plain", dtype, bias=True), rows((count, D_IN), dtype)
    with torch.no_grad():
        y = module(x)
    assert torch.equal(y, module(x))


def test_without_tiles_products_are_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "has_tiles", lambda: False)
    for count in (1, 2, 16, 65):
        with torch.no_grad(), Recorder() as recorder:
            make_linear("plain", torch.bfloat16)(rows((count, D_IN), torch.bfloat16))
        assert recorder.called.count("linear") == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_reordering_moves_pivots_as_they_are(dtype: torch.dtype, tiles: bool) -> None:
    module = make_linear("pivoted", dtype)
    for count in (1, 4, 16, 100):
        x = rows((count, D_IN), dtype)
        with torch.no_grad():
            y, p = module(x), multiply(module.right, x)
        places = (module.order < RANK).nonzero()[:, 0]
        assert torch.equal(y[:, places], p[:, module.order[places].long()])


def test_a_spread_left_factor_is_the_plain_one() -> None:
    pivoted = pivot(factors())
    assert torch.equal(spread(pivoted.coefficients, pivoted.order), pivoted.factors().left)
    for member in split(pivoted, (9, 7, 4)):
        assert torch.equal(spread(member.coefficients, member.order), member.factors().left)


def test_a_transposed_product_of_a_module_in_between_will_do() -> None:
    """What adapters give may lie in memory as it likes."""
    left, p = factors().left.float(), rows((8, RANK), torch.float32)
    torch.testing.assert_close(combine(left, p.T.contiguous().T, None, None), p @ left.T)


# Where a module must be called


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("what", ["hook", "early hook", "wrapped forward", "in its place", "bias"])
@pytest.mark.usefixtures("tiles")
def test_what_was_put_around_a_factor_is_called(side: str, what: str) -> None:
    module, x = make_linear("plain", torch.float32), rows((16, D_IN), torch.float32)
    factor, calls = getattr(module, side), []
    if what == "hook":
        factor.register_forward_hook(lambda *_: calls.append(1))
    elif what == "early hook":
        factor.register_forward_pre_hook(lambda *_: calls.append(1))
    elif what == "wrapped forward":
        old = factor.forward
        factor.forward = lambda x: (calls.append(1), old(x))[1]
    elif what == "in its place":
        setattr(module, side, nn.Sequential(factor, nn.Tanh()))
    else:
        factor.bias = nn.Parameter(torch.ones(factor.out_features))
    changed = what in {"in its place", "bias"}
    with torch.no_grad():
        y = module(x)
        p = module.right(x)
        torch.testing.assert_close(y, module.left(p))
        assert torch.allclose(y, expression(make_linear("plain", torch.float32), x), rtol=1e-4, atol=1e-4) != changed
    assert changed or len(calls) == 2


def test_only_a_plain_linear_on_a_processor_is_bare() -> None:
    linear, x = nn.Linear(4, 3, bias=False), torch.ones(2, 4)
    assert bare_weights(x, linear) is None  # gradients
    with torch.no_grad():
        weights = bare_weights(x, linear, linear)
        assert weights is not None
        assert [id(weight) for weight in weights] == [id(linear.weight)] * 2
        assert bare_weights(x, linear, nn.Linear(3, 2)) is None
        assert bare_weights(x.bfloat16(), linear) is None
        assert bare_weights(x, nn.Linear(4, 3)) is None
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            assert bare_weights(x, linear) is None
        finally:
            handle.remove()
        with torch.autocast("cpu", torch.bfloat16):
            assert bare_weights(x, linear) is None
        renormed = nn.utils.weight_norm(nn.Linear(4, 3, bias=False))
        assert bare_weights(x, renormed) is None
        assert bare_weights(x.to("meta"), linear.to("meta")) is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("tiles")
def test_transformed_tensors_are_left_to_torch(layout: Layout) -> None:
    module, x = make_linear(layout, torch.float16), rows((70, D_IN), torch.float16)
    with torch.no_grad():
        expected = expression(module, x)
        torch.testing.assert_close(torch.func.vmap(module)(x), expected, rtol=3e-3, atol=1e-2)
        _, tangent = torch.func.jvp(module, (x,), (x,))
        torch.testing.assert_close(tangent, expected, rtol=3e-3, atol=1e-2)
        with forward_ad.dual_level():
            y = forward_ad.unpack_dual(module(forward_ad.make_dual(x, x)))
            torch.testing.assert_close(y.tangent, expected, rtol=3e-3, atol=1e-2)


def test_nothing_is_kept_of_a_call() -> None:
    module, x = make_linear("pivoted", torch.bfloat16, bias=True), rows((100, D_IN), torch.bfloat16)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        module(x)
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(tree_leaves(vars(module)["_buffers"])) == 2


def test_small_matrices_are_not_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "has_tiles", lambda: True)
    monkeypatch.setattr(matmul, "SMALL", 33)
    with torch.no_grad():
        for d_out, count, called in ((4, 2, "linear"), (5, 2, "mm"), (5, matmul.FEW + 1, "linear")):
            with Recorder() as recorder:
                multiply(nn.Linear(8, d_out, bias=False, dtype=torch.bfloat16), torch.zeros(count, 8).bfloat16())
            assert {"linear", "mm"} & set(recorder.called) == {called}


# The order of outputs


@pytest.mark.parametrize("shape", [(9,), (1, 1, 9), (4, 9), (2, 3, 9), (0, 9)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
def test_reordering_and_its_gradient_are_those_of_brackets(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    order = torch.tensor([3, 8, 0, 5, 1], dtype=torch.int32)  # as of a linear that has not all of the shared pivots
    x, weights = rows(shape, dtype).requires_grad_(), rows((*shape[:-1], 5), dtype)
    expected = x[..., order.long()]
    (gradient,) = torch.autograd.grad(expected, x, weights)
    y = reorder(x, order)
    assert torch.equal(y, expected)
    assert torch.equal(torch.autograd.grad(y, x, weights)[0], gradient)
    with torch.no_grad():
        assert torch.equal(reorder(x, order), expected)
        assert reorder(x.to("meta"), order.to("meta")).shape == expected.shape


@pytest.mark.parametrize("count", [4, 100])
@pytest.mark.parametrize("grad", [True, False], ids=["gradients", "no_grad"])
def test_outputs_in_batches_are_reordered_as_one_matrix(grad: bool, count: int) -> None:
    """Of more than two dimensions, torch's index_select takes several times as long."""
    module, x = make_linear("pivoted", torch.float32), rows((2, count, D_IN), torch.float32)
    shapes = []

    class Watcher(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if getattr(func, "__name__", "") == "index_select":
                shapes.append(args[0].dim())
            return func(*args, **(kwargs or {}))

    with torch.set_grad_enabled(grad), Watcher():
        module(x)
    assert shapes == ([] if grad else [2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_both_products_of_a_prompt_are_written_into_one_memory(dtype: torch.dtype) -> None:
    """Where nobody else reads the first; members of a group copy theirs."""
    x = rows((matmul.FEW + 1, D_IN), dtype)
    for modules, products in ((make_linear("pivoted", dtype),), 2), (group("pivoted", dtype), 3):
        with torch.no_grad(), Recorder() as recorder:
            outputs = [module(x) for module in modules]
        assert recorder.called.count("mm") == products
        assert recorder.called.count("linear") == (len(modules) > 1)  # the shared product
        assert "cat" not in recorder.called
        for module, y in zip(modules, outputs, strict=True):
            torch.testing.assert_close(y, expression(module, x).detach(), rtol=1e-5, atol=1e-5)


def test_a_bias_of_another_type_is_promoted() -> None:
    for layout in LAYOUTS:
        module, x = make_linear(layout, torch.bfloat16, bias=True), rows((3, D_IN), torch.bfloat16)
        module.bias = nn.Parameter(module.bias.detach().float())
        with torch.no_grad():
            assert module(x).dtype == torch.float32
            torch.testing.assert_close(module(x), expression(module, x), rtol=2e-2, atol=8e-2)
