"""The mean gradient at each site: its values for every kind of weight, its memory, and what is wrong with bad ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lrcompile
from lrcompile.matching import match
from lrcompile.recipes.calibration.gradients import Gradients

transformers = pytest.importorskip("transformers")


def gradients(model, data, loss=None, **fields):
    spec = lrcompile.spec("lora-one", rank=2, **fields)
    return Gradients(model, spec, match(model, spec).hit).run(data, loss)[1]


def square(output, batch):
    return output.square().mean()


def mlp():
    return nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 6)).double()


def batches(number=3, width=7):
    return [(torch.randn(5, width, dtype=torch.float64),) for _ in range(number)]


def test_it_is_the_mean_over_batches_of_the_gradient_at_the_weight():
    net, data = mlp(), batches()
    found = gradients(net, data, square)
    expected = torch.autograd.grad(sum(square(net(*b), b) for b in data) / 3, [net[0].weight, net[2].weight])
    for site, value in zip(("0", "2"), expected, strict=True):
        torch.testing.assert_close(found[site], value, rtol=1e-13, atol=1e-15)


def test_a_transposed_weight_has_its_gradient_as_out_by_in():
    from transformers.pytorch_utils import Conv1D

    linear, conv = nn.Linear(7, 11).double(), Conv1D(11, 7).double()
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
        conv.bias.copy_(linear.bias)
    data = batches()
    found = gradients(nn.Sequential(conv), data, square, targets=["0"])["0"]
    assert found.shape == (11, 7)
    expected = gradients(nn.Sequential(linear), data, square, targets=["0"])["0"]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)


class Mixed(nn.Module):
    """An embedding, attention with a packed weight, and a raw matrix."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = Raw()

    def forward(self, ids):
        x = self.embed(ids)
        return self.last(self.attention(x, x, x)[0])


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 5) / 3)

    def forward(self, x):
        return x @ self.matrix


def test_every_kind_of_site_with_a_parameter_has_one():
    net = Mixed().double()
    data = [(torch.randint(13, (2, 6)),) for _ in range(2)]
    found = gradients(net, data, square, targets=["embed", "in_proj_weight", "out_proj", "matrix"])
    assert {site: tuple(g.shape) for site, g in found.items()} == {
        "embed": (8, 13),
        "attention.in_proj_weight": (24, 8),
        "attention.out_proj": (8, 8),
        "last.matrix": (5, 8),
    }
    expected = torch.autograd.grad(
        sum(square(net(*b), b) for b in data) / 2, [net.embed.weight, net.attention.in_proj_weight, net.last.matrix]
    )
    torch.testing.assert_close(found["embed"], expected[0].T)
    torch.testing.assert_close(found["attention.in_proj_weight"], expected[1])
    torch.testing.assert_close(found["last.matrix"], expected[2].T)
    lrcompile.apply(net, lrcompile.spec("lora-ga", rank=2, targets=["embed", "matrix"]), data=data, loss=square)


def test_the_weights_of_experts_are_a_stack():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=3, num_experts_per_tok=2, vocab_size=31)  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    ids = torch.randint(31, (2, 9))
    data = [{"input_ids": ids, "labels": ids}]
    for method in ("lora-ga", "lora-one", "lora-sb"):
        more = {"first_lr": 1e-3} if method == "lora-sb" else {}
        spec = lrcompile.spec(method, rank=2, targets=["gate_up_proj", "down_proj"], **more)
        lrcompile.apply(model, spec, name=method, data=data)
        assert lrcompile.report(model).to_dict()["sites"]
        assert torch.isfinite(model(**data[0]).loss)


