"""The float64 rung is float64 all through, and says so where it cannot be."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lrcompile
from lrcompile.errors import VerificationError
from lrcompile.verifying.float64 import float64_copy, float64_mode, widen_inputs
from lrcompile.verifying.replay import Deviation, perturbed, unit_roundoff, working_dtype


class CastingNorm(nn.Module):
    """As in Llama: the statistics in float32 whatever the input, a constant made with a dtype, a softmax with one."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        kind = x.dtype
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        wide = wide * torch.tensor(0.1, dtype=torch.float32) + torch.full((1,), 0.3, dtype=torch.float32)
        share = F.softmax(wide.float(), -1, dtype=torch.float32)
        steps = torch.arange(x.shape[-1], dtype=torch.float32) / 7
        return self.weight * (wide + share + steps.type_as(wide) + torch.zeros(1) + torch.arange(3)[-1] / 3).to(kind)


def by_hand(x: Tensor, weight: Tensor) -> Tensor:
    x, weight = x.double(), weight.double()
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * 0.1 + 0.3
    return weight * (y + F.softmax(y, -1) + torch.arange(x.shape[-1], dtype=torch.float64) / 7 + 2 / 3)


def run64(module: nn.Module, *args: Tensor) -> Tensor:
    twin, wide = float64_copy(module), widen_inputs(args)
    with float64_mode():
        return twin(*wide)


def test_casts_dtype_arguments_and_constants_inside_a_norm_become_float64() -> None:
    module, x = CastingNorm(33), torch.randn(5, 33)
    exact = by_hand(x, module.weight)
    assert (run64(module, x) - exact).abs().max() < 1e-15 * exact.abs().max()
    assert (copy.deepcopy(module).double()(x.double()) - exact).abs().max() > 1e-9, (
        "double() alone is the trap this avoids"
    )


def test_a_bfloat16_model_is_judged_by_the_mathematics_of_its_stored_numbers() -> None:
    module, x = CastingNorm(33).bfloat16(), torch.randn(5, 33).bfloat16()
    assert (run64(module, x) - by_hand(x, module.weight)).abs().max() < 1e-14


def test_no_narrow_tensor_occurs_inside_a_transformers_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        vocab_size=19,
    )
    seen: set[torch.dtype] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.update(
                leaf.dtype for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()
            )
            return out

    model = float64_copy(transformers.LlamaForCausalLM(config).eval())
    with float64_mode(), Watch():
        model(input_ids=torch.randint(0, 19, (2, 7)))
    assert seen == {torch.float64}


