"""Mixtures: experts are compared exactly, and outputs where the same experts were taken."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile.verification import verify
from lrcompile.verifying.routing import choices_of

transformers = pytest.importorskip("transformers")


class Routed(nn.Module):
    """Each token goes through the two experts of four with the largest scores, which `tie` makes nearly equal."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        values, chosen = self.gate(x).topk(2, dim=-1)
        weights = values.softmax(-1)
        every = torch.stack([expert(x) for expert in self.experts], -2)
        taken = every.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, 6))
        return (weights.unsqueeze(-1) * taken).sum(-2)


def tied() -> tuple[Routed, Tensor]:
    """Scores of experts 1 and 2 that differ by less than float32 can tell, in half of the tokens."""
    model, x = Routed(), torch.randn(8, 6)
    with torch.no_grad():
        model.gate.weight[2] = model.gate.weight[1] * (1 + 2**-24)
        model.gate.weight[0].zero_().add_(model.gate.weight[1] * 3)
        model.gate.weight[3] = -model.gate.weight[1] * 3
    return model, x


def test_a_tie_that_rounding_broke_the_other_way_is_no_error_of_arithmetic() -> None:
    model, x = tied()
    verdict = verify(model, copy.deepcopy(model), (x,))
    assert verdict.ok, str(verdict)
    assert verdict.bound_ratio < 4, "float64 took the experts that float32 took"
    assert verdict.outputs[-1].name == "router 0"
    assert verdict.outputs[-1].mismatches == 0


def test_other_experts_fail_by_their_indices_while_outputs_are_measured_where_they_went() -> None:
    torch.manual_seed(3)
    model, x = Routed(), torch.randn(8, 6)
    other = copy.deepcopy(model)
    swapped = other.gate.weight[[1, 0, 2, 3]]
    other.gate.weight.data = swapped.detach().clone()
    verdict = verify(model, other, (x,))
    assert not verdict.ok
    assert any("go to other experts" in failure for failure in verdict.failures)


def test_wrong_arithmetic_behind_a_right_router_still_fails() -> None:
    model, x = tied()
    other = copy.deepcopy(model)
    other.experts[0].get_parameter("bias").data.add_(1e-3)
    verdict = verify(model, other, (x,))
    assert not verdict.ok
    assert verdict.outputs[-1].mismatches == 0
    assert verdict.bound_ratio > 100


def mixtral() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.MixtralConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, num_local_experts=4, num_experts_per_tok=2, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config).eval(), {"input_ids": torch.randint(3, 61, (2, 7))}


def test_the_routers_of_a_mixtral_are_rows_of_the_verdict_and_a_wrong_one_is_caught() -> None:
    model, inputs = mixtral()
    assert [tuple(each.shape) for each in choices_of(model, inputs)] == [(14, 2), (14, 2)]
    verdict = verify(model, copy.deepcopy(model), inputs)
    assert verdict.ok, str(verdict)
    assert [row.name for row in verdict.outputs] == ["logits", "router 0", "router 1"]
    other = copy.deepcopy(model)
    name = next(name for name, _ in other.named_parameters() if name.endswith("layers.1.mlp.gate.weight"))
    other.get_parameter(name).data.neg_()
    wrong = verify(model, other, inputs)
    assert not wrong.ok
    assert any(failure.startswith("MixtralForCausalLM: router 1") for failure in wrong.failures)


@pytest.mark.slow
def test_the_routers_of_a_mixtral_in_onnx_runtime_take_the_same_experts(tmp_path: Path) -> None:
    model, inputs = mixtral()
    verdict = lrcompile.export(model, tmp_path / "model.onnx", inputs).verify()
    assert verdict.ok, str(verdict)
    assert [row.mismatches for row in verdict.outputs[1:]] == [0, 0]
