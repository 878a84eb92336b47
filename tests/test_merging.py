"""merge folds in float32 with one rounding and measures it; unmerge brings the bits back; a refusal changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import lrcompile


def filled(model: Any, size=1.0) -> Any:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lrcompile_adapters" in name:
                nn.init.normal_(p, 0, size)
    return model


def applied(model: Any, size=1.0, name="default", **fields) -> Any:
    return filled(lrcompile.apply(model, lrcompile.spec("lora", **{"rank": 2, "alpha": 3} | fields), name=name), size)


def state(model: Any) -> dict:
    return {
        "bytes": {k: v.clone() for k, v in model.state_dict().items()},
        "classes": {k: type(m) for k, m in model.named_modules()},
        "identity": {k: id(p) for k, p in model.named_parameters(remove_duplicate=False)},
        "flags": {k: p.requires_grad for k, p in model.named_parameters()},
        "adapters": (lrcompile.report(model).active, lrcompile.report(model).merged),
    }


def same(before: dict, after: dict, but: tuple[str, ...] = ()) -> None:
    assert list(before["bytes"]) == list(after["bytes"])
    assert all(torch.equal(v, after["bytes"][k]) for k, v in before["bytes"].items())
    for what in {*before} - {"bytes", *but}:
        assert before[what] == after[what], what


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    inside=st.integers(2, 9),
    out=st.integers(2, 9),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    conv1d=st.booleans(),
    weights=st.sampled_from([{"a": 1.0}, {"a": 1.0, "b": -0.5}, {"b": 2.0}]),
)
def test_the_merged_weight_is_rounded_once_and_unmerge_restores_the_bits(inside, out, dtype, conv1d, weights):
    model: Any = nn.Sequential((Conv1D(out, inside) if conv1d else nn.Linear(inside, out)).to(dtype))
    for name in "ab":
        applied(model, name=name, scaling="alpha/sqrt(r)", init="gaussian")
    lrcompile.activate(model, weights)
    before = state(model)
    weight = model[0].weight.detach().clone()
    wide = torch.promote_types(dtype, torch.float32)
    update = sum(model[0].lrcompile_adapters["weight"][name].delta(wide) for name in weights)
    update = update.T if conv1d else update
    report = lrcompile.merge(model)
    assert torch.equal(model[0].weight, (weight.to(wide) + update).to(dtype))
    lost = ((model[0].weight.double() - weight.double()) - update.double()).norm() / update.double().norm()
    assert report.adapter_relative_error == pytest.approx(float(lost), rel=1e-6, abs=1e-15)
    lrcompile.unmerge(model)
    same(before, state(model))


def test_merged_equals_unmerged_in_float64_to_its_last_bits():
    model: Any = applied(nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).double(), scaling="alpha/sqrt(r)")
    x = torch.randn(4, 7, dtype=torch.float64)
    y = model(x)
    lrcompile.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-13, atol=1e-13)


def test_final_leaves_a_plain_model_of_the_original_classes():
    plain: Any = nn.Sequential(nn.Linear(7, 9), nn.Embedding(4, 3), nn.Linear(9, 5))
    plain[0].weight.requires_grad_(False)
    model: Any = applied(copy.deepcopy(plain), bias="all")
    with torch.no_grad():
        model[0].bias.add_(1)
    x = torch.randn(3, 7)
    y, bias = model[2](model[0](x)), model[0].bias.clone()
    lrcompile.merge(model, final=True)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert set(vars(model[0])) == set(vars(plain[0]))
    assert torch.equal(model[0].bias, bias)
    torch.testing.assert_close(model[2](model[0](x)), y, rtol=1e-4, atol=1e-5)
    with pytest.raises(lrcompile.AdapterError):
        lrcompile.unmerge(model)


def test_a_merge_that_rounding_erases_names_the_site_and_changes_nothing():
    model: Any = applied(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16(), size=1e-3)
    filled(model[0], 1.0)
    before = state(model)
    with pytest.raises(lrcompile.MergeError, match=r"rounding to bfloat16 would take \d+%.*'1'.*1 sites") as caught:
        lrcompile.merge(model)
    assert "float32" in str(caught.value)
    same(before, state(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_merged(value):
    model: Any = applied(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 4)))
    with torch.no_grad():
        model[1].lrcompile_adapters["weight"]["default"].B[0, 0] = value
    before = {k: v.clone() for k, v in model[0].state_dict().items()}
    with pytest.raises(lrcompile.MergeError, match=r"'1'.*not finite"):
        lrcompile.merge(model)
    assert all(torch.equal(v, before[k]) for k, v in model[0].state_dict().items())
    assert not lrcompile.report(model).merged


def test_an_update_that_overflows_float16_is_refused():
    model: Any = applied(nn.Sequential(nn.Linear(5, 5).half()), size=300.0)
    with pytest.raises(lrcompile.MergeError, match="float16"):
        lrcompile.merge(model)


def merged(model: Any) -> Any:
    lrcompile.merge(model)
    return model


def two() -> Any:
    return applied(applied(nn.Sequential(nn.Linear(6, 5)), name="a"), name="b")


def both() -> Any:
    return lrcompile.activate(two(), ["a", "b"])


WRONG = {
    "twice": (lambda: merged(two()), lambda m: lrcompile.merge(m), lrcompile.MergeError, "'b' is merged already"),
    "unknown": (two, lambda m: lrcompile.merge(m, "c"), lrcompile.AdapterError, "'c'.*'a', 'b'"),
    "inactive": (two, lambda m: lrcompile.merge(m, "a"), lrcompile.MergeError, "'a' is not active"),
    "none active": (
        lambda: lrcompile.activate(two(), []),
        lambda m: lrcompile.merge(m),
        lrcompile.MergeError,
        "no adapter is active",
    ),
    "unmerge": (two, lambda m: lrcompile.unmerge(m), lrcompile.MergeError, "not merged"),
    "into": (two, lambda m: lrcompile.merge(m, into="int8"), lrcompile.MergeError, "'int8'"),
    "into, not quantized": (two, lambda m: lrcompile.merge(m, into="bfloat16"), lrcompile.MergeError, "NF4"),
    "final of one of two": (both, lambda m: lrcompile.merge(m, "a", final=True), lrcompile.MergeError, "'b' is active"),
}


@pytest.mark.parametrize(("build", "call", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_call_is_one_typed_error_and_changes_nothing(build, call, error, message):
    model = build()
    before = state(model)
    with pytest.raises(error, match=message):
        call(model)
    same(before, state(model))


def test_one_of_two_active_adapters_is_merged_and_the_other_acts_beside_it():
    model, x = both(), torch.randn(3, 6)
    y = model(x)
    lrcompile.merge(model, "a")
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    lrcompile.unmerge(model)
    assert torch.equal(model(x), y)


def test_a_merged_model_can_be_cast_and_moved_and_still_unmerges():
    model = merged(two())
    model.bfloat16()
    lrcompile.unmerge(model)
    assert model[0].weight.dtype == torch.bfloat16
    model(torch.randn(2, 6, dtype=torch.bfloat16))


def test_a_merged_nf4_model_can_be_cast_and_still_unmerges():
    model, x = nf4()
    lrcompile.merge(model, into="float32")
    model.bfloat16()
    lrcompile.unmerge(model)
    assert model(x.bfloat16()).dtype == model[0].weight.dtype == torch.bfloat16


def test_the_report_prints_each_site_and_the_worst():
    report = lrcompile.merge(applied(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))))
    assert {site.name for site in report.sites} == {"0", "1"}
    assert report.adapter_relative_error == max(s.adapter_relative_error for s in report.sites)
    assert report.worst is not None
    assert f"worst adapter-relative error {report.adapter_relative_error:.2e} at {report.worst.name}" in str(report)
    assert report.to_dict()["adapters"] == ["default"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.config = type("Config", (), {"tie_word_embeddings": True})()

    def forward(self, ids):
        return self.head(self.embed(ids))


@pytest.mark.parametrize("targets", [["head"], ["embed"], ["embed", "head"]])
def test_a_tied_weight_is_untied_for_the_adapted_use_and_tied_again(targets):
    model, ids = applied(Tied(), targets=targets), torch.arange(8)
    shared, bits, y = model.embed.weight, model.embed.weight.detach().clone(), model(ids)
    report = lrcompile.merge(model)
    assert "untied" in str(report)
    assert not model.config.tie_word_embeddings
    assert model.head.weight is not model.embed.weight
    torch.testing.assert_close(model(ids), y, rtol=1e-4, atol=1e-4)
    if targets == ["head"]:
        assert torch.equal(model.embed.weight, bits)
    with lrcompile.disabled(model):
        assert torch.equal(model(ids), nn.functional.linear(nn.functional.embedding(ids, bits), bits))
    lrcompile.unmerge(model)
    assert model.head.weight is model.embed.weight is shared
    assert torch.equal(shared, bits)
    assert model.config.tie_word_embeddings
    assert torch.equal(model(ids), y)


def nf4(**options) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(70, 66), nn.Tanh(), nn.Linear(66, 50))
    lrcompile.quantize(model, "nf4", block_size=32, **options)
    return applied(model, size=0.1, rank=3), torch.randn(3, 70)


def codes(model: Any) -> list[torch.Tensor]:
    return [b.clone() for name, b in model.named_buffers() if "weight_" in name]


@pytest.mark.parametrize("double_quant", [True, False])
def test_into_float32_is_what_training_saw_and_unmerge_restores_the_codes(double_quant):
    model, x = nf4(double_quant=double_quant)
    y, before = model(x), codes(model)
    lrcompile.merge(model, into="float32")
    assert codes(model) == []
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    lrcompile.unmerge(model)
    assert all(torch.equal(a, b) for a, b in zip(before, codes(model), strict=True))
    assert torch.equal(model(x), y)


def test_into_bfloat16_fits_a_model_that_computes_so():
    model, x = nf4()
    with pytest.raises(lrcompile.MergeError, match=r"float32 activations.*into='float32'"):
        lrcompile.merge(model, into="bfloat16")
    model.to(torch.bfloat16)
    report = lrcompile.merge(model, into="bfloat16", final=True)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.dtype == torch.bfloat16
    assert 0 < report.adapter_relative_error < 0.5
    assert model(x.bfloat16()).dtype == torch.bfloat16


def test_into_nf4_requantizes_the_original_weights_and_measures_the_loss():
    model, x = nf4(keep_base="cpu")
    y, before = model(x), codes(model)
    report = lrcompile.merge(filled(model, 0.6), into="nf4")
    assert 0 < report.adapter_relative_error <= 0.5
    assert not all(torch.equal(a, b) for a, b in zip(before, codes(model), strict=True))
    lrcompile.unmerge(model)
    assert all(torch.equal(a, b) for a, b in zip(before, codes(model), strict=True))
    assert model(x).shape == y.shape


@pytest.mark.parametrize(("options", "into", "message"), [
    ({}, "keep", r"'0' \(of 2 such sites\).*into=\"bfloat16\""), ({}, "nf4", r"'0' were not kept.*keep_base"),
])  # fmt: skip
def test_an_nf4_base_refuses_to_erase_the_update_and_says_the_choices(options, into, message):
    model, x = nf4(**options)
    y, before = model(x), codes(model)
    with pytest.raises(lrcompile.MergeError, match=message):
        lrcompile.merge(model, into=into)
    assert all(torch.equal(a, b) for a, b in zip(before, codes(model), strict=True))
    assert torch.equal(model(x), y)


def test_a_small_update_that_requantizing_would_erase_is_refused():
    model, x = nf4(keep_base="cpu")
    filled(model, 1e-4)
    y, before = model(x), codes(model)
    with pytest.raises(lrcompile.MergeError, match="rounding to nf4"):
        lrcompile.merge(model, into="nf4")
    assert all(torch.equal(a, b) for a, b in zip(before, codes(model), strict=True))
    assert torch.equal(model(x), y)
