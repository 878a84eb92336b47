"""to_lora: the same function as plain LoRA, exactly where the update is low-rank, with a stated error elsewhere."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import lrcompile
from lrcompile import plain_specs
from lrcompile.errors import AdapterError, SpecError
from lrcompile.factoring import Pair, compressed, contributing, factored
from lrcompile.recipes import recipe
from lrcompile.recipes.forms.pair import LoraAdapter
from lrcompile.state import adapter_set, state_of

IDS = torch.arange(12).reshape(3, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 7)
        self.up = nn.Linear(7, 29)
        self.down = nn.Linear(29, 11)
        self.head = nn.Linear(11, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.up(self.emb(ids))))))


def net(dtype: torch.dtype = torch.float64) -> Any:
    return Net().to(dtype)


LOW_RANK: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {},
    "pissa": {},
    "pissa, folded": {"residual": "fold"},
    "milora": {},
    "olora": {},
    "lora-xs": {},
    "lora-fa": {},
    "vera": {},
    "adalora": {"target_rank": 2, "total_steps": 9},
    "delta-lora": {"start_step": 1, "ratio": 0.5},
}
FULL_RANK: dict[str, dict[str, Any]] = {"dora": {}, "hira": {}}


def applied(method: str, model: Any = None, name: str = "default", **more: Any) -> Any:
    method, fields = method.partition(",")[0], {**LOW_RANK, **FULL_RANK}.get(method, {}) | more
    common: dict[str, Any] = {"rank": 3, "targets": ["up", "down"], "seed": 1, "rank_pattern": {"down": 2}}
    common |= {"alpha": 4.5, "alpha_pattern": {"down": 5}}
    common = {key: value for key, value in common.items() if key not in recipe(method).lacks}
    spec = lrcompile.spec(method, **common | fields)
    return trained(lrcompile.apply(net() if model is None else model, spec, name=name))


def trained(model: Any) -> Any:
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype))
    return model


def at(model: nn.Module, site: str, name: str = "default") -> Any:
    return next(adapter_set(model, s)[name] for s in state_of(model).sites[name] if s.name == site)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(before: dict[str, Tensor], model: nn.Module) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(v, after[k]) for k, v in before.items())


@pytest.mark.parametrize("method", LOW_RANK)
def test_a_low_rank_method_computes_the_same_as_plain_lora(method):
    model = applied(method)
    if method == "delta-lora":
        for site in ("up", "down"):
            at(model, site).follow()
        trained(model)
    y = model(IDS)
    assert (y - net_like(model)(IDS)).abs().max() > 1e-3
    report = lrcompile.to_lora(model)
    torch.testing.assert_close(model(IDS), y, rtol=1e-12, atol=1e-12)
    assert report.relative_error == 0
    assert all(type(at(model, site)) is LoraAdapter for site in ("up", "down"))
    assert state_of(model).specs["default"].method == "lora"


def net_like(model: Any) -> Any:
    other = copy.deepcopy(model)
    lrcompile.remove(other)
    return other


@pytest.mark.parametrize("method", LOW_RANK)
def test_peft_loads_what_is_saved_then_and_computes_the_same(method, tmp_path):
    peft = pytest.importorskip("peft")
    model = applied(method)
    base, y = net_like(model), model(IDS)
    lrcompile.to_lora(model)
    lrcompile.save(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", autocast_adapter_dtype=False)
    # s is a float32 number here and a float64 one there
    torch.testing.assert_close(theirs(IDS), y, rtol=1e-6, atol=1e-6)
    again = lrcompile.load(net_like(model), tmp_path / "adapter")
    assert torch.equal(again(IDS), model(IDS))


@pytest.mark.parametrize(("method", "rank"), [("pissa", 6), ("olora", 6), ("milora", 6), ("lora-xs", 3), ("vera", 3)])
def test_the_rank_is_that_of_the_effective_factors(method, rank):
    model = applied(method)
    report = lrcompile.to_lora(model)
    assert at(model, "up").A.shape == (rank, 7)
    assert at(model, "up").B.shape == (29, rank)
    row = next(row for row in report.sites if row.name == "up")
    assert (row.before, row.rank) == (3, rank)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    inside=st.integers(1, 12),
    out=st.integers(1, 12),
    share=st.floats(0, 1),
    alpha=st.floats(0.01, 100),
    scaling=st.sampled_from(["alpha/r", "alpha/sqrt(r)"]),
    method=st.sampled_from(["lora", "pissa", "olora", "lora-xs"]),
)
def test_each_site_keeps_its_scale_to_the_bit_whatever_the_rank_becomes(inside, out, share, alpha, scaling, method):
    rank = 1 + int(share * (min(inside, out) - 1))
    model: Any = nn.Sequential(nn.Linear(inside, out).double())
    spec = lrcompile.spec(method, rank=rank, alpha=alpha, scaling=scaling, targets=["0"], seed=1)
    trained(lrcompile.apply(model, spec))
    before, x = at(model, "0").scale.clone(), torch.randn(3, inside).double()
    y = model(x)
    lrcompile.to_lora(model)
    assert torch.equal(at(model, "0").scale, before)
    plain = state_of(model).specs["default"]
    assert plain.scaling == "alpha/r"
    assert torch.tensor(plain.scale_of("0"), dtype=torch.float32) == before
    torch.testing.assert_close(model(x), y, rtol=1e-11, atol=1e-11)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(scale=st.floats(1e-6, 1e6), rank=st.integers(1, 512))
def test_alpha_over_rank_is_the_scale_in_float32(scale, rank):
    alpha = plain_specs._alpha(scale, rank)
    assert math.isclose(alpha / rank, scale, rel_tol=2**-52)


def test_alpha_stays_a_round_number_where_it_was_one():
    model = applied("pissa")
    lrcompile.to_lora(model)
    spec = state_of(model).specs["default"]
    assert (spec.rank_of("up"), spec.alpha_of("up"), spec.rank_of("down"), spec.alpha_of("down")) == (6, 9.0, 4, 10.0)


def test_ranks_that_a_budget_has_pruned_are_dropped_and_one_is_kept():
    model = applied("adalora", rank=5, rank_pattern={})
    with torch.no_grad():
        at(model, "up").E[[0, 3]] = 0
        at(model, "down").E.zero_()
    y = model(IDS)
    lrcompile.to_lora(model)
    assert (at(model, "up").rank, at(model, "down").rank) == (3, 1)
    torch.testing.assert_close(model(IDS), y, rtol=1e-12, atol=1e-12)
    spec = state_of(model).specs["default"]
    assert (spec.rank_of("up"), spec.rank_of("down")) == (3, 1)


def test_an_adapter_that_has_learned_nothing_keeps_its_ranks():
    model = net()
    lrcompile.apply(model, lrcompile.spec("lora", rank=3, targets=["up"]))
    y = model(IDS)
    report = lrcompile.to_lora(model)
    assert at(model, "up").rank == 3
    assert report.relative_error == 0
    assert torch.equal(model(IDS), y)


@pytest.mark.parametrize("method", FULL_RANK)
def test_what_is_not_low_rank_is_cut_with_the_error_it_states(method):
    model = applied(method)
    W = {site: model.get_submodule(site).weight.detach() for site in ("up", "down")}
    change = {site: at(model, site).change(w, w).detach() for site, w in W.items()}
    report = lrcompile.to_lora(model, rank=4)
    for row in report.sites:
        delta, kept = change[row.name], at(model, row.name).delta(torch.float64)
        S = torch.linalg.svdvals(delta)
        assert row.relative_error == pytest.approx(float(S[4:].norm() / S.norm()), rel=1e-6)
        assert float((kept - delta).norm() / delta.norm()) == pytest.approx(row.relative_error, rel=1e-5)
        assert row.scale == 1
    assert report.relative_error > 1e-3


@pytest.mark.parametrize("method", FULL_RANK)
def test_at_full_rank_nothing_is_lost(method):
    model = applied(method)
    y = model(IDS)
    report = lrcompile.to_lora(model, rank=29)
    assert report.relative_error < 1e-13
    torch.testing.assert_close(model(IDS), y, rtol=1e-6, atol=1e-6)  # s is float32 in the forward and in `change`
    assert at(model, "up").rank == 7


@pytest.mark.parametrize("method", FULL_RANK)
def test_it_needs_a_rank_where_the_update_is_not_low_rank(method):
    model = applied(method)
    before = bits(model)
    with pytest.raises(AdapterError, match=rf"{method} is not of low rank \(at up, down\).*rank="):
        lrcompile.to_lora(model)
    assert unchanged(before, model)
    lrcompile.activate(model, {"default": 0.5})
    with pytest.raises(AdapterError, match=r"weight 0\.5.*activate"):
        lrcompile.to_lora(model, rank=4)
    assert unchanged(before, model)


def test_a_rank_cuts_low_rank_methods_too_with_the_error_it_states():
    model = applied("pissa", rank_pattern={})
    exact = copy.deepcopy(model)
    lrcompile.to_lora(exact)
    report = lrcompile.to_lora(model, rank=4)
    for row in report.sites:
        full, cut = at(exact, row.name).delta(torch.float64), at(model, row.name).delta(torch.float64)
        assert row.rank == 4
        assert float((cut - full).norm() / full.norm()) == pytest.approx(row.relative_error, rel=1e-6)
        S = torch.linalg.svdvals(full)
        assert row.relative_error == pytest.approx(float(S[4:].norm() / S.norm()), rel=1e-6)


def test_an_embedding_and_a_stack_are_converted_too():
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(13, 7)
            self.maps = nn.Parameter(torch.randn(4, 7, 9))

        def forward(self, ids: Tensor) -> Tensor:
            return torch.bmm(self.emb(ids), self.maps)

    model, ids = Stack().double(), torch.arange(12).reshape(4, 3)
    lrcompile.apply(model, lrcompile.spec("pissa", rank=3, alpha=4.5, targets=["emb", "maps"], seed=1))
    trained(model)
    y = model(ids)
    lrcompile.to_lora(model)
    assert at(model, "maps").A.shape == (4, 6, 7)
    torch.testing.assert_close(model(ids), y, rtol=1e-12, atol=1e-12)


def deltas(folder: Path, scaled_by: Callable[[dict[str, Any], int], float]) -> dict[str, Tensor]:
    """Of each map, the update of a program that reads a folder of PEFT's with one scale for all of one rank."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)
    found = {}
    for key in [key for key in tensors if "lora_A" in key]:
        A, B = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
        found[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = scaled_by(config, len(A)) * B @ A
    return found


def update(model: Any, name: str) -> Tensor:
    """What the adapter adds to a map `[out, in]`."""
    site, unit = model.get_submodule(name), torch.eye(model.get_submodule(name).in_features, dtype=torch.float64)
    with torch.no_grad():
        y = site(unit)
        with lrcompile.disabled(model):
            return (y - site(unit)).t()


READERS: dict[str, Callable[[dict[str, Any], int], float]] = {
    "vLLM": lambda config, rank: config["lora_alpha"] / config["r"],
    "llama.cpp": lambda config, rank: config["lora_alpha"] / rank,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("method", [*LOW_RANK, *FULL_RANK])
def test_a_uniform_folder_means_the_same_to_programs_that_know_one_rank_and_one_scale(
    method: str, reader: str, tmp_path: Path
):
    model = applied(method)
    expected = {name: update(model, name) for name in ("up", "down")}
    done = lrcompile.to_lora(model, rank=None if method in LOW_RANK else 11, uniform=True)
    lrcompile.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not any(config.get(key) for key in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora"))
    assert len({site.rank for site in done.sites}) == 1
    assert done.relative_error < 1e-12
    found = deltas(tmp_path, READERS[reader])
    assert found.keys() == expected.keys()
    for name, delta in expected.items():  # here the scale is a float32
        assert (found[name] - delta).norm() <= torch.finfo(torch.float32).eps * delta.norm()


def test_without_uniform_such_programs_would_read_another_update(tmp_path: Path):
    model = applied("rslora")
    expected = {name: at(model, name).delta().detach() for name in ("up", "down")}
    lrcompile.save(model, tmp_path)
    found = deltas(tmp_path, READERS["vLLM"])
    assert all((found[name] - expected[name]).norm() > 0.1 * expected[name].norm() for name in found)


def test_a_uniform_scale_is_rounded_once_and_the_report_says_what_that_costs():
    model = applied("lora", net(torch.float32), dtype="bfloat16")
    before = {name: at(model, name).delta().detach() for name in ("up", "down")}
    error = lrcompile.to_lora(model, uniform=True).relative_error
    assert 0 < error <= torch.finfo(torch.bfloat16).eps / 2
    for name, delta in before.items():
        assert (at(model, name).delta() - delta).norm() <= 3 * error * delta.norm()


def test_uniform_refuses_what_trained_in_full_and_leaves_the_model():
    model = applied("lora", train_modules=["head"])
    with pytest.raises(AdapterError, match=r"head\.weight.* trained in full"):
        lrcompile.to_lora(model, uniform=True)
    assert at(model, "up").rank == 3


def test_training_weights_and_other_adapters_carry_over():
    model = applied("pissa", name="a")
    applied("olora", model, name="b", train_modules=["head"])
    lrcompile.activate(model, {"a": 0.5, "b": 2.0}, train="b")
    y, head = model(IDS), model.head.weight.detach().clone()
    for name in ("b", "a"):
        lrcompile.to_lora(model, name)
        torch.testing.assert_close(model(IDS), y, rtol=1e-12, atol=1e-12)
    state = state_of(model)
    assert (state.active, state.training) == ({"a": 0.5, "b": 2.0}, ("b",))
    assert list(adapter_set(model, state.sites["a"][0])) == ["a", "b"]
    assert torch.equal(model.head.weight, head)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"{site}.lrcompile_adapters.weight.b.{t}" for site in ("up", "down") for t in "AB"} | {
        "head.weight",
        "head.bias",
    }
    lrcompile.remove(model, "b")
    lrcompile.remove(model, "a")
    assert not any("lrcompile" in key for key in model.state_dict())


def test_it_goes_on_training():
    model = applied("pissa")
    lrcompile.to_lora(model)
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    before = model(IDS).detach()
    model(IDS).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model(IDS), before)


def test_merge_and_disabled_work_after_it():
    model = applied("pissa", targets=["up", "down"])
    y, plain = model(IDS), net_like(model)(IDS)
    lrcompile.to_lora(model)
    with lrcompile.disabled(model):
        assert torch.equal(model(IDS), plain)
    lrcompile.merge(model)
    torch.testing.assert_close(model(IDS), y, rtol=1e-12, atol=1e-12)


REQUIRED_FIELDS: dict[str, dict[str, Any]] = {
    "adalora": {"target_rank": 2, "total_steps": 9},
    "delta-lora": {"start_step": 1, "ratio": 0.5},
    "ia3": {"feedforward": ["down"], "targets": ["down"]},
    "lora-drop": {"warmup_steps": 2},
    "lora-sb": {"first_lr": 1e-3},
    "plora": {"period": 3, "momentum": 0.5},
}


@pytest.mark.parametrize("method", lrcompile.methods())
def test_every_method_converts_exactly_or_by_a_rank_or_says_why_not(method):
    parts = recipe(method)
    fields = {"rank": 3, "targets": ["up", "down"], "seed": 1, "alpha": 4.5}
    fields = {key: value for key, value in fields.items() if key not in parts.lacks} | REQUIRED_FIELDS.get(method, {})
    batches = [(IDS,)] * 8 if parts.calibration else None
    loss = (lambda out, _: out.square().sum()) if parts.calibration else None
    model = net(torch.float32 if parts.quantizes_base else torch.float64)
    trained(lrcompile.apply(model, lrcompile.spec(method, **fields), data=batches, loss=loss))
    y = model(IDS)
    try:
        report = lrcompile.to_lora(model)
    except AdapterError as refusal:
        full = "not of low rank" in str(refusal)
        assert full or parts.form is None or parts.writes_base
        if full:
            assert lrcompile.to_lora(model, rank=7).relative_error < 1
    else:
        assert report.relative_error == 0
        assert torch.equal(model(IDS), y)


def test_targets_stay_in_the_specs_words_where_they_mean_the_same_and_are_names_elsewhere():
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 7)).double()
    lrcompile.apply(model, lrcompile.spec("pissa", rank=2, seed=1))
    lrcompile.to_lora(model)
    assert state_of(model).specs["default"].targets == "all-linear"
    mixed: Any = nn.ModuleList([nn.Linear(7, 9), nn.Linear(9, 7)])
    lrcompile.quantize(mixed, targets=["0"])
    lrcompile.apply(mixed, lrcompile.spec("pissa", rank=2, seed=1))  # spares what is quantized, as lora does not
    lrcompile.to_lora(mixed)
    assert state_of(mixed).specs["default"].targets == ("1",)


