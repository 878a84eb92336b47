"""The first optimizer step looks for tensors no gradient reached, and names them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import liveness


class Model(nn.Module):
    """`unused` is never called; `drop` skips the last layers that often."""

    def __init__(self, drop: float = 0.0, key: str = "layerdrop"):
        super().__init__()
        self.a, self.unused = nn.Linear(5, 5), nn.Linear(5, 5)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        setattr(self, key, drop)
        self.drop = drop

    def forward(self, x):
        x = self.a(x)
        for layer in self.layers:
            if not self.training or torch.rand(()) >= self.drop:
                x = x + layer(x)
        return x


def trained(model: Any, targets, steps=1, **kw):
    lrcompile.apply(model, lrcompile.spec("lora", rank=2, targets=targets))
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.01, **kw)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(3, 5)).square().sum().backward()
        optimizer.step()
    return optimizer


def dead_rows(model) -> set[str]:
    return {row.name for row in lrcompile.report(model).sites if row.dead}


def test_a_tensor_no_gradient_reaches_is_named_at_the_first_step():
    model: Any = Model()
    with pytest.raises(lrcompile.TargetError, match=r"unused\.lrcompile_adapters\.weight\.default\.A") as caught:
        trained(model, ["a", "unused"])
    assert "a.lrcompile" not in str(caught.value).replace("unused.lrcompile", "")
    assert "2 adapter tensors" in str(caught.value)
    assert dead_rows(model) == {"unused"}


def test_nothing_is_updated_by_the_step_that_finds_it():
    model: Any = Model()
    before = {}
    lrcompile.apply(model, lrcompile.spec("lora", rank=2, targets=["a", "unused"]))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.01)
    model(torch.randn(3, 5)).sum().backward()
    with pytest.raises(lrcompile.TargetError):
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_whose_adapters_are_all_reached_trains_and_the_report_says_so():
    model: Any = Model()
    trained(model, ["a"], steps=3)
    assert [row.dead for row in lrcompile.report(model).sites if row.adapted] == [False]


def test_before_anybody_looked_the_report_does_not_claim_to_know():
    model: Any = lrcompile.apply(Model(), lrcompile.spec("lora", rank=2, targets=["a"]))
    assert [row.dead for row in lrcompile.report(model).sites if row.adapted] == [None]


@pytest.mark.parametrize("key", ["layerdrop", "encoder_layerdrop", "decoder_layerdrop"])
def test_dropped_layers_are_waited_for(key):
    model: Any = Model(0.6, key)
    trained(model, ["a", "layers.0", "layers.1", "layers.2"], steps=liveness.PATIENCE)
    assert dead_rows(model) == set()


def test_patience_ends():
    model: Any = Model(0.3)
    with pytest.raises(lrcompile.TargetError, match="unused"):
        trained(model, ["a", "unused"], steps=liveness.PATIENCE)


def test_a_gradient_of_zeros_is_a_gradient():
    """At B = 0 that of A is zero, as is that of an expert which received no token."""
    model: Any = Model()
    trained(model, ["a"])
    assert not model.a.lrcompile_adapters["weight"]["default"].A.grad.any()


def test_no_grad_is_a_path_no_gradient_takes():
    class Frozen(Model):
        def forward(self, x):
            with torch.no_grad():
                x = self.unused(x)
            return self.a(x)

    with pytest.raises(lrcompile.TargetError, match="unused"):
        trained(Frozen(), ["a", "unused"])


def test_only_what_trains_is_looked_at():
    model: Any = Model()
    lrcompile.apply(model, lrcompile.spec("lora", rank=2, targets=["unused"]), name="old")
    lrcompile.apply(model, lrcompile.spec("lora", rank=2, targets=["a"]), name="new")
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.01)
    model(torch.randn(3, 5)).sum().backward()
    optimizer.step()


def refused_first_step(model: Any, *, loss_factor: float = 1.0) -> str:
    lrcompile.apply(model, lrcompile.spec("lora", rank=2, targets=["a", "layers.0", "layers.1", "layers.2"]))
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.01)
    (model(torch.randn(3, 5)).square().sum() * loss_factor).backward()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(lrcompile.AdapterError, match="not finite at the first step") as caught:
        optimizer.step()
    assert all(torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in model.state_dict().items())
    return str(caught.value)


def test_a_loss_that_is_not_a_number_stops_the_first_step_and_names_sites():
    message = refused_first_step(Model(), loss_factor=float("nan"))
    assert "8 of 8 tensors" in message
    assert "a.lrcompile_adapters.weight.default.A" in message
    assert "the loss was" in message


def test_a_weight_that_is_not_a_number_is_named():
    model = Model()
    model.layers.get_submodule("1").get_parameter("weight").data[0, 0] = float("nan")
    assert "hold values that are not finite: layers.1.weight" in refused_first_step(model)


def test_a_backward_pass_that_breaks_half_way_is_told_from_a_broken_loss():
    class Broken(Model):
        def forward(self, x):
            x = self.layers[0](self.a(x))
            x.register_hook(lambda grad: grad * float("inf"))
            return self.layers[2](self.layers[1](x))

    message = refused_first_step(Broken())
    assert "of 8 tensors" in message
    assert "layers.0.lrcompile_adapters.weight.default.B" in message
    assert "layers.1" not in message
    assert "The others are finite" in message


def test_after_the_first_step_nobody_looks():
    model: Any = Model()
    optimizer = trained(model, ["a"])
    for tensor in (p for p in model.parameters() if p.requires_grad):
        tensor.grad = torch.full_like(tensor, float("nan"))
    optimizer.step()