def test_the_gradients_of_two_weights_never_live_at_a_time():
    net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    alive, most = [], []

    def look(parameter):
        alive.append(sum(p.grad is not None for p in net.parameters()))
        most.append(max(alive))

    handles = [p.register_hook(lambda g, p=p: look(p)) for p in net.parameters()]
    spec = lrcompile.spec("lora-one", rank=2, targets=[str(i) for i in range(6)])
    Gradients(net, spec, match(net, spec).hit).run([(torch.randn(5, 8),)] * 3, square)
    for handle in handles:
        handle.remove()
    assert len(alive) == 18  # weights only: the biases are frozen
    assert max(most) == 0  # as one gradient arrives, the one before is gone


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing_it_is_the_same(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()
            self.first = nn.Linear(7, 7).double()

        def forward(self, x):
            return checkpoint(self.inner, self.first(x), use_reentrant=reentrant)

    net, data = Checkpointed(), batches()
    found = gradients(net, data, square, targets=["0", "2", "first"])
    expected = gradients(nn.Sequential(net.first, net.inner), data, square, targets=["0", "1.0", "1.2"])
    for site, other in (("first", "0"), ("inner.0", "1.0"), ("inner.2", "1.2")):
        torch.testing.assert_close(found[site], expected[other], rtol=1e-13, atol=1e-15)


def test_half_precision_gradients_are_added_up_in_float32():
    net = nn.Sequential(nn.Linear(7, 6, bias=False)).bfloat16()
    with torch.no_grad():
        net.get_parameter("0.weight").zero_()
    big, small = torch.full((1, 7), 256.0).bfloat16(), torch.full((1, 7), 1.0).bfloat16()
    total = gradients(net, [(big,), (small,)], lambda out, batch: out.sum(), targets=["0"], batches=2)["0"]
    assert torch.equal(total, torch.full((6, 7), 257 / 2))  # 257 has no bfloat16


def test_a_weight_held_by_two_modules_is_refused():
    net = nn.Sequential(nn.Embedding(9, 9), nn.Linear(9, 9, bias=False))
    net[1].weight = net[0].weight
    with pytest.raises(lrcompile.TargetError, match=r"1 shares its weight with 0.weight.*untie"):
        lrcompile.apply(
            net, lrcompile.spec("lora-one", rank=2, targets=["1"]), data=[(torch.tensor([1]),)], loss=square
        )


class Bad(nn.Module):
    """`scale` multiplies what goes from the first to the second site, `after` what comes out of the second."""

    def __init__(self, before=1.0, scale=1.0, after=1.0):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(7, 9), nn.Linear(9, 8), nn.Linear(8, 6)
        self.before, self.scale, self.after = before, scale, after

    def forward(self, x):
        return self.third(self.second(self.first(x * self.before) * self.scale)) * self.after


def spoiled(name):
    net = Bad()
    with torch.no_grad():
        net.get_parameter(f"{name}.weight")[1, 2] = torch.inf
    return net


@pytest.mark.parametrize(
    ("net", "site", "why"),
    [
        (spoiled("second"), "'second'", "its input is finite: look at its weight"),
        (spoiled("third"), "'third'", "its input is finite: look at its weight"),
        (Bad(before=torch.nan), "'first'", "its input is not finite either"),
        (Bad(scale=torch.inf), "'second'", "its input is not finite either"),
        (Bad(after=torch.nan), "outputs of all its adapted sites are finite", "labels and the loss"),
    ],
)
def test_a_loss_that_is_not_finite_names_the_first_site_where_it_arises(net, site, why):
    data = [(torch.randn(4, 7),)] * 2
    with pytest.raises(lrcompile.AdapterError, match=rf"the loss of batch 0 is (nan|inf); .*{site}.*{why}"):
        lrcompile.apply(net, lrcompile.spec("lora-ga", rank=2), data=data, loss=square)


def test_it_finds_the_site_under_the_same_dropout():
    class Rare(nn.Module):
        """Not finite for some masks only, so that a run with others would find nothing."""

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(7, 6), nn.Linear(6, 6)

        def forward(self, x):
            lucky = torch.rand(()) < 0.05
            return self.last(torch.where(lucky, torch.nan, self.first(x)))

    data = [(torch.randn(4, 7),)] * 200
    with pytest.raises(lrcompile.AdapterError, match="first site whose output is not finite is 'last'"):
        lrcompile.apply(Rare(), lrcompile.spec("lora-ga", rank=2, batches=200, seed=0), data=data, loss=square)


class Steep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def test_a_gradient_that_is_not_finite_names_its_sites():
    class Overflowing(Bad):
        def forward(self, x):
            return self.third(Steep.apply(self.second(self.first(x))))

    with pytest.raises(lrcompile.AdapterError, match=r"gradient of batch 0 is not finite at 2 sites.*first, second\)"):
        lrcompile.apply(Overflowing(), lrcompile.spec("lora-ga", rank=2), data=[(torch.randn(4, 7),)], loss=square)


class Dead(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.hidden, self.zeroed = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        with torch.no_grad():
            y = self.hidden(x)
        return self.used(x) + y + 0 * self.zeroed(x)


def test_sites_no_gradient_reaches_are_named():
    with pytest.raises(lrcompile.TargetError, match=r"reaches 3 sites:\n  unused\n  hidden\n  zeroed\n") as caught:
        lrcompile.apply(Dead(), lrcompile.spec("lora-ga", rank=2), data=[(torch.randn(4, 6),)], loss=square)
    assert "Exclude them" in str(caught.value)
    spec = lrcompile.spec("lora-ga", rank=2, exclude=["unused", "hidden", "zeroed"])
    lrcompile.apply(Dead(), spec, data=[(torch.randn(4, 6),)], loss=square)


def test_a_graph_has_gradients_too():
    x = torch.randn(5, 7, dtype=torch.float64)
    net = mlp()
    graph = torch.export.export(net, (x,)).module()
    found = gradients(graph, [(x,)], square)
    expected = gradients(net, [(x,)], square)
    assert len(found) == 2
    for site, value in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(found[site], value, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("method", ["lora-ga", "lora-one", "lora-sb", "corda"])
def test_an_nf4_base_is_refused_with_the_reason(method):
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    lrcompile.quantize(net, "nf4", targets=["0", "1"])
    more = {"first_lr": 1e-3} if method == "lora-sb" else {}
    spec = lrcompile.spec(method, rank=2, targets=["0"], **more)
    with pytest.raises(lrcompile.TargetError, match=r"NF4 codes.*float model"):
        lrcompile.apply(net, spec, data=[(torch.randn(4, 64),)], loss=square)


def test_the_loss_is_computed_once_for_each_batch():
    calls = []

    def loss(output, batch):
        calls.append(1)
        return F.mse_loss(output, torch.zeros_like(output))

    gradients(mlp(), batches(3), loss)
    assert len(calls) == 3