def test_the_report_is_a_table_and_plain_data():
    model = applied("pissa")
    report = lrcompile.to_lora(model)
    assert "'default': pissa is now lora, exactly" in str(report)
    assert [row.split()[:4] for row in str(report).splitlines()[3:]] == [
        ["up", "3", "6", "1.5"],
        ["down", "2", "4", "2.5"],
    ]
    data = report.to_dict()
    assert tree_map(type, data["sites"][0]) == {
        "name": str,
        "before": int,
        "rank": int,
        "scale": float,
        "relative_error": float,
    }
    assert "up to" in str(lrcompile.to_lora(applied("dora"), rank=2))


def test_the_one_meant_is_the_only_one_or_the_only_active_one():
    model = applied("pissa", name="a")
    applied("olora", model, name="b")
    assert lrcompile.to_lora(model).adapter == "b"
    lrcompile.activate(model, ["a", "b"])
    with pytest.raises(AdapterError, match=r"which adapter.*'a', 'b'"):
        lrcompile.to_lora(model)
    with pytest.raises(AdapterError, match="no adapter 'c'"):
        lrcompile.to_lora(model, "c")


def ia3() -> Any:
    return trained(lrcompile.apply(net(), lrcompile.spec("ia3", targets=["up"])))


def bitfit() -> Any:
    return lrcompile.apply(net(), lrcompile.spec("bitfit"))


