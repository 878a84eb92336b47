"""How much of an update a merge may lose, and into what: the limit, its law, and NF4 codes chosen for the outputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from zoo import language

import lrcompile
from lrcompile.nf4.modules import codes_of, is_nf4


def sized(share: float, dtype: torch.dtype, sites: int = 1, width: int = 256) -> Any:
    """Gaussian maps with an update of `share` of each weight."""
    model: Any = nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(sites)))
    for layer in model:
        nn.init.normal_(layer.weight)
    lrcompile.apply(model, lrcompile.spec("lora", rank=16, alpha=16, dtype="float32"))
    for layer in model:
        adapter = layer.lrcompile_adapters["weight"]["default"]
        with torch.no_grad():
            adapter.A.normal_()
            adapter.B.normal_()
            adapter.B *= share * float(layer.weight.float().norm() / adapter.delta(torch.float32).norm())
    return model


@pytest.mark.parametrize(("dtype", "roundoff"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("times", [4, 40])
def test_the_error_of_a_16_bit_merge_is_043_roundoffs_of_the_weight_whatever_the_update(dtype, roundoff, times):
    share = times * roundoff
    report = lrcompile.merge(sized(share, dtype))
    assert report.sites[0].relative_size == pytest.approx(share, rel=0.02)
    assert report.adapter_relative_error == pytest.approx(0.43 * roundoff / share, rel=0.05)
    assert report.sites[0].kept.share == pytest.approx(1, abs=0.02)


def test_a_bfloat16_merge_of_a_thousandth_keeps_half_and_is_refused_with_every_site_and_every_way_out():
    model = sized(1e-3, torch.bfloat16, sites=3)
    with pytest.raises(lrcompile.MergeError) as caught:
        lrcompile.merge(model)
    for said in ("bfloat16", "'0'", "'1'", "'2'", "float32", 'adapters="inline"', "limit="):
        assert said in str(caught.value)
    assert not lrcompile.report(model).merged
    report = lrcompile.merge(model, limit=float("inf"))
    assert all(0.4 < site.kept.share < 0.65 for site in report.sites)  # 0.52: shared reference, peft.md 4


def test_the_limit_is_what_is_asked_for_and_the_one_named_in_the_refusal_is_enough():
    model = sized(0.01, torch.bfloat16)
    with pytest.raises(lrcompile.MergeError, match="more than 10%") as caught:
        lrcompile.merge(model, limit=0.1)
    named = float(str(caught.value).rpartition("limit=")[2].rstrip("."))
    assert 0.1 < lrcompile.merge(model, limit=named).adapter_relative_error <= named


@pytest.mark.parametrize("limit", [0, -1, True, "half", float("nan"), None])
def test_a_limit_that_is_no_share_is_refused(limit):
    with pytest.raises(lrcompile.MergeError, match="limit is"):
        lrcompile.merge(sized(0.1, torch.float32, width=32), limit=limit)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(13, 8), nn.Linear(8, 8), nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self.embed(ids))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fifty_merges_and_unmerges_leave_every_bit_and_every_tie(dtype):
    model: Any = Tied().to(dtype)
    shared, bits = model.embed.weight, {name: value.clone() for name, value in model.state_dict().items()}
    lrcompile.apply(model, lrcompile.spec("lora", rank=2, targets=["body", "head", "embed"], init="gaussian"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lrcompile_adapters" in name:
                parameter.normal_()
    ids = torch.arange(13)
    with torch.no_grad():
        y, merged = model(ids), None
        for _ in range(50):
            lrcompile.merge(model)
            now = model(ids)
            assert merged is None or torch.equal(now, merged)
            merged = now
            lrcompile.unmerge(model)
            assert model.head.weight is model.embed.weight is shared
        assert torch.equal(model(ids), y)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in bits.items())


@pytest.fixture(scope="module")
def trained_on_nf4() -> Any:
    """Two layers that learned Python's source, as NF4, and an adapter of 4 % of the weights that learned its manual."""
    threads = torch.get_num_threads()
    model = language.base(64, 120)
    lrcompile.quantize(model, "nf4")
    language.adapted(model, 20, 5e-4)
    torch.set_num_threads(threads)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return torch.cat([model(**batch).logits for batch in language.sample(2, seed=99)]).double()


