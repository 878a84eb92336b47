"""The dialect ops: composite in eager mode, one node where graphs are captured, plain aten for every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lrcompile.dialect.experts  # noqa: F401 (registers the ops)
from lrcompile.dialect import lora

LORA = torch.ops.lrcompile.lora.default
LOOKUP = torch.ops.lrcompile.lora_embedding.default
COMPOSITE = ["lrcompile::lora", "lrcompile::lora_embedding", "lrcompile::lora_experts"]
BACKENDS = ["CPU", "CUDA", "MPS", "Meta", "AutogradCPU", "AutogradCUDA", "Autograd", "CompositeExplicitAutograd"]


def tensors(lead=(4,), inside=7, out=5, rank=3, dtype=torch.float64, copies: int | None = None, grad=True):
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad)  # noqa: E731
    stack = () if copies is None else (copies,)
    return draw(*stack, *lead, out), draw(*stack, *lead, inside), draw(*stack, rank, inside), draw(*stack, out, rank)


@pytest.mark.parametrize("name", COMPOSITE)
def test_no_backend_kernel_is_registered_which_would_remove_autograd(name):
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(name, "CompositeImplicitAutograd")
    assert not [key for key in BACKENDS if has(name, key)]


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    lead=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    inside=st.integers(1, 9),
    out=st.integers(1, 9),
    rank=st.integers(1, 5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_op_is_the_formula_in_every_shape_and_dtype(lead, inside, out, rank, dtype):
    y, x, A, B = tensors(lead, inside, out, rank, dtype)
    scale = torch.tensor(0.75)
    result = LORA(y, x, A, B, scale)
    true = y.double() + 0.75 * (x.double() @ A.double().T) @ B.double().T
    size = y.double().abs() + 0.75 * (x.double().abs() @ A.double().abs().T) @ B.double().abs().T
    assert result.dtype == dtype
    assert result.shape == (*lead, out)
    # each of the two products and the sum rounds once, and once the code and the scale
    assert bool(((result.double() - true).abs() <= 8 * torch.finfo(dtype).eps * size).all())


def test_gradients_are_the_derivatives():
    y, x, A, B = tensors()
    scale = torch.tensor(0.75)
    assert torch.autograd.gradcheck(lambda *given: LORA(*given, scale), (y, x, A, B), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *given: LORA(*given, scale).square(), (y, x, A, B))
    y, x, A, B = tensors(copies=2)
    assert torch.autograd.gradcheck(lambda *given: LORA(*given, scale), (y, x, A, B))
    y, _, A, B = tensors()
    ids = torch.tensor([1, 6, 1, 0])
    assert torch.autograd.gradcheck(lambda y, A, B: LOOKUP(y, ids, A, B, scale), (y, A, B))


def test_a_stack_of_maps_is_each_map_by_itself():
    y, x, A, B = tensors(copies=3)
    scale = torch.tensor(2.0)
    each = torch.stack([LORA(y[i], x[i], A[i], B[i], scale) for i in range(3)])
    torch.testing.assert_close(LORA(y, x, A, B, scale), each)


def test_a_lookup_is_the_map_of_one_hot_rows():
    y, _, A, B = tensors((2, 3))
    ids = torch.tensor([[0, 6, 3], [1, 1, 2]])
    scale = torch.tensor(0.5)
    torch.testing.assert_close(LOOKUP(y, ids, A, B, scale), LORA(y, F.one_hot(ids, 7).double(), A, B, scale))


def test_the_padding_row_gets_no_gradient():
    y, _, A, B = tensors()
    LOOKUP(y, torch.tensor([1, 2, 2, 3]), A, B, torch.tensor(1.0), 2).sum().backward()
    assert A.grad is not None
    assert not A.grad[:, 2].any()
    assert A.grad[:, 1].any()


def test_the_product_is_formed_in_the_dtype_of_y():
    y, x, A, B = tensors(dtype=torch.float32)
    result = LORA(y.bfloat16(), x.bfloat16(), A, B, torch.tensor(1.0))
    assert result.dtype == torch.bfloat16
    result.float().sum().backward()
    assert A.grad is not None
    assert A.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_pair_that_is_zero_leaves_the_bits_alone(dtype):
    y, x, A, B = tensors((6, 3), dtype=dtype)
    assert torch.equal(LORA(y, x, A, torch.zeros_like(B), torch.tensor(0.75)), y)


class Wide(TorchDispatchMode):
    """The operations that made something `numel` large anew."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.made = numel, list[str]()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() == self.numel and out.data_ptr() not in self.seen:
            self.seen.add(out.data_ptr())
            self.made.append(func._schema.name)
        return out


