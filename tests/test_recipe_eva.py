"""EVA starts A as the main directions of each layer's input and moves ranks to where there are more of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lrcompile
from lrcompile.state import adapter_set, state_of

transformers = pytest.importorskip("transformers")

EPS = torch.finfo(torch.float64).eps


def adapters(model: nn.Module) -> dict[str, Any]:
    return {site.name: adapter_set(model, site)["default"] for site in state_of(model).sites["default"]}


def mlp(inside=9, hidden=12, out=7):
    return nn.Sequential(nn.Linear(inside, hidden), nn.Tanh(), nn.Linear(hidden, out)).double()


def llama():
    config = transformers.LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=37)  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def tokens(number=4):
    return [
        {"input_ids": torch.randint(37, (4, 16)), "attention_mask": torch.ones(4, 16).long()} for _ in range(number)
    ]


@settings(deadline=None, max_examples=25, derandomize=True)
@given(inside=st.integers(1, 15), out=st.integers(1, 15), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_A_is_the_top_right_singular_vectors_of_the_centred_input_and_B_is_zero(inside, out, share, seed):
    torch.manual_seed(seed)
    rank = 1 + int(share * (min(inside, out) - 1))
    model = nn.Sequential(nn.Linear(inside, out)).double()
    x = torch.randn(40, inside, dtype=torch.float64) * torch.linspace(0.5, 2, inside, dtype=torch.float64) + 1
    lrcompile.apply(model, lrcompile.spec("eva", rank=rank, targets=["0"]), data=[(x,)])
    adapter = adapters(model)["0"]
    A = adapter.A.detach()
    assert not adapter.B.any()
    assert (A @ A.T - torch.eye(rank).double()).abs().max() <= 64 * EPS
    values, rows = torch.linalg.svd(x - x.mean(0), full_matrices=False)[1:]
    gaps = torch.cat((values[:-1] - values[1:], values[-1:])) / values[0]
    cosines = (A * rows[:rank]).sum(1).abs()
    apart = gaps[:rank].minimum(torch.cat((torch.ones(1).double(), gaps[: rank - 1])))
    assert ((1 - cosines) <= 64 * EPS * 40 / apart.clamp(min=1e-8)).all()  # vectors of close values mix


def test_the_output_at_the_start_is_the_bases_to_the_bit():
    torch.manual_seed(0)
    model, data = llama(), tokens()
    with torch.no_grad():
        before = model(**data[0]).logits
        lrcompile.apply(model, lrcompile.spec("eva", rank=4), data=data)
        assert torch.equal(model(**data[0]).logits, before)


def test_ranks_move_and_their_sum_stays():
    torch.manual_seed(0)
    model, data = llama(), tokens()
    lrcompile.apply(model, lrcompile.spec("eva", rank=4, alpha=8, rho=2.5), data=data)
    ranks = {name: adapter.rank for name, adapter in adapters(model).items()}
    assert sum(ranks.values()) == 4 * len(ranks)
    assert len(set(ranks.values())) > 1
    assert all(1 <= rank <= 10 for rank in ranks.values())
    assert all(adapter.scale_value == pytest.approx(2, rel=1e-12) for adapter in adapters(model).values())
    spec = state_of(model).specs["default"]
    assert {name: spec.rank_of(name) for name in ranks} == ranks


def test_rho_one_keeps_every_rank():
    torch.manual_seed(0)
    model = llama()
    lrcompile.apply(model, lrcompile.spec("eva", rank=3, rho=1, rank_pattern={"q_proj": 5}), data=tokens())
    for name, adapter in adapters(model).items():
        assert adapter.rank == (5 if name.endswith("q_proj") else 3)


def test_sites_with_more_directions_get_more_ranks():
    """The first layer's input has two directions, the second's many."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)).double()
    data = [(torch.randn(80, 2).double() @ torch.randn(2, 12).double() * 3,)]
    lrcompile.apply(model, lrcompile.spec("eva", rank=3, targets=["0", "2"]), data=data)
    assert {name: adapter.rank for name, adapter in adapters(model).items()} == {"0": 2, "2": 4}


def test_it_stops_reading_when_directions_have_settled():
    torch.manual_seed(0)
    batch = (torch.randn(40, 9).double(),)
    seen = []

    def endless():
        while True:
            seen.append(1)
            yield batch

    model = lrcompile.apply(mlp(), lrcompile.spec("eva", rank=2, batches=50), data=endless())
    assert len(seen) == 2
    assert not any("eva" in note for note in lrcompile.report(model).notes)


def test_directions_that_still_move_are_noted():
    torch.manual_seed(0)
    data = [(torch.randn(12, 9).double(),) for _ in range(3)]
    model = lrcompile.apply(mlp(), lrcompile.spec("eva", rank=2, batches=3, tau=0.9999), data=data)
    assert any("still moved with the last batch" in note for note in lrcompile.report(model).notes)


def test_an_nf4_base_is_measured_like_any():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    data = [(torch.randn(80, 64),)]
    lrcompile.quantize(model, "nf4", targets=["0", "1"])
    hidden = model[0](data[0][0]).detach()
    lrcompile.apply(model, lrcompile.spec("eva", rank=2, rho=1, targets=["0", "1"]), data=data)
    rows = torch.linalg.svd(hidden - hidden.mean(0), full_matrices=False)[2][:2]
    torch.testing.assert_close((adapters(model)["1"].A * rows).sum(1).abs(), torch.ones(2), rtol=1e-4, atol=0)


def test_the_directions_are_pefts():
    """PEFT 0.21's are the authors'. One batch repeated, so that both settle at once; ranks kept by rho = 1."""
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.eva import get_eva_state_dict

    torch.manual_seed(0)
    model, batch = llama(), tokens(1)[0]
    names = ["q_proj", "down_proj"]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=names, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0)
    )
    theirs = get_eva_state_dict(model, [batch], config, show_progress_bar=False)
    lrcompile.apply(model, lrcompile.spec("eva", rank=4, rho=1, targets=names), data=[batch, batch])
    assert len(theirs) == 4
    for name, adapter in adapters(model).items():
        torch.testing.assert_close(adapter.A @ adapter.A.T, torch.eye(4), rtol=1e-4, atol=1e-4)
        cosines = (adapter.A * theirs[name].float()).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones(4), rtol=5e-2, atol=0)  # theirs is a randomised SVD


def test_a_saved_adapter_loads_with_its_ranks_here_and_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model, data = llama(), tokens()
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    lrcompile.apply(model, lrcompile.spec("eva", rank=4, alpha=8), data=data)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.B.normal_(0, 0.1)
        expected = model(**data[0]).logits
        lrcompile.save(model, tmp_path / "adapter")
        again = llama()
        again.load_state_dict(plain)
        lrcompile.load(again, tmp_path / "adapter")
        assert torch.equal(again(**data[0]).logits, expected)
        other = llama()
        other.load_state_dict(plain)
        theirs = peft.PeftModel.from_pretrained(other, tmp_path / "adapter").eval()
        torch.testing.assert_close(theirs(**data[0]).logits, expected, rtol=1e-4, atol=1e-5)
