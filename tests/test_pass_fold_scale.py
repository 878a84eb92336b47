"""fold-scale: s·(xAᵀ)Bᵀ = (xAᵀ)(s·B)ᵀ; the scale moves into a tensor of its own, the adapter's factors stay."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.deployment.capture import capture
from lrcompile.passes.base import Program
from lrcompile.passes.checking import Check
from lrcompile.passes.expand_lora import ExpandLora
from lrcompile.passes.fold_scale import FoldScale
from lrcompile.passes.pipeline import Pipeline

lora = torch.ops.lrcompile.lora
IN, OUT, RANK = 10, 7, 3


def _program(model: nn.Module, *inputs: torch.Tensor) -> Program:
    return Program(capture(model, inputs).program, model)


def _scales(program: Program) -> list[float]:
    """The scale each adapter node reads."""
    held = {**program.exported.state_dict, **program.exported.constants}
    targets = {spec.arg.name: spec.target for spec in program.exported.graph_signature.input_specs}
    return [float(held[targets[n.args[4].name]]) for n in program.exported.graph.nodes if n.target is lora.default]


def _new(program: Program, before: set[str]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in program.exported.state_dict.items() if name not in before}


class Pair(nn.Module):
    """A map with an adapter whose dtypes and scale are given."""

    def __init__(self, scale: float, dtype: torch.dtype = torch.float32, factors: torch.dtype = torch.float32):
        super().__init__()
        self.map = nn.Linear(IN, OUT, dtype=dtype)
        self.A, self.B = (nn.Parameter(torch.randn(*shape, dtype=factors)) for shape in ((RANK, IN), (OUT, RANK)))
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, x):
        return lora(self.map(x), x, self.A, self.B, self.scale, 0.0)


def _adapted(model: Any, *names: str, **fields: Any) -> Any:
    for name in names or ("default",):
        lrcompile.apply(model, lrcompile.spec("lora", rank=RANK, alpha=5, **fields), name=name)
    lrcompile.activate(model, dict.fromkeys(names or ("default",), 1.0))
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_one_product_of_size_batch_times_rank_goes():
    """Before: linear ×4, mul ×2, add ×2 for two adapters; Expected: no mul left."""
    model = _adapted(nn.Sequential(nn.Linear(IN, IN), nn.Tanh(), nn.Linear(IN, OUT)), targets=["0", "2"])
    counts = []
    for pipeline in (Pipeline((ExpandLora(),)), Pipeline((FoldScale(), ExpandLora()))):
        program = _program(model, torch.randn(4, IN))
        pipeline.run(program, Check((torch.randn(5, IN),)))
        targets = Counter(str(node.target) for node in program.exported.graph.nodes)
        counts.append([targets[f"aten.{op}"] for op in ("linear.default", "mul.Tensor", "add.Tensor")])
    assert counts == [[6, 2, 2], [6, 0, 2]]


def test_it_is_idempotent_keeps_the_batch_free_and_names_what_it_makes_by_its_origin():
    model = _adapted(nn.Sequential(nn.Linear(IN, IN), nn.Tanh(), nn.Linear(IN, OUT)), targets=["0", "2"])
    program = _program(model, torch.randn(4, IN))
    before = set(program.exported.state_dict)
    assert FoldScale().apply(program).count == 2
    assert _scales(program) == [1.0, 1.0]
    made = _new(program, before)
    B = "lrcompile_adapters.weight.default.B"
    assert set(made) == {f"0.{B}_scaled", f"2.{B}_scaled", "lrcompile_one"}
    for site in "02":
        assert torch.equal(made[f"{site}.{B}_scaled"], program.exported.state_dict[f"{site}.{B}"] * torch.tensor(5 / 3))
    assert not FoldScale().apply(program).modified
    x = torch.randn(9, IN)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=8 * 2**-24 * IN, atol=8 * 2**-24 * IN)


def test_a_scale_of_one_is_left_alone():
    program = _program(Pair(1.0), torch.randn(4, IN))
    code = program.exported.graph_module.code
    assert FoldScale().apply(program).count == 0
    assert program.exported.graph_module.code == code


def test_slices_of_one_factor_share_what_is_made_of_it():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(12, 3, batch_first=True)

        def forward(self, x, z):
            return self.inner(x, z, z, need_weights=False)[0]

    model = _adapted(Attention(), targets=["in_proj_weight"])
    inputs = torch.randn(2, 4, 12), torch.randn(2, 6, 12)
    program = _program(model, *inputs)
    before = set(program.exported.state_dict)
    (step,) = Pipeline((FoldScale(),)).run(program, Check(inputs))
    assert step.result.count == 2  # q, and k with v
    assert set(_new(program, before)) == {
        "inner.lrcompile_adapters.in_proj_weight.default.B_scaled",
        "lrcompile_one",
    }


def test_a_layer_called_twice_and_two_scales_of_one_factor():
    class Twice(Pair):
        def __init__(self) -> None:
            super().__init__(0.5)
            self.register_buffer("other", torch.tensor(3.0), persistent=False)

        def forward(self, x):
            y = self.map(x)
            once = lora(y, x, self.A, self.B, self.scale, 0.0)
            return once * lora(y, -x, self.A, self.B, self.scale, 0.0) + lora(y, x, self.A, self.B, self.other, 0.0)

    model, x = Twice(), torch.randn(4, IN)
    program = _program(model, x)
    before = set(program.exported.state_dict)
    (step,) = Pipeline((FoldScale(),)).run(program, Check((x,)))
    assert step.result.count == 3
    made = _new(program, before)
    assert set(made) == {"B_scaled", "B_scaled_2", "lrcompile_one"}
    assert torch.equal(made["B_scaled"] * 6, made["B_scaled_2"])  # powers of two times three: exact


def test_stacked_adapters_fold_each():
    model = _adapted(nn.Sequential(nn.Linear(IN, OUT)), "one", "two", targets=["0"])
    x = torch.randn(4, IN)
    program = _program(model, x)
    (step,) = Pipeline((FoldScale(),)).run(program, Check((x,)))
    assert step.result.count == 2
    assert _scales(program) == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
def test_every_mix_of_dtypes_keeps_the_class(dtype, factors):
    """A bfloat16 factor beside a float32 base is widened: rounding s·B to bfloat16 would cost 2¹⁶ float32 roundings."""
    model, x = Pair(0.7, dtype, factors), torch.randn(5, IN, dtype=dtype)
    program = _program(model, x)
    before = set(program.exported.state_dict)
    (step,) = Pipeline((FoldScale(),)).run(program, Check((x,)))
    assert step.result.count == 1
    assert _new(program, before)["B_scaled"].dtype == torch.promote_types(dtype, factors)


def test_a_product_that_leaves_the_range_of_its_dtype_is_refused():
    for scale, fill in ((1000.0, 100.0), (1e-5, 1.0)):
        model = Pair(scale, torch.float16)
        nn.init.constant_(model.B, fill).data[0, 0] = 1.37 * fill
        program = _program(model, torch.randn(4, IN, dtype=torch.float16))
        result = FoldScale().apply(program)
        (refusal,) = result.refusals
        assert refusal.node == "lora"
        assert "leaves the range of torch.float16" in refusal.reason
        assert not result.modified


def test_a_computed_factor_is_refused_by_node():
    class Computed(Pair):
        def forward(self, x):
            return lora(self.map(x), x, self.A, self.B * x.sum(), self.scale, 0.0)

    program = _program(Computed(0.5), torch.randn(4, IN))
    result = FoldScale().apply(program)
    assert [refusal.node for refusal in result.refusals] == ["lora"]
    assert "computed, not held" in result.refusals[0].reason
    assert not result.modified