def plora() -> Any:
    return applied("plora", period=3, momentum=0.5)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (ia3, "changes the bias of up"),
        (bitfit, "trains parameters of the base itself"),
        (plora, "plora writes the base weights"),
        (lambda: _merged(applied("pissa")), "'default' is merged"),
        (lambda: applied("pissa").to("meta"), "meta device"),
    ],
    ids=["a changed bias", "no form", "a written base", "merged", "meta"],
)
def test_what_has_no_counterpart_is_refused_with_the_reason_and_the_model_kept(build, why):
    model = build()
    before = model.state_dict().keys()
    for rank in (2, None):  # nor is a rank asked for that would not help
        with pytest.raises(AdapterError, match=why):
            lrcompile.to_lora(model, rank=rank)
    assert model.state_dict().keys() == before


def _merged(model: Any) -> Any:
    lrcompile.merge(model)
    return model


def test_a_bad_rank_is_refused():
    bad: Any
    for bad in (0, 1.5, True):
        with pytest.raises(SpecError, match="rank must be"):
            lrcompile.to_lora(applied("dora"), rank=bad)


def test_an_error_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = applied("pissa")
    before, y = bits(model), model(IDS)
    monkeypatch.setattr(plain_specs, "match", lambda *_, **__: (_ for _ in ()).throw(SpecError("no")))
    with pytest.raises(AdapterError, match="no lora spec"):
        lrcompile.to_lora(model)
    assert unchanged(before, model)
    assert torch.equal(model(IDS), y)
    assert state_of(model).specs["default"].method == "pissa"


