"""`plan` says what `apply` then does, and computes costs that follow from the shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import lrcompile
from lrcompile.planning import plan
from lrcompile.reporting import Report

SHAPES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA = LlamaConfig(**SHAPES, num_hidden_layers=2)
MIXTRAL = MixtralConfig(**SHAPES, num_hidden_layers=1, num_local_experts=5, num_experts_per_tok=2)
RICH = {"rank_pattern": {"q_proj": 2}, "bias": "all", "train_modules": ["norm"]}


def tiny() -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 5, bias=False))


@pytest.mark.parametrize(("cls", "config"), [(LlamaForCausalLM, LLAMA), (MixtralForCausalLM, MIXTRAL)])
@pytest.mark.parametrize("fields", [{}, RICH], ids=["plain", "rich"])
def test_a_plan_is_what_apply_does(cls: Any, config: Any, fields: dict[str, Any]) -> None:
    model = cls(config)
    spec = lrcompile.spec("lora", rank=3, **fields)
    base_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    planned = plan(model, spec)
    report: Report = lrcompile.report(lrcompile.apply(model, spec))
    assert {s.name: s.rank for s in planned.sites if s.rank} == {r.name: r.rank for r in report.sites if r.adapted}
    assert {s.name: s.reason for s in planned.sites if not s.rank} == {
        r.name: r.reason for r in report.sites if not r.adapted
    }
    assert planned.trainable == report.trainable
    assert planned.base_bytes == base_bytes


def test_a_plan_leaves_the_model_as_it_was() -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan(model, lrcompile.spec("lora", rank=2))
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_costs_follow_from_the_shapes() -> None:
    found = plan(tiny(), lrcompile.spec("lora", rank=2, exclude=["2"]), tokens=13)
    assert found.frozen_flops == 4 * 13 * (7 * 11 + 11 * 5)
    assert found.adapter_flops == 6 * 13 * 2 * (7 + 11)
    assert found.trainable == 2 * (7 + 11)
    assert found.base_bytes == 4 * (7 * 11 + 11 + 11 * 5)
    assert found.trainer_bytes == 4 * 4 * found.trainable
    assert found.saved_bytes == 4 * 13 * (7 + 2)


def test_only_the_experts_a_token_visits_cost_flops() -> None:
    found = plan(MixtralForCausalLM(MIXTRAL), lrcompile.spec("lora", rank=2), tokens=10)
    experts = [site for site in found.sites if site.copies == 5 and site.rank]
    assert experts
    dense = [site for site in found.sites if site.copies == 1 and site.rank]
    expected = sum(6 * 10 * 2 * (s.in_features + s.out_features) for s in dense)
    expected += sum(6 * 20 * 2 * (s.in_features + s.out_features) for s in experts)
    assert found.adapter_flops == expected


def test_the_weights_of_a_quantized_base_count_half_a_byte() -> None:
    model = nn.Sequential(nn.Linear(64, 128, bias=False))
    found = plan(model, lrcompile.spec("qlora", rank=2))
    lrcompile.quantize(model, "nf4")
    assert found.base_bytes == sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())


def test_a_model_without_weights_is_planned_like_one_with_them() -> None:
    config = BertConfig(vocab_size=31, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20)
    spec = lrcompile.spec("lora", rank=3)
    with torch.device("meta"):
        bare = BertModel(config)
    assert plan(bare, spec) == plan(BertModel(config), spec)


def test_a_plan_refuses_what_apply_refuses() -> None:
    with pytest.raises(lrcompile.TargetError, match="querry"):
        plan(tiny(), lrcompile.spec("lora", targets=["0", "querry"]))
    with pytest.raises(lrcompile.SpecError, match="rank=16"):
        plan(tiny(), lrcompile.spec("lora"))


def test_a_plan_prints_sites_reasons_and_costs() -> None:
    text = str(plan(LlamaForCausalLM(LLAMA), lrcompile.spec("lora", rank=3), tokens=100))
    for part in (
        "14 sites hit, 2 spared",
        "model.layers.1.mlp.down_proj",
        "output head",
        "embedding",
        "GFLOP",
        "a step of 100 tokens",
    ):
        assert part in text