def test_a_narrow_tensor_that_is_still_produced_is_refused_by_operator() -> None:
    class Reinterprets(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.zeros(3, dtype=torch.int32).view(torch.float32)

    with pytest.raises(VerificationError, match=r"aten.view.dtype produced torch.float32 \(3,\)"):
        run64(Reinterprets(), torch.ones(3))


def test_a_write_into_a_tensor_kept_outside_the_model_is_refused() -> None:
    kept = torch.zeros(3)

    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return kept.add_(x) + 0

    with pytest.raises(VerificationError, match="register it as a buffer"):
        run64(Writes(), torch.ones(3))
    assert kept.eq(0).all()


def test_stored_narrow_numbers_outside_the_module_are_widened_exactly() -> None:
    table = torch.randn(4)

    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * table

    x = torch.randn(4)
    assert torch.equal(run64(Reads(), x), x.double() * table.double())


def test_the_model_its_inputs_and_the_default_dtype_are_untouched() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    run64(module, torch.randn(6, 3))
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(ZeroDivisionError), float64_mode():
        _ = 1 / 0
    assert torch.get_default_dtype() == torch.float32


def test_a_complex_table_is_widened_too() -> None:
    class Rotates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.polar(torch.ones(4), torch.randn(4)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(torch.view_as_complex(x.float().reshape(-1, 4, 2)) * self.get_buffer("table"))

    module, x = Rotates(), torch.randn(3, 8)
    table = module.get_buffer("table").to(torch.complex128)
    exact = torch.view_as_real(torch.view_as_complex(x.double().reshape(-1, 4, 2)) * table)
    assert torch.equal(run64(module, x), exact)


def test_inference_mode_around_the_caller_changes_nothing() -> None:
    module, x = nn.Linear(7, 5), torch.randn(2, 7)
    outside = run64(module, x)
    with torch.inference_mode():
        assert torch.equal(run64(module, x), outside)


@pytest.mark.parametrize("form", ["linear", "linear bias", "matmul", "addmm", "bmm", "conv", "einsum"])
def test_a_replay_moves_every_linear_map_by_its_own_bound(form: str) -> None:
    u = unit_roundoff(torch.float32)
    x, w, b = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5)
    forms = {
        "linear": (lambda: F.linear(x, w), lambda: x.abs() @ w.abs().t()),
        "linear bias": (lambda: F.linear(x, w, b), lambda: x.abs() @ w.abs().t() + b.abs()),
        "matmul": (lambda: x @ w.t(), lambda: x.abs() @ w.abs().t()),
        "addmm": (lambda: torch.addmm(b, x, w.t(), alpha=-2), lambda: 2 * (x.abs() @ w.abs().t()) + b.abs()),
        "bmm": (lambda: torch.bmm(x[None], w.t()[None]), lambda: (x.abs() @ w.abs().t())[None]),
        "conv": (
            lambda: F.conv1d(x[None, :, :], w[:, :4, None]),
            lambda: F.conv1d(x.abs()[None], w.abs()[:, :4, None]),
        ),
        "einsum": (lambda: torch.einsum("ni,oi->no", x, w), lambda: x.abs() @ w.abs().t()),
    }
    function, magnitude = forms[form]
    with float64_mode():
        exact = function()
    with float64_mode(), perturbed(u, 0):
        moved = function()
    expected = u * magnitude().double()
    torch.testing.assert_close((moved - exact).abs(), expected, rtol=1e-5, atol=0)
    assert {1.0, -1.0} == set((moved - exact).sign().flatten().tolist())


def test_fused_attention_counts_as_its_two_products() -> None:
    q, k, v = (torch.randn(1, 2, length, 4) for length in (3, 5, 5))
    with float64_mode():
        exact = F.scaled_dot_product_attention(q, k, v)
    with float64_mode(), perturbed(2**-24, 0):
        moved = F.scaled_dot_product_attention(q, k, v)
    own = 2**-24 * (torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v.abs())
    assert own.min() / 2 < (moved - exact).abs().max() < 20 * own.max()


def test_replays_are_the_same_for_a_seed_and_differ_between_seeds() -> None:
    x, w = torch.randn(4, 6), torch.randn(5, 6)

    def replay(seed: int) -> Tensor:
        with float64_mode(), perturbed(2**-24, seed):
            return F.linear(x, w)

    assert torch.equal(replay(1), replay(1))
    assert not torch.equal(replay(1), replay(2))


def test_an_nf4_linear_is_replayed_with_its_dequantized_weight() -> None:
    from lrcompile.quantizing import nf4_weight

    layer = lrcompile.quantize(nn.Sequential(nn.Linear(70, 9)), "nf4")
    x = torch.randn(4, 70)
    weight, bias = nf4_weight(layer.get_submodule("0"), torch.float64), layer.get_parameter("0.bias").double()
    exact = run64(layer, x)
    torch.testing.assert_close(exact, x.double() @ weight.t() + bias, rtol=1e-13, atol=1e-13)
    twin = float64_copy(layer)
    with float64_mode(), perturbed(2**-24, 0):
        moved = twin(x.double())
    torch.testing.assert_close(
        (moved - exact).abs(), 2**-24 * (x.abs().double() @ weight.abs().t() + bias.abs()), rtol=1e-6, atol=0
    )


def test_an_nf4_linear_that_computes_in_bfloat16_is_held_to_bfloat16() -> None:
    layer = lrcompile.quantize(nn.Sequential(nn.Linear(70, 9)), "nf4", compute_dtype="bfloat16")
    x, twin = torch.randn(4, 70).double(), float64_copy(layer)
    with float64_mode():
        exact = twin(x)
    with float64_mode(), perturbed(2**-24, 0):
        moved = twin(x)
    assert (moved - exact).abs().max() > 2**-8 * 0.1


def test_the_working_dtype_is_the_majoritys_not_the_coarsest() -> None:
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(3, 3).half())
    assert working_dtype(model) == torch.float32
    assert working_dtype(model.bfloat16()) == torch.bfloat16
    assert working_dtype(nn.ReLU(), (torch.ones(1).bfloat16(),)) == torch.bfloat16


def test_the_working_dtype_is_the_bases_whatever_its_adapters_train_in() -> None:
    model = nn.Sequential(nn.Linear(9, 9)).bfloat16()
    lrcompile.apply(model, lrcompile.spec("lora", rank=9, targets=["0"], dtype="float32"))
    kinds = [parameter.dtype for parameter in model.parameters() for _ in range(parameter.numel())]
    assert kinds.count(torch.float32) > kinds.count(torch.bfloat16)
    assert working_dtype(model) == torch.bfloat16
    codes = lrcompile.quantize(nn.Sequential(nn.Linear(70, 9, bias=False)).bfloat16(), "nf4")
    lrcompile.apply(codes, lrcompile.spec("lora", rank=9, targets=["0"], dtype="float32"))
    assert working_dtype(codes, (torch.ones(2, 70),)) == torch.bfloat16


def test_a_bound_is_never_under_one_correct_rounding_of_the_result() -> None:
    bound = Deviation(torch.tensor([3.0, float("inf")], dtype=torch.float64), 2**-24)
    assert bound.bound == 3 * 2**-24
    assert Deviation(torch.zeros(2, dtype=torch.float64), 2**-24).ratio(1e-30) == float("inf")
    assert Deviation(torch.zeros(2, dtype=torch.float64), 2**-24).ratio(0.0) == 0.0
