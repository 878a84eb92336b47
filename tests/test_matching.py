"""What a spec means for a model: hit, spared and why, trained in full; refusals leave the model alone."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.matching import match


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.norm = nn.Linear(6, 6), nn.Linear(6, 4), nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.q(x)) + self.k(x).sum(-1, keepdim=True)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers, self.head = (
            nn.Embedding(9, 6),
            nn.ModuleList(Block() for _ in range(3)),
            nn.Linear(6, 9),
        )
        self.relative = nn.Parameter(torch.randn(6, 6))

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x) + (x * self.relative.sum()).sum(-1, keepdim=True)


def matched(model=None, **fields):
    return match(model or Model(), lrcompile.spec("lora", **{"rank": 2} | fields))


def hit(**fields) -> list[str]:
    return [site.name for site in matched(**fields).hit]


def test_all_linear_is_every_linear_map_but_head_embeddings_and_what_cannot_be():
    found = matched()
    assert [site.name for site in found.hit] == [f"layers.{i}.{n}" for i in range(3) for n in "qk"]
    reasons = {site.name: why for site, why in found.spared}
    assert reasons["embed"] == "embedding"
    assert reasons["head"] == "output head"
    assert "sum" in reasons["relative"]


def test_targets_exclude_and_layers_combine():
    assert hit(targets=["q", "k"], exclude=["0.q"], layers=[0, 2]) == ["layers.0.k", "layers.2.q", "layers.2.k"]
    assert hit(targets=r".*\.(q|k)", layers=1) == ["layers.1.q", "layers.1.k"]
    assert hit(exclude=["k"], layers=[1]) == ["layers.1.q"]
    assert hit(targets=["head", "embed"]) == ["embed", "head"]


BAD = [
    ({"targets": ["q", "nonsense"]}, "targets", "'nonsense'"),
    ({"targets": ["q", "qq"]}, "targets", "did you mean 'q'"),
    ({"targets": r"q"}, "targets", "no whole name"),
    ({"targets": ["norm"]}, "targets", "LayerNorm.*no weight that is one linear map"),
    ({"targets": ["q", "relative"]}, "targets", "relative.*sum"),
    ({"exclude": ["nonsense"]}, "exclude", "'nonsense'"),
    ({"targets": ["q"], "exclude": ["v"]}, "exclude", "'v'"),
    ({"targets": ["q"], "layers": [7]}, "targets", "not in the chosen layers"),
    ({"targets": ["q"], "rank_pattern": {"k": 3}}, "rank_pattern", "'k'"),
    ({"targets": ["q"], "alpha_pattern": {"k": 3}}, "alpha_pattern", "'k'"),
    ({"train_modules": ["nonsense"]}, "train_modules", "'nonsense'"),
    ({"targets": ["q"], "train_modules": ["0.q"]}, "train_modules", "both a target and trained in full"),
    ({"rank": 5}, "rank", r"above 4.*layers\.0\.k"),
]


@pytest.mark.parametrize(("fields", "field", "message"), BAD, ids=[str(fields) for fields, _, _ in BAD])
def test_what_cannot_be_meant_is_refused_and_the_field_named(fields, field, message):
    with pytest.raises(lrcompile.SpecError, match=rf"(?s){message}") as caught:
        matched(**fields)
    assert caught.value.field == field


def test_a_rank_above_the_matrix_is_allowed_where_a_pattern_asks_for_it():
    found = matched(rank=4, rank_pattern={r"0\.k": 30})
    assert len(found.hit) == 6


def test_a_model_without_linear_maps_is_refused():
    with pytest.raises(lrcompile.TargetError, match="nothing to adapt in this LayerNorm"):
        matched(nn.LayerNorm(3))


def test_bias_options_choose_what_trains():
    assert matched().trained == ()
    assert matched(bias="lora_only", targets=["q"]).trained == tuple(f"layers.{i}.q.bias" for i in range(3))
    every = matched(bias="all", targets=["q"]).trained
    assert "head.bias" in every
    assert "layers.0.norm.bias" in every
    assert not [name for name in every if name.endswith("weight")]


def test_train_modules_train_whole_modules_and_are_not_adapted():
    found = matched(train_modules=["head", "norm", "1.k"])
    assert {"head.weight", "head.bias", "layers.2.norm.weight", "layers.1.k.weight"} <= set(found.trained)
    assert "layers.1.k" not in [site.name for site in found.hit]


def test_a_module_under_two_names_is_one_site_found_by_either():
    model: Any = nn.ModuleDict({"a": nn.Linear(3, 3)})
    model["b"] = model["a"]
    for name in "ab":
        (site,) = match(model, lrcompile.spec("lora", rank=2, targets=[name])).hit
        assert site.names == ("a", "b")


def test_a_shared_weight_is_noted():
    model: Any = Model()
    model.head.weight = model.embed.weight
    (note,) = matched(model, targets=["head"]).notes
    assert "embed.weight" in note


def test_matching_is_linear_in_the_number_of_sites():
    """Six hundred thousand comparisons for a quadratic rule: far above what the bound lets through."""

    def seconds(layers: int) -> float:
        with torch.device("meta"):
            model: Any = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(layers))})
        best = []
        for _ in range(3):
            start = time.process_time()
            matched(model)
            best.append(time.process_time() - start)
        return min(best)

    assert seconds(800) < 3 * 8 * max(seconds(100), 1e-3)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(12, 2), nn.Linear(12, 10)


@pytest.mark.parametrize("method", ["qlora", "loftq", "qpissa"])
def test_weights_that_a_method_cannot_hold_in_4_bits_are_spared(method):
    matched = match(Attends(), lrcompile.spec(method, rank=2))
    assert [site.name for site in matched.hit] == ["attention.out_proj", "out"]
    assert [(site.name, why) for site, why in matched.spared] == [
        ("attention.in_proj_weight", f"{method} holds weights of nn.Linear and Conv1D in 4 bits, no others")
    ]
    with pytest.raises(lrcompile.TargetError, match="in 4 bits"):
        match(Attends(), lrcompile.spec(method, rank=2, targets=["in_proj_weight"]))