def test_codes_chosen_for_the_outputs_keep_a_trained_adapter_that_nearest_codes_erase(trained_on_nf4):
    model = copy.deepcopy(trained_on_nf4)
    before = [each.clone() for name, each in model.named_buffers() if name.endswith("_codes")]
    with lrcompile.disabled(model):
        base = logits(model)
    trained = logits(model)
    report = lrcompile.merge(model, into="nf4", optimise=True, data=language.sample(8, seed=1), limit=float("inf"))
    sites = [site for site in report.sites if site.plain is not None]
    assert len(sites) == 14
    assert all(site.measured_on == "outputs" for site in sites)
    for site in sites:  # never worse than leaving every code, which keeps 0 and is 1 off
        assert site.plain is not None
        assert site.kept.error < min(1.0, site.plain.error)
    mean = sum(site.kept.share for site in sites) / 14
    plain = sum(site.plain.share for site in sites if site.plain is not None) / 14
    assert mean > 0.8
    assert plain < 0.4
    effect, kept = (trained - base).flatten(), (logits(model) - base).flatten()  # held-out text, the whole model
    assert float(kept @ effect / effect.square().sum()) > 0.7
    assert "nearest codes" in str(report)
    assert report.to_dict()["sites"][0]["kept"]["share"] == report.sites[0].kept.share
    after = [each for name, each in model.named_buffers() if name.endswith("_codes")]
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    lrcompile.unmerge(model)
    after = [each for name, each in model.named_buffers() if name.endswith("_codes")]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(logits(model), trained)


def test_the_limit_of_an_optimised_merge_judges_the_models_outputs_and_no_single_site(trained_on_nf4):
    data = language.sample(8, seed=1)
    model = copy.deepcopy(trained_on_nf4)

    @torch.no_grad()
    def outputs() -> torch.Tensor:
        return torch.cat([model(**batch).logits for batch in data]).double()

    with lrcompile.disabled(model):
        base = outputs()
    trained = outputs()
    report = lrcompile.merge(model, into="nf4", optimise=True, data=data)
    assert report.outputs is not None
    assert report.worst is not None
    error = float((outputs() - trained).norm() / (trained - base).norm())
    assert report.adapter_relative_error == report.outputs.error == pytest.approx(error, rel=1e-6)
    assert error < 0.5 < report.worst.adapter_relative_error  # a site whose update is mostly gone, said in the table
    assert "kept of the effect on the model's outputs" in str(report)
    assert report.worst.name in str(report)
    assert report.to_dict()["outputs"]["error"] == report.outputs.error
    lrcompile.unmerge(model)
    with pytest.raises(lrcompile.MergeError, match="what the adapters do to the model's outputs on the data") as caught:
        lrcompile.merge(model, into="nf4", optimise=True, data=data, limit=error / 2)
    assert repr(report.worst.name) in str(caught.value)
    assert torch.equal(outputs(), trained)
    assert not lrcompile.report(model).merged
    named = float(str(caught.value).rpartition("limit=")[2].rstrip("."))
    assert lrcompile.merge(model, into="nf4", optimise=True, data=data, limit=named).outputs is not None


def test_with_data_the_error_of_any_merge_is_that_of_the_outputs(trained_on_nf4):
    model = copy.deepcopy(trained_on_nf4)
    data = language.sample(4, seed=1)
    weights = lrcompile.merge(model, into="float32")
    lrcompile.unmerge(model)
    outputs = lrcompile.merge(model, into="float32", data=iter(data))
    assert {site.measured_on for site in weights.sites} == {"weights"}
    assert {site.measured_on for site in outputs.sites} == {"outputs"}
    assert 0 < outputs.adapter_relative_error < 2**-18
    assert outputs.adapter_relative_error != weights.adapter_relative_error


def test_a_final_optimised_merge_leaves_plain_nf4_that_computes_the_same(trained_on_nf4):
    model = copy.deepcopy(trained_on_nf4)
    lrcompile.merge(model, into="nf4", optimise=True, data=language.sample(4, seed=1), limit=float("inf"))
    y = logits(model)
    twin = copy.deepcopy(trained_on_nf4)
    lrcompile.merge(twin, into="nf4", optimise=True, data=language.sample(4, seed=1), limit=float("inf"), final=True)
    assert torch.equal(logits(twin), y)
    assert not any("lrcompile_adapters" in name for name in twin.state_dict())


WRONG = {
    "no data": ({"into": "nf4", "optimise": True}, lrcompile.MergeError, "data=batches"),
    "another target": ({"into": "float32", "optimise": True}, lrcompile.MergeError, "optimise=True chooses NF4 codes"),
    "a batch, no list": ({"into": "nf4", "optimise": True, "data": {"input_ids": 1}}, lrcompile.SpecError, "data"),
    "empty": ({"into": "nf4", "optimise": True, "data": []}, lrcompile.SpecError, "no batch"),
    "not the model's": ({"into": "nf4", "optimise": True, "data": [{"pixels": torch.ones(2)}]}, lrcompile.AdapterError,
                        "cannot be run on batch 0"),
    "too much lost": ({"into": "nf4", "optimise": True, "data": language.sample(1, 1), "limit": 1e-4},
                      lrcompile.MergeError, "rounding to nf4"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_refused_merge_leaves_the_codes_and_the_outputs(call, error, message, trained_on_nf4):
    model = copy.deepcopy(trained_on_nf4)
    before = {name: codes_of(each).codes.clone() for name, each in model.named_modules() if is_nf4(each)}
    y = logits(model)
    with pytest.raises(error, match=message):
        lrcompile.merge(model, **call)
    assert all(torch.equal(codes_of(model.get_submodule(name)).codes, codes) for name, codes in before.items())
    assert torch.equal(logits(model), y)
