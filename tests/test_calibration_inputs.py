"""What comes into each site: covariance, principal directions, and the ranks that are dealt out by them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lrcompile
from lrcompile.matching import match
from lrcompile.recipes.calibration.covariance import Covariance
from lrcompile.recipes.calibration.directions import Directions
from lrcompile.recipes.calibration.principal import Principal
from lrcompile.recipes.calibration.ranks import redistributed, with_ranks

transformers = pytest.importorskip("transformers")


def covariance(model, data, **fields):
    spec = lrcompile.spec("corda", rank=2, **fields)
    return Covariance(model, spec, match(model, spec).hit).run(data, None)[1]


def directions(model, data, **fields):
    spec = lrcompile.spec("eva", **fields)
    return Directions(model, spec, match(model, spec).hit).run(data, None)


def mlp():
    return nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 6)).double()


def test_the_covariance_is_the_mean_of_outer_products_over_all_tokens():
    net = mlp()
    data = [(torch.randn(2, 5, 7, dtype=torch.float64),), (torch.randn(3, 7, dtype=torch.float64),)]
    found = covariance(net, data)
    tokens = torch.cat([data[0][0].reshape(-1, 7), data[1][0]])
    torch.testing.assert_close(found["0"], tokens.T @ tokens / 13, rtol=1e-13, atol=1e-15)
    hidden = net[1](net[0](tokens))
    torch.testing.assert_close(found["2"], hidden.T @ hidden / 13, rtol=1e-13, atol=1e-15)


class Language(nn.Module):
    """A model with an attention mask and labels, as `transformers`' are."""

    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(20, 7), nn.Linear(7, 6)

    def forward(self, ids, attention_mask=None, labels=None):
        return self.body(self.embed(ids))


def test_padding_does_not_count_nor_do_ignored_labels_for_eva():
    net = Language().double()
    ids = torch.randint(20, (2, 4))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    labels = torch.tensor([[-100, 3, 3, -100], [3, 3, -100, -100]])
    batch = {"ids": ids, "attention_mask": mask, "labels": labels}
    tokens = net.embed(ids)[mask.bool()].detach()
    torch.testing.assert_close(covariance(net, [batch], targets=["body"])["body"], tokens.T @ tokens / 5)
    rows = directions(net, [batch], rank=2, targets=["body"])[1]["body"]
    counted = net.embed(ids)[mask.bool() & (labels != -100)].detach()
    expected = torch.linalg.svd(counted - counted.mean(0), full_matrices=False)[2][:2]
    torch.testing.assert_close((rows @ expected.T).abs(), torch.eye(2).double())


def test_a_mask_of_another_shape_than_the_input_drops_nothing():
    class Pooled(Language):
        def forward(self, ids, attention_mask=None, labels=None):
            return self.body(self.embed(ids).mean(1))

    net, ids = Pooled().double(), torch.randint(20, (5, 4))
    found = covariance(net, [{"ids": ids, "attention_mask": torch.zeros(5, 4)}], targets=["body"])["body"]
    pooled = net.embed(ids).mean(1).detach()
    torch.testing.assert_close(found, pooled.T @ pooled / 5)


def tokens_of(rank, width, number, generator):
    return (
        torch.randn(number, rank, generator=generator).double() @ torch.randn(rank, width, generator=generator).double()
    )


@settings(deadline=None, max_examples=25, derandomize=True)
@given(seed=st.integers(0, 99), rank=st.integers(1, 5), sizes=st.lists(st.integers(2, 9), min_size=1, max_size=4))
def test_incremental_directions_are_those_of_all_centred_tokens(seed, rank, sizes):
    draw = torch.Generator().manual_seed(seed)
    tokens = tokens_of(rank, 8, sum(sizes), draw) + 3  # of at most as many directions as are kept: nothing is cut off
    found = Principal(5)
    for batch in tokens.split(sizes):
        found.take(batch)
    centred = tokens - tokens.mean(0)
    values, rows = torch.linalg.svd(centred, full_matrices=False)[1:]
    kept = len(found.explained())
    eps = torch.finfo(torch.float64).eps
    assert kept == int((values > 1e-9 * values[0]).sum())
    assert torch.allclose(found.explained(), values[:kept].square() / values.square().sum(), rtol=1e-9)
    assert torch.allclose(
        found.components @ found.components.T, torch.eye(len(found.components)).double(), atol=64 * eps
    )
    projector = rows[:kept].T @ rows[:kept]
    ours = found.components[:kept].T @ found.components[:kept]
    assert torch.allclose(ours, projector, atol=1e-6)  # directions of close values mix; their span does not


def test_directions_are_those_of_the_incremental_pca_that_peft_has():
    from peft.utils.incremental_pca import IncrementalPCA

    theirs, ours = IncrementalPCA(n_components=3), Principal(3)
    for number in (9, 6, 7):
        batch = torch.randn(number, 8, dtype=torch.float64) * torch.arange(1, 9) + 2
        theirs.partial_fit(batch)
        ours.take(batch)
        torch.testing.assert_close((ours.components * theirs.components_).sum(1).abs(), torch.ones(3).double())
        torch.testing.assert_close(ours.explained(), theirs.explained_variance_ratio_.double())


def test_directions_converge_when_they_stay_and_not_before():
    found = Principal(2)
    batch = torch.randn(6, 5)
    found.take(batch)
    assert not found.converged(1, 0.0)  # one batch has nothing to be compared with
    found.take(batch)
    assert found.converged(2, 0.999)
    found.take(torch.randn(6, 5) * torch.tensor([1, 1, 1, 1, 50.0]))
    assert not found.converged(2, 0.99)


