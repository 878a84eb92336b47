"""A frozen map with a pair beside it as one node of autograd: the values and gradients of the plain operations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lrcompile
from lrcompile.errors import AdapterError
from lrcompile.lowered import eager

METHODS = ("lora", "dora")


def adapted(
    method: str = "lora", *, inside: int = 7, out: int = 5, rank: int = 3, bias: bool = True, conv: bool = False,
    dtype: torch.dtype = torch.float64, **fields: Any,
) -> nn.Sequential:  # fmt: skip
    torch.manual_seed(0)
    layer = Conv1D(out, inside) if conv else nn.Linear(inside, out, bias=bias)
    model = nn.Sequential(layer).to(dtype)
    lrcompile.apply(model, lrcompile.spec(method, rank=rank, alpha=5, **fields))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model.train()


def apart(model: nn.Sequential, x: Tensor) -> Tensor:
    """By the adapter's own forward on what the base returns: plain operations of the dialect, nothing in one node."""
    (host,) = model
    (adapter,) = host.lrcompile_adapters["weight"].live  # type: ignore[union-attr, index]
    W: Any = host.weight
    y = F.linear(x, W.t() if isinstance(host, Conv1D) else W, host.bias)  # type: ignore[arg-type]
    y = torch.ops.lrcompile.lora.default(y, x, *adapter.factors(), adapter.scale, 0.0)
    if not hasattr(adapter, "m"):
        return y
    g = adapter.gain(host)
    return y + (g - 1).to(y.dtype) * (y if host.bias is None else y - host.bias)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def nodes(y: Tensor) -> set[str]:
    """The names of the nodes behind y."""
    assert y.grad_fn is not None
    found, left = set[str](), [y.grad_fn]
    while left:
        node = left.pop()
        found.add(node.name())
        left += [after for after, _ in node.next_functions if after is not None]
    return found


def in_one(y: Tensor) -> bool:
    return "_BesideBackward" in nodes(y)


