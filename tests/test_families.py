"""Every promise of an adapter on tiny models of the `transformers` families: each holds, or `apply` refuses by name."""

from __future__ import annotations

import re

import pytest
from zoo.building import Family
from zoo.conformance import Outcome, check, refused_cleanly
from zoo.families import FAMILIES

import lrcompile

QUICK = ("llama", "gemma2", "gpt2", "opt", "bert", "t5", "vit", "siglip", "wav2vec2", "mixtral", "gpt_oss", "mamba")


def _marked(families: list[Family]) -> list:
    return [pytest.param(f, id=f.name, marks=() if f.name in QUICK else pytest.mark.slow) for f in families]


def _spec(family: Family, **fields) -> lrcompile.Spec:
    ranks = {name: 1 for name in family.narrow}
    return lrcompile.spec("lora", rank=3, alpha=5, seed=0, **{"rank_pattern": ranks, **fields})


def _require(outcome: Outcome) -> None:
    assert not outcome.refusal
    assert not outcome.failures
    assert outcome.sites


def test_there_are_at_least_forty_families_of_every_kind():
    assert len({family.model for family in FAMILIES}) == len(FAMILIES) >= 40
    kinds = {"decoder", "encoder", "encoder-decoder", "vision", "speech", "mixture", "state-space", "recurrent"}
    assert {family.kind for family in FAMILIES} == kinds


@pytest.mark.parametrize("family", _marked(list(FAMILIES)))
def test_adapters_on_all_linear_maps_keep_every_promise(family: Family):
    _require(check(family.build, _spec(family, exclude=family.bypassed), exports=family.base_exports))


@pytest.mark.parametrize("family", _marked([f for f in FAMILIES if f.also and not f.refused]))
def test_adapters_on_embeddings_experts_and_attention_keep_every_promise(family: Family):
    _require(check(family.build, _spec(family, targets=family.also, rank_pattern={}), exports=family.base_exports))


@pytest.mark.parametrize("family", _marked([f for f in FAMILIES if f.refused]))
def test_what_cannot_be_adapted_is_refused_by_name(family: Family):
    message = refused_cleanly(family.build, _spec(family, targets=family.also, rank_pattern={}))
    assert re.search(family.refused, message, re.DOTALL), message


@pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in FAMILIES if f.bypassed])
def test_a_linear_map_whose_own_module_is_never_called_is_refused_by_name(family: Family):
    message = refused_cleanly(family.build, _spec(family))
    assert all(name in message for name in family.bypassed), message
