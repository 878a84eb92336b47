"""Methods are data: known by name, joined through entry points, and their factors start as the papers say."""

from __future__ import annotations

import math
from importlib.metadata import EntryPoint

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lrcompile
from lrcompile import recipes
from lrcompile.recipes.initialisers.random import fill, generator_of


def drawn(
    name="kaiming",
    form="product",
    rank=6,
    inside=33,
    out=21,
    lead=(),
    seed: int | None = 0,
    site="a",
    dtype=torch.float32,
):
    A, B = torch.empty(*lead, rank, inside, dtype=dtype), torch.empty(*lead, out, rank, dtype=dtype)
    fill("lookup" if form == "lookup" else name, A, B, generator_of(seed, site, A.device))
    return A, B


def test_methods_are_sorted_and_each_has_a_recipe_of_its_name():
    assert lrcompile.methods() == tuple(sorted(lrcompile.methods()))
    assert {"lora", "qlora", "rslora"} <= set(lrcompile.methods())
    assert all(recipes.recipe(name).name == name for name in lrcompile.methods())


@pytest.fixture
def plugins(monkeypatch):
    def install(*points: EntryPoint) -> None:
        monkeypatch.setattr(recipes, "entry_points", lambda group: [p for p in points if p.group == group])
        recipes._plugins.cache_clear()

    yield install
    recipes._plugins.cache_clear()


def test_a_method_joins_through_an_entry_point(plugins):
    plugins(EntryPoint("lora-too", "lrcompile.recipes.lora:RECIPE", "lrcompile.methods"))
    assert "lora-too" in lrcompile.methods()
    assert lrcompile.spec("lora-too", rank=2).rank == 2


def test_an_entry_point_never_overrides_a_method(plugins):
    plugins(EntryPoint("lora", "lrcompile.recipes.qlora:RECIPE", "lrcompile.methods"))
    with pytest.raises(lrcompile.LrcompileError, match=r"'lora'.*already"):
        lrcompile.methods()


@settings(deadline=None, max_examples=25, derandomize=True)
@given(name=st.sampled_from(["kaiming", "gaussian"]), rank=st.integers(1, 9), lead=st.sampled_from([(), (3,)]))
def test_B_starts_at_zero_and_A_does_not(name, rank, lead):
    A, B = drawn(name, rank=rank, lead=lead)
    assert not B.any()
    assert A.count_nonzero() == A.numel()


def test_kaiming_is_uniform_up_to_one_over_root_in():
    A, _ = drawn("kaiming", rank=64, inside=400)
    assert A.abs().max() <= 1 / math.sqrt(400)
    # 25600 draws of U(-b, b): the standard deviation is b/√3 within 5 of its own standard errors
    assert float(A.std() * math.sqrt(3 * 400)) == pytest.approx(1, abs=5 * math.sqrt(0.2 / 25600))


def test_gaussian_has_the_deviation_one_over_rank():
    A, _ = drawn("gaussian", rank=64, inside=400)
    assert float(A.std() * 64) == pytest.approx(1, abs=5 / math.sqrt(2 * 25600))


@pytest.mark.parametrize("rank", [2, 3, 8])
def test_orthogonal_factors_are_both_nonzero_and_their_product_is_zero(rank):
    A, B = drawn("orthogonal", rank=rank)
    assert A.any()
    assert B.any()
    assert (B @ A).abs().max() <= 8 * torch.finfo().eps * rank * float(A.abs().max() * B.abs().max())


def test_a_lookup_starts_with_A_zero_and_B_drawn():
    A, B = drawn(form="lookup")
    assert not A.any()
    assert B.count_nonzero() == B.numel()


def test_a_seed_decides_the_values_by_site_alone():
    torch.manual_seed(1)
    first = drawn(seed=5, site="a")[0]
    torch.manual_seed(2)
    assert torch.equal(first, drawn(seed=5, site="a")[0])
    assert not torch.equal(first, drawn(seed=5, site="b")[0])
    assert not torch.equal(first, drawn(seed=6, site="a")[0])


def test_a_seed_leaves_torchs_generator_alone_and_no_seed_uses_it():
    state = torch.get_rng_state()
    drawn(seed=5)
    assert torch.equal(state, torch.get_rng_state())
    drawn(seed=None)
    assert not torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["kaiming", "gaussian", "orthogonal"])
def test_every_initialiser_fills_every_dtype(name, dtype):
    A, B = drawn(name, dtype=dtype)
    assert torch.isfinite(A).all()
    assert torch.isfinite(B).all()