LEADS = st.sampled_from([(), (1,), (6,), (2, 3), (0,), (2, 1, 4)])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(METHODS), LEADS, st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.booleans(),
    st.booleans(), st.sets(st.sampled_from(["A", "B", "m"]), max_size=2), st.booleans(),
)  # fmt: skip
def test_values_and_gradients_are_those_of_the_plain_operations(
    method, lead, inside, out, rank, bias, conv, frozen, wants_x
):
    model = adapted(method, inside=inside, out=out, rank=min(rank, inside, out), bias=bias, conv=conv)
    for name, p in model.named_parameters():
        if name.rpartition(".")[2] in frozen:
            p.requires_grad_(False)
    x = torch.randn(*lead, inside, dtype=torch.float64, requires_grad=wants_x)
    wanted = [*trained(model), *([x] if wants_x else [])]
    y, expected = model(x), apart(model, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    if wanted:
        assert in_one(y)
        upstream = torch.randn_like(y)
        ours = torch.autograd.grad(y, wanted, upstream)
        theirs = torch.autograd.grad(expected, wanted, upstream)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_maps_are_as_near_to_float64_as_the_plain_operations(method, dtype):
    model = adapted(method, inside=48, out=40, dtype=dtype)
    x = torch.randn(32, 48, dtype=dtype, requires_grad=True)
    upstream = torch.randn(32, 40, dtype=dtype)
    exact = copy.deepcopy(model).double()
    wide = x.detach().double().requires_grad_()
    y = apart(exact, wide)
    true = [y, *torch.autograd.grad(y, [wide, *trained(exact)], upstream.double())]
    found = []
    for call in (model, lambda x: apart(model, x)):
        y = call(x)
        found.append([y, *torch.autograd.grad(y, [x, *trained(model)], upstream)])
    assert [each.dtype for each in found[0]] == [each.dtype for each in found[1]]
    for ours, theirs, exactly in zip(*found, true, strict=True):
        size = torch.finfo(dtype).eps * exactly.abs().max()
        assert (ours - exactly).abs().max() <= 2 * (theirs - exactly).abs().max() + size


@pytest.mark.parametrize("shape", [(6, 7), (2, 3, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_of_zeros_leaves_the_bits_of_the_frozen_base(shape, dtype):
    model = adapted(dtype=dtype, inside=7)
    with torch.no_grad():
        model[0].lrcompile_adapters["weight"].live[0].B.zero_()  # type: ignore[union-attr, index]
    plain = nn.Linear(7, 5).to(dtype).requires_grad_(False)
    plain.load_state_dict({"weight": model[0].weight, "bias": model[0].bias})
    for x in (torch.randn(shape, dtype=dtype), torch.randn(*shape[:-1], 14, dtype=dtype)[..., ::2]):
        y = model(x)
        assert in_one(y)
        assert torch.equal(y, plain(x))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_have_gradients(method):
    model = adapted(method)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (x,))

    given = (x, *(p.detach().clone().requires_grad_() for p in trained(model)))
    assert in_one(call(*given))
    if method == "lora":  # DoRA's norm is a constant to autograd, which differences do not know
        assert torch.autograd.gradcheck(call, given)
        assert torch.autograd.gradgradcheck(call, given)
    seconds = []
    for y in (model(x), apart(model, x)):
        first = torch.autograd.grad(y.square().sum(), (x, *trained(model)), create_graph=True)
        squares = torch.stack([each.square().sum() for each in first])
        seconds.append(torch.autograd.grad(squares.sum(), (x, *trained(model))))
    torch.testing.assert_close(*seconds, rtol=1e-9, atol=1e-9)


def test_gradients_of_gradients_beside_a_frozen_A_are_refused_with_advice():
    model = adapted("lora-fa")
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    with pytest.raises(AdapterError, match="train A, or leave out create_graph"):
        torch.autograd.grad(model(x).square().sum(), trained(model), create_graph=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_second_backward_pass_gives_the_same(method):
    model = adapted(method)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    loss = model(x).square().sum()
    first = torch.autograd.grad(loss, (x, *trained(model)), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, (x, *trained(model)))))


@pytest.mark.parametrize("lead", [(4,), (2, 3)])
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_what_follows_may_write_into_the_output(method, conv, lead):
    model = adapted(method, conv=conv)
    x = torch.randn(*lead, 7, dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(F.relu(model(x), inplace=True).sum(), (x, *trained(model)))
    theirs = torch.autograd.grad(F.relu(apart(model, x)).sum(), (x, *trained(model)))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_has_the_same_gradients(method, reentrant):
    model = adapted(method)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    model(x).square().sum().backward()
    plain = [p.grad for p in (x, *trained(model))]
    for p in (x, *trained(model)):
        p.grad = None
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close([p.grad for p in (x, *trained(model))], plain, rtol=0, atol=0)


class Unaware(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def under(context: Callable[[], Any]) -> Callable[[nn.Module, Tensor], Tensor]:
    def call(model: nn.Module, x: Tensor) -> Tensor:
        with context():
            y: Tensor = model(x)
            return y

    return call


def plainly(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model(x)
    return y


def with_dual(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(model(x)).primal


APART: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "dropout": (lambda: adapted(dropout=0.5), plainly),
    "a bias that trains": (lambda: trains(adapted(), "bias"), plainly),
    "a weight that trains": (lambda: trains(adapted(), "weight"), plainly),
    "a scale that trains": (lambda: trains(adapted(), "scale"), plainly),
    "autocast": (adapted, under(lambda: torch.autocast("cpu", torch.bfloat16))),
    "a mode that sees operations": (adapted, under(Unaware)),
    "forward derivatives": (adapted, with_dual),
}


def trains(model: nn.Module, name: str) -> nn.Module:
    host: Any = model[0]  # type: ignore[index]
    (adapter,) = host.lrcompile_adapters["weight"].live
    (adapter.scale if name == "scale" else getattr(host, name)).requires_grad_(True)
    return model


@pytest.mark.parametrize("name", APART)
def test_it_is_left_to_the_plain_operations_where_more_than_numbers_counts(name):
    make, call = APART[name]
    model = make()
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    y = call(model, x)
    assert not in_one(y)
    y.sum().backward()
    assert x.grad is not None
    for p in trained(model):
        assert p.grad is not None


@pytest.mark.parametrize("method", METHODS)
def test_transforms_and_captures_see_plain_operations(method):
    model = adapted(method)
    x = torch.randn(4, 7, dtype=torch.float64)
    expected = model(x)
    each = torch.func.vmap(model)(x)
    torch.testing.assert_close(each, expected)
    traced = torch.jit.trace(model, x, check_trace=False)
    torch.testing.assert_close(traced(x), expected)
    assert "Beside" not in str(traced.inlined_graph)
    program = torch.export.export(model, (x,))
    assert torch.ops.lrcompile.lora.default in [node.target for node in program.graph.nodes]


def test_hooks_of_an_adapter_still_run():
    model = adapted()
    (adapter,) = model[0].lrcompile_adapters["weight"].live  # type: ignore[union-attr, index]
    seen: list[str] = []
    adapter.register_forward_hook(lambda *_: seen.append("after"))
    assert not in_one(model(torch.randn(4, 7, dtype=torch.float64)))
    assert seen == ["after"]


def test_a_second_adapter_acts_beside_the_node_of_the_first():
    model = adapted()
    lrcompile.apply(model, lrcompile.spec("lora", rank=2, alpha=3), name="second")
    lrcompile.activate(model, ["default", "second"])
    with torch.no_grad():
        for p in trained(model):
            p.add_(0.1)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    host: Any = model[0]
    expected = F.linear(x, host.weight, host.bias)
    for each in host.lrcompile_adapters["weight"].live:
        expected = expected + each.scale * (x @ each.A.t()) @ each.B.t()
    y = model(x)
    assert in_one(y)
    torch.testing.assert_close(y, expected)


def test_only_numbers_fit():
    x, W, A, B = torch.randn(4, 7), torch.randn(5, 7), torch.randn(2, 7), torch.randn(5, 2)
    scale = torch.tensor(2.0)
    assert eager.fits(x, W, A, B, scale)
    assert not eager.fits(x.double(), W, A, B, scale)
    assert not eager.fits(x, W, A[None], B[None], scale)