def test_directions_of_large_batches_are_close_to_the_exact_ones():
    """More than 256 tokens and features: a randomised SVD, good where the spectrum falls."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(400, 300, generator=draw).double() * 0.8 ** torch.arange(300)
    found = Principal(6)
    found.take(tokens)
    rows = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)[2][:6]
    torch.testing.assert_close((found.components * rows).sum(1).abs(), torch.ones(6).double(), rtol=1e-4, atol=0)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(data=st.data())
def test_ranks_add_up_to_the_budget_and_the_best_directions_win(data):
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    budget = data.draw(st.integers(len(lengths), sum(lengths)))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    ratios = {str(i): torch.rand(n, generator=draw).sort(descending=True).values for i, n in enumerate(lengths)}
    ranks = redistributed(ratios, budget)
    assert sum(ranks.values()) == budget
    assert all(1 <= ranks[name] <= len(ratio) for name, ratio in ratios.items())
    won = [float(v) for name, ratio in ratios.items() for v in ratio[1 : ranks[name]]]
    lost = [float(v) for name, ratio in ratios.items() for v in ratio[ranks[name] :]]
    assert not won or not lost or min(won) >= max(lost)


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
def test_new_ranks_hit_exactly_their_sites_and_keep_the_scale(scaling):
    spec = lrcompile.spec("eva", rank=4, alpha=6, rank_pattern={"q": 3}, alpha_pattern={"k": 5}, scaling=scaling)
    ranks = {"q": 1, "layers.0.q": 2, "encoder.layers.0.q": 7, "layersx0.q": 5, "k": 4, "a-b.k": 6}
    new = with_ranks(spec, ranks)
    assert {name: new.rank_of(name) for name in ranks} == ranks
    for name in ranks:
        assert new.scale_of(name) == pytest.approx(spec.scale_of(name), rel=1e-15)
    assert lrcompile.Spec.from_dict(new.to_dict()) == new


def test_methods_of_inputs_leave_alone_what_is_no_layer_that_is_called():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

        def forward(self, x):
            return self.last(self.attention(x, x, x)[0])

    for method in ("corda", "eva"):
        net = Mixed()
        spec = lrcompile.spec(method, rank=2, exclude=["out_proj"])
        lrcompile.apply(net, spec, data=[(torch.randn(3, 9, 8),)])
        assert type(net.attention) is nn.MultiheadAttention
        rows = {row["name"]: row for row in lrcompile.report(net).to_dict()["sites"]}
        assert "what comes into it cannot be watched" in rows["attention.in_proj_weight"]["reason"]
        with pytest.raises(lrcompile.TargetError, match="what comes into it cannot be watched"):
            lrcompile.apply(Mixed(), lrcompile.spec(method, rank=2, targets=["in_proj_weight"]), data=[])


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, attention_mask=None):
        return self.used(x)


@pytest.mark.parametrize("method", ["corda", "eva"])
def test_sites_no_input_reaches_are_named(method):
    with pytest.raises(lrcompile.TargetError, match=r"no input reaches 1 sites on this data:\n  unused\n"):
        lrcompile.apply(Unused(), lrcompile.spec(method, rank=2), data=[(torch.randn(5, 6),)])
    padding = [{"x": torch.randn(2, 5, 6), "attention_mask": torch.zeros(2, 5)}]
    with pytest.raises(lrcompile.TargetError, match=r"no input reaches 1 sites on this data:\n  used\n"):
        lrcompile.apply(Unused(), lrcompile.spec(method, rank=2, exclude=["unused"]), data=padding)


@pytest.mark.parametrize("method", ["corda", "eva"])
def test_an_input_that_is_not_finite_names_the_site(method):
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6))
    with torch.no_grad():
        net.get_parameter("0.weight")[0, 0] = torch.inf
    with pytest.raises(lrcompile.AdapterError, match=r"the input of '1' is not finite"):
        lrcompile.apply(net, lrcompile.spec(method, rank=2), data=[(torch.randn(5, 6),)])


def test_inputs_without_any_direction_are_errors_that_name_the_site():
    net = nn.Sequential(nn.Linear(6, 6))
    with pytest.raises(lrcompile.TargetError, match="input of '0' is zero"):
        lrcompile.apply(net, lrcompile.spec("corda", rank=2, targets=["0"]), data=[(torch.zeros(5, 6),)])
    with pytest.raises(lrcompile.TargetError, match="input of '0' is the same for every token"):
        lrcompile.apply(net, lrcompile.spec("eva", rank=2, targets=["0"]), data=[(torch.full((5, 6), 0.1),)])


def test_too_few_directions_for_the_ranks_are_an_error_that_says_how_many():
    net = nn.Sequential(nn.Linear(6, 6))
    with pytest.raises(lrcompile.SpecError, match=r"span 2 directions.*fewer than the sum of ranks \(4\)") as caught:
        lrcompile.apply(net, lrcompile.spec("eva", rank=4, targets=["0"]), data=[(torch.randn(3, 6),)])
    assert caught.value.field == "data"
    few = [(torch.randn(3, 6),) for _ in range(4)]  # two directions a batch, more together
    lrcompile.apply(net, lrcompile.spec("eva", rank=4, targets=["0"]), data=few)
