"""Named adapters: which act, with what weight, which train; and the base's bits on request."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile

X = torch.linspace(-1, 1, 18).reshape(3, 6)


def delta(model: Any, name: str) -> torch.Tensor:
    """The effect of one adapter on the outputs of the one linear map."""
    adapter = model[0].lrcompile_adapters["weight"][name]
    return X @ adapter.delta().T


def model_with(*names: str, **fields) -> Any:
    model: Any = nn.Sequential(nn.Linear(6, 5))
    for i, name in enumerate(names):
        lrcompile.apply(model, lrcompile.spec("lora", **{"rank": 2 + i, "alpha": 3, "seed": i} | fields), name=name)
        nn.init.normal_(model[0].lrcompile_adapters["weight"][name].B)
    return model


def base(model) -> torch.Tensor:
    return nn.functional.linear(X, model[0].weight, model[0].bias)


def training(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_new_adapter_is_active_and_training_alone():
    model = model_with("a", "b")
    torch.testing.assert_close(model(X), base(model) + delta(model, "b"))
    assert training(model) == {f"0.lrcompile_adapters.weight.b.{t}" for t in "AB"}


@pytest.mark.parametrize("chosen", ["a", ["a"], ("b", "a"), {"a": 2.0, "b": -0.5}, {"b": 0}, [], {}, {"a"}])
def test_the_sum_of_the_active_ones_acts_with_their_weights(chosen):
    model = model_with("a", "b")
    returned: Any = lrcompile.activate(model, chosen)
    assert returned is model
    weights = chosen if isinstance(chosen, dict) else dict.fromkeys([chosen] if isinstance(chosen, str) else chosen, 1)
    expected = base(model)
    for name, weight in weights.items():
        adapter = model[0].lrcompile_adapters["weight"][name]
        expected = expected + weight * adapter.scale_value * X @ (adapter.B @ adapter.A).T
    torch.testing.assert_close(model(X), expected)
    assert lrcompile.report(model).active == tuple(weights)


def test_train_chooses_what_trains_and_none_leaves_it():
    model = model_with("a", "b")
    lrcompile.activate(model, ["a", "b"])
    assert training(model) == {f"0.lrcompile_adapters.weight.b.{t}" for t in "AB"}
    lrcompile.activate(model, ["a", "b"], train="a")
    assert training(model) == {f"0.lrcompile_adapters.weight.a.{t}" for t in "AB"}
    lrcompile.activate(model, "a", train=["a", "b"])
    assert len(training(model)) == 4
    lrcompile.activate(model, "a", train=[])
    assert training(model) == set()


WRONG = [
    (("c",), {}, lrcompile.AdapterError, "'c'.*'a', 'b'"), (({"a": math.nan},), {}, lrcompile.AdapterError, "finite"),
    (({"a": True},), {}, lrcompile.AdapterError, "True"), (({"a": "1"},), {}, lrcompile.AdapterError, "'1'"),
    ((None,), {}, lrcompile.AdapterError, "None"), ((5,), {}, lrcompile.AdapterError, "5"),
    (("a",), {"train": "c"}, lrcompile.AdapterError, "'c'"),
    (("a",), {"train": ["b", "c"]}, lrcompile.AdapterError, "'c'"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), WRONG)
def test_a_wrong_choice_changes_nothing(args, kwargs, error, message):
    model = model_with("a", "b")
    y, before = model(X), training(model)
    with pytest.raises(error, match=message):
        lrcompile.activate(model, *args, **kwargs)
    assert torch.equal(model(X), y)
    assert training(model) == before
    assert lrcompile.report(model).active == ("b",)


def test_two_that_train_the_same_parameter_in_full_cannot_act_together():
    model = model_with("a", "b", bias="all")
    with pytest.raises(lrcompile.AdapterError, match=r"'a' and 'b' both train '0\.bias'"):
        lrcompile.activate(model, ["a", "b"])
    assert lrcompile.report(model).active == ("b",)
    lrcompile.activate(model, "a")


def test_disabled_gives_the_bases_bits_and_then_everything_back():
    model: Any = model_with("a", bias="all")
    with torch.no_grad():
        original = model[0].bias.clone()
        model[0].bias.add_(1)
    y, trained = model(X), training(model)
    with lrcompile.disabled(model):
        assert torch.equal(model(X), nn.functional.linear(X, model[0].weight, original))
        with lrcompile.disabled(model):
            assert torch.equal(model[0].bias, original)
        assert torch.equal(model[0].bias, original)
    assert torch.equal(model(X), y)
    assert training(model) == trained


def test_disabled_gives_everything_back_after_an_error():
    model = model_with("a")
    y = model(X)
    with pytest.raises(ZeroDivisionError), lrcompile.disabled(model):
        _ = 1 / 0
    assert torch.equal(model(X), y)
    lrcompile.activate(model, [])


def test_disabled_gives_the_bases_bits_while_merged():
    model = model_with("a")
    y = base(model)
    lrcompile.merge(model)
    merged = model(X)
    with lrcompile.disabled(model):
        assert torch.equal(model(X), y)
    assert torch.equal(model(X), merged)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("merged", [True, False])
def test_disabled_gives_the_bits_of_an_nf4_base(double_quant, merged):
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(70, 66))
    x = torch.randn(3, 70)
    lrcompile.quantize(model, "nf4", block_size=32, double_quant=double_quant)
    y = model(x)
    lrcompile.apply(model, lrcompile.spec("lora", rank=2))
    nn.init.normal_(model[0].lrcompile_adapters["weight"]["default"].B)
    if merged:
        lrcompile.merge(model, into="float32")
    outside = model(x)
    assert not torch.allclose(outside, y)
    with lrcompile.disabled(model):
        assert torch.equal(model(x), y)
    assert torch.equal(model(x), outside)


CHANGES = {
    "activate": lambda m: lrcompile.activate(m, "a"),
    "apply": lambda m: lrcompile.apply(m, lrcompile.spec("lora", rank=2), name="z"),
    "remove": lambda m: lrcompile.remove(m),
    "merge": lambda m: lrcompile.merge(m),
    "unmerge": lambda m: lrcompile.unmerge(m),
}


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nothing_is_changed_under_disableds_feet(change, merged):
    model = model_with("a")
    weight, y = model[0].weight.detach().clone(), model(X)
    if merged:
        lrcompile.merge(model)
    with lrcompile.disabled(model), pytest.raises(lrcompile.AdapterError, match="leave the block first"):
        change(model)
    if merged:
        lrcompile.unmerge(model)
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model(X), y)


def test_activating_while_merged_is_refused():
    model = model_with("a")
    lrcompile.merge(model)
    with pytest.raises(lrcompile.MergeError, match="unmerge"):
        lrcompile.activate(model, [])


@pytest.mark.parametrize("call", [lambda m: lrcompile.activate(m, "a"), lambda m: lrcompile.disabled(m).__enter__()])
def test_a_model_without_adapters_says_so(call):
    with pytest.raises(lrcompile.AdapterError, match=r"call lrcompile\.apply"):
        call(nn.Linear(2, 2))


def test_a_wrapper_around_an_adapted_model_says_which_submodule_to_pass():
    with pytest.raises(lrcompile.AdapterError, match="'inner'"):
        lrcompile.activate(nn.ModuleDict({"inner": model_with("a")}), "a")