def test_pairs_drop_only_what_contributes_nothing_in_any_map_of_a_stack():
    A, B = torch.randn(2, 4, 5), torch.randn(2, 6, 4)
    A[:, 0], B[:, :, 1], A[0, 2] = 0, 0, 0
    pair = Pair(A, B, 1.0)
    assert contributing(pair).tolist() == [False, False, True, True]
    kept = pair.kept(contributing(pair))
    assert kept.rank == 2
    torch.testing.assert_close(kept.B @ kept.A, B @ A)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(inside=st.integers(1, 9), out=st.integers(1, 9), rank=st.integers(1, 12), cut=st.integers(1, 12))
def test_cut_pairs_are_the_best_of_their_rank(inside, out, rank, cut):
    A, B = torch.randn(rank, inside, dtype=torch.float64), torch.randn(out, rank, dtype=torch.float64)
    S = torch.linalg.svdvals(B @ A)
    for pair in (compressed(Pair(A, B, 1.0), cut), factored(B @ A, cut, torch.float64)):
        error = float((pair.B @ pair.A - B @ A).norm())
        assert error == pytest.approx(float(S[cut:].norm()), rel=1e-6, abs=1e-12 * float(S[0]))
        assert pair.error == pytest.approx(error / float(S.norm()), rel=1e-6, abs=1e-12)
        assert pair.rank <= cut