def test_the_sum_takes_the_place_of_the_product_and_y_keeps_its_numbers():
    y, x, A, B = tensors((6, 3), 7, 5)
    before = y.detach().clone()
    with Wide(y.numel()) as wide:
        result = LORA(y, x, A, B, torch.tensor(0.75))
    assert wide.made == ["aten::mm"]
    result.sum().backward()
    assert torch.equal(y, before)


def test_where_the_sum_is_wider_than_the_product_or_transformed_it_is_made_anew():
    y, x, A, B = (each.detach() for each in tensors())
    scale = torch.tensor(0.75)
    expected = LORA(y, x, A, B, scale)
    for dims in ((0, None), (None, 0), (0, 0)):  # y alone, x alone, both
        given = [each.expand(4, *each.shape) if dim == 0 else each for each, dim in zip((y, x), dims, strict=True)]
        for call in (LORA, lora):  # torch takes the op apart for its loop over a batch, or sees through its body
            out = torch.func.vmap(lambda y, x, call=call: call(y, x, A, B, scale), in_dims=dims)(*given)
            torch.testing.assert_close(out, expected.expand(4, *expected.shape))
    with torch.autocast("cpu", torch.bfloat16):  # the product is bfloat16, y is not
        assert LORA(y.float(), x.float(), A.float(), B.float(), scale).dtype == torch.float32
    assert LORA(y, x[:1], A, B, scale).shape == y.shape


def test_dropout_acts_on_the_adapters_input_only_and_keeps_its_mean():
    y, _, A, B = tensors((1,))
    x = torch.ones(1, 7, dtype=torch.float64)
    torch.manual_seed(0)
    drawn = torch.stack([LORA(y, x, A, B, torch.tensor(1.0), 0.5) for _ in range(4000)]).detach()
    spread = drawn.std(0) / 4000**0.5
    assert bool(((drawn.mean(0) - LORA(y, x, A, B, torch.tensor(1.0))).abs() <= 5 * spread).all())


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        _, _, A, B = tensors(dtype=torch.float32)
        self.A, self.B = nn.Parameter(A.detach()), nn.Parameter(B.detach())
        self.register_buffer("scale", torch.tensor(0.75))

    scale: Tensor

    def forward(self, y: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        return LOOKUP(LORA(y, x, self.A, self.B, self.scale), ids, self.A, self.B, self.scale).tanh()


def inputs():
    y, x, _, _ = tensors(dtype=torch.float32)
    return y.detach(), x.detach(), torch.tensor([1, 2, 0, 6])


def test_export_keeps_one_node_and_decomposing_removes_it():
    program: Any = torch.export.export(Adapted(), inputs())
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(LORA) == targets.count(LOOKUP) == 1
    plain = program.run_decompositions()
    assert not [n for n in plain.graph.nodes if "lrcompile" in str(n.target)]
    torch.testing.assert_close(plain.module()(*inputs()), Adapted()(*inputs()))


def captured(model, backend="eager"):
    """The targets in the graphs Dynamo captures, the output and the gradient of A."""
    targets: list = []

    def record(graph, example_inputs):
        targets.extend(node.target for node in graph.graph.nodes)
        if backend == "eager":
            return graph
        return torch._dynamo.lookup_backend(backend)(graph, example_inputs)

    torch._dynamo.reset()
    out = torch.compile(model, backend=record, fullgraph=True)(*inputs())
    out.sum().backward()
    return targets, out.detach(), model.A.grad


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_dynamo_keeps_one_node_and_every_backend_computes_the_same(backend):
    eager = Adapted()
    expected = eager(*inputs())
    expected.sum().backward()
    targets, out, gradient = captured(Adapted(), backend)
    assert targets.count(LORA) == targets.count(LOOKUP) == 1
    torch.testing.assert_close(out, expected.detach())
    torch.testing.assert_close(gradient, eager.A.grad)
