"""VeRA (arXiv 2310.11454): what it promises, in float64 where the promise is mathematical."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lrcompile
from lrcompile.state import adapter_set, state_of


def adapters_of(model: nn.Module) -> list[Any]:
    return [adapter_set(model, site)["default"] for site in state_of(model).sites["default"]]


def stack(widths: tuple[int, ...], dtype=torch.float64) -> Any:
    layers = [nn.Linear(a, b, dtype=dtype) for a, b in pairwise(widths)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(widths[-1], 2, dtype=dtype))


def vera(model: Any, rank: int = 5, **fields: Any) -> Any:
    targets = [str(i) for i, layer in enumerate(model) if isinstance(layer, nn.Linear)][:-1]
    return lrcompile.apply(model, lrcompile.spec("vera", rank=rank, targets=targets, **fields))


def shaken(model: Any) -> Any:
    g = torch.Generator().manual_seed(1)
    for adapter in adapters_of(model):
        for vector in (adapter.lambda_d, adapter.lambda_b):
            vector.data = torch.randn(vector.shape, generator=g, dtype=vector.dtype)
    return model


def test_output_is_the_bases_bits_at_the_start():
    model, x = stack((7, 11, 11)), torch.randn(3, 7, dtype=torch.float64)
    expected = model(x)
    assert torch.equal(vera(model)(x), expected)


def test_lambda_d_has_no_gradient_at_the_start_and_lambda_b_has():
    model = vera(stack((7, 11, 11)))
    model(torch.randn(3, 7, dtype=torch.float64)).sum().backward()
    for adapter in adapters_of(model):
        assert not adapter.lambda_d.grad.any()
        assert adapter.lambda_b.grad.any()


@settings(deadline=None, max_examples=20, derandomize=True)
@given(widths=st.lists(st.integers(1, 13), min_size=3, max_size=5), rank=st.integers(1, 17))
def test_it_trains_out_plus_rank_numbers_a_site_whatever_the_widths(widths, rank):
    model = vera(stack(tuple(widths)), rank)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(out + rank for out in widths[1:])
    assert lrcompile.report(model).trainable == trained


@pytest.mark.parametrize(("rank", "count"), [(1, 18_456), (16, 18_816), (256, 24_576), (1024, 43_008)])
def test_parameters_for_roberta_bases_queries_and_values(rank, count):
    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(768, 768) for _ in range(24))
    lrcompile.apply(model, lrcompile.spec("vera", rank=rank, targets=r"\d+"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_the_forward_is_the_papers_formula_on_slices_of_the_shared_pair():
    model = shaken(vera(nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 3), nn.Linear(3, 2)).double(), rank=4))
    x = torch.randn(5, 7, dtype=torch.float64)
    y = x
    for layer, adapter in zip(list(model)[:2], adapters_of(model), strict=True):
        inside, out = layer.weight.shape[1], layer.weight.shape[0]
        code = adapter.lambda_d * (y @ adapter.A[:, :inside].T)
        y = y @ layer.weight.T + layer.bias + adapter.lambda_b * (code @ adapter.B[:out].T)
    last = model[2]
    assert torch.allclose(model(x), y @ last.weight.T + last.bias, rtol=1e-12, atol=1e-12)


def test_sites_share_one_storage_and_keep_sharing_when_moved_cast_and_copied():
    model = vera(stack((7, 11, 11)))
    for each in (model, copy.deepcopy(model), model.float(), copy.deepcopy(model).half()):
        pairs = {(a.A.data_ptr(), a.B.data_ptr()) for a in adapters_of(each)}
        assert len(pairs) == 1


def test_the_same_seed_gives_the_same_projections_and_leaves_torchs_generator_alone():
    first = adapters_of(vera(stack((7, 11)), seed=3))[0]
    model = stack((7, 11))
    state = torch.get_rng_state()
    second = adapters_of(vera(model, seed=3))[0]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.A, second.A)
    assert torch.equal(first.B, second.B)
    assert not torch.equal(first.A, adapters_of(vera(stack((7, 11)), seed=4))[0].A)


def test_shared_projections_are_bit_unchanged_by_training():
    model = vera(stack((7, 11, 11)))
    A, B = adapters_of(model)[0].A.clone(), adapters_of(model)[0].B.clone()
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 7, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    for adapter in adapters_of(model):
        assert torch.equal(adapter.A, A)
        assert torch.equal(adapter.B, B)
        assert adapter.lambda_d.ne(0.1).any()


def test_merged_is_unmerged_and_unmerge_restores_the_bits():
    model, x = shaken(vera(stack((7, 11, 13)))), torch.randn(3, 7, dtype=torch.float64)
    bits = [layer.weight.clone() for layer in model if isinstance(layer, nn.Linear)]
    expected = model(x)
    lrcompile.merge(model)
    assert torch.allclose(model(x), expected, rtol=1e-12, atol=1e-12)
    lrcompile.unmerge(model)
    assert all(map(torch.equal, bits, [layer.weight for layer in model if isinstance(layer, nn.Linear)]))


def test_a_site_saves_its_code_and_not_its_input():
    model = vera(nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 2)), rank=5)
    shaken(model)
    saved: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model[0](torch.randn(100, 64))
    assert torch.Size((100, 5)) in saved
    assert torch.Size((100, 64)) not in saved
    assert torch.Size((100, 48)) not in saved


def test_peft_draws_the_same_projections_and_computes_the_same():
    base = nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 5), nn.Linear(5, 2))
    config = peft.VeraConfig(r=4, target_modules=["0", "1"], projection_prng_key=3, d_initial=0.1)
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config)
    ours = shaken(vera(base, rank=4, seed=3))
    for name, adapter in zip(("0", "1"), adapters_of(ours), strict=True):
        layer = theirs.base_model.model.get_submodule(name)
        assert torch.equal(layer.vera_A["default"], adapter.A)
        assert torch.equal(layer.vera_B["default"], adapter.B)
        layer.vera_lambda_d["default"].data = adapter.lambda_d.data.clone()
        layer.vera_lambda_b["default"].data = adapter.lambda_b.data.clone()
    x = torch.randn(6, 7)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_alpha_and_a_rank_for_one_site_are_refused_with_the_reason():
    with pytest.raises(lrcompile.SpecError, match="vectors carry the scale"):
        lrcompile.spec("vera", alpha=8)
    with pytest.raises(lrcompile.SpecError, match="one pair of projections"):
        lrcompile.spec("vera", rank_pattern={"q": 4})


def test_it_trains_beside_an_nf4_base_and_on_stacks_of_maps():
    model = lrcompile.quantize(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 2)))
    shaken(vera(model, rank=3))
    model(torch.randn(4, 64)).sum().backward()
    assert all(a.lambda_d.grad is not None and a.lambda_d.grad.any() for a in adapters_of(model))


def test_a_models_state_has_the_pair_once_and_save_pretrained_takes_it(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)
    models = [lrcompile.apply(BertModel(config), lrcompile.spec("vera", rank=3, seed=seed)) for seed in (1, 2)]
    first, second = (shaken(model) for model in models)
    assert sum(key.endswith(".A") for key in first.state_dict()) == 1
    first.save_pretrained(tmp_path)
    second.load_state_dict(first.state_dict())
    ids = torch.arange(8).view(2, 4)
    assert torch.equal(first.eval()(ids).last_hidden_state, second.eval()(ids).last_hidden_state)
