"""BitFit: the biases train and nothing else; everything an adapter can do works without a single site."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile.planning import plan


class Net(nn.Module):
    def __init__(self, spare=False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.norm, self.head = nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 5)
        if spare:
            self.pooler = nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.fc(x)).tanh())


BIASES = {"fc.bias": 9, "norm.bias": 9, "head.bias": 5}
X = torch.randn(6, 7, generator=torch.Generator().manual_seed(1))


def trained(model: Any, steps=3) -> Any:
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    return model


def test_it_starts_as_the_base_and_trains_the_biases_alone():
    model: Any = Net()
    y, before = model(X), {key: p.clone() for key, p in model.named_parameters()}
    lrcompile.apply(model, lrcompile.spec("bitfit"))
    assert torch.equal(model(X), y)
    assert {key: p.numel() for key, p in model.named_parameters() if p.requires_grad} == BIASES
    trained(model)
    assert {key for key, p in model.named_parameters() if not torch.equal(p, before[key])} == set(BIASES)


def test_lora_only_takes_the_biases_of_the_targeted_layers():
    model = lrcompile.apply(Net(), lrcompile.spec("bitfit", bias="lora_only", targets=["fc"]))
    assert [key for key, p in model.named_parameters() if p.requires_grad] == ["fc.bias"]


def test_a_spec_that_trains_nothing_is_an_error():
    with pytest.raises(lrcompile.SpecError, match=r"bias='none' would train nothing: give 'all'") as caught:
        lrcompile.spec("bitfit", bias="none")
    assert caught.value.field == "bias"
    with pytest.raises(lrcompile.TargetError, match="finds nothing to train"):
        lrcompile.apply(nn.Sequential(nn.Linear(3, 4, bias=False)), lrcompile.spec("bitfit"))
    with pytest.raises(lrcompile.SpecError, match="it adds no tensors"):
        lrcompile.spec("bitfit", rank=4)


def test_it_merges_unmerges_and_is_removed_without_any_site():
    model: Any = Net()
    base, before = model(X), {key: value.clone() for key, value in model.state_dict().items()}
    trained(lrcompile.apply(model, lrcompile.spec("bitfit")))
    y = model(X)
    report = lrcompile.merge(model)
    assert (report.sites, report.worst, report.adapter_relative_error) == ((), None, 0.0)
    assert "no weight has an update" in str(report)
    assert report.to_dict()["sites"] == []
    assert torch.equal(model(X), y)
    with lrcompile.disabled(model):
        assert torch.equal(model(X), base)
    lrcompile.unmerge(model)
    assert torch.equal(model(X), y)
    lrcompile.remove(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_final_merge_leaves_the_trained_biases():
    model = trained(lrcompile.apply(Net(), lrcompile.spec("bitfit")))
    y = model(X)
    lrcompile.merge(model, final=True)
    assert type(model) is Net
    assert torch.equal(model(X), y)
    with pytest.raises(lrcompile.AdapterError, match="has no adapter"):
        lrcompile.unmerge(model)


def test_a_bias_no_gradient_reaches_is_named_and_can_be_left_out():
    model = lrcompile.apply(Net(spare=True), lrcompile.spec("bitfit"))
    with pytest.raises(lrcompile.TargetError, match=r"no gradient reaches 1 trained tensors:\n  pooler.bias"):
        trained(model, steps=1)
    with pytest.raises(lrcompile.TargetError, match=r"pooler.bias"):
        lrcompile.apply(Net(spare=True), lrcompile.spec("bitfit"), example_inputs=(X,))
    model = lrcompile.apply(Net(spare=True), lrcompile.spec("bitfit", exclude=["pooler"]), example_inputs=(X,))
    trained(model)


def test_two_of_them_keep_their_own_values():
    model: Any = trained(lrcompile.apply(Net(), lrcompile.spec("bitfit"), name="a"))
    a = model(X)
    trained(lrcompile.apply(model, lrcompile.spec("bitfit"), name="b"), steps=5)
    b = model(X)
    assert not torch.equal(a, b)
    assert torch.equal(lrcompile.activate(model, "a")(X), a)
    assert torch.equal(lrcompile.activate(model, "b")(X), b)


def test_report_and_plan_say_what_trains():
    expected = sum(BIASES.values())
    planned = plan(Net(), lrcompile.spec("bitfit"))
    assert (planned.trainable, set(planned.trained_in_full)) == (expected, set(BIASES))
    assert planned.adapter_flops == 0
    assert "23 numbers" in str(planned)
    report = lrcompile.report(lrcompile.apply(Net(), lrcompile.spec("bitfit")))
    assert report.trainable == expected
    assert "23" in str(report)


def test_it_saves_and_loads(tmp_path):
    model = trained(lrcompile.apply(Net(), lrcompile.spec("bitfit")))
    lrcompile.save(model, tmp_path / "adapter")
    fresh = lrcompile.load(Net(), tmp_path / "adapter")
    assert torch.equal(fresh(X), model(X))
    with lrcompile.disabled(fresh):
        assert torch.equal(fresh(X), Net()(X))


def test_it_trains_beside_nf4_weights_and_exports(tmp_path):
    pytest.importorskip("onnx")
    model: Any = lrcompile.quantize(
        nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)), "nf4", exclude=["2"]
    )
    x = torch.randn(4, 32)
    y = model(x)
    lrcompile.apply(model, lrcompile.spec("bitfit"), example_inputs=(x,))
    with torch.no_grad():
        model[0].bias.add_(1)
    assert lrcompile.export(model, tmp_path / "m.onnx", (x,)).verify().ok
    lrcompile.remove(model)
    assert torch.equal(model(x), y)


def test_compiled_it_trains_alike():
    model: Any = lrcompile.apply(Net(), lrcompile.spec("bitfit"))
    model(X).square().sum().backward()
    expected, model.fc.bias.grad = model.fc.bias.grad.clone(), None
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager", fullgraph=True)(X).square().sum().backward()
    torch.testing.assert_close(model.fc.bias.grad, expected)
