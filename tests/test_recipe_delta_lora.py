"""Delta-LoRA (arXiv 2309.02411): beside an untouched base it is the algorithm that writes W after every step."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile

K, RATIO, RANK, SCALE = 3, 1.7, 2, 1.5
X = torch.linspace(-1, 1, 28, dtype=torch.float64).reshape(4, 7)


def base(dtype=torch.float64) -> Any:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 6)).to(dtype)


def delta_lora(model: Any = None, **fields) -> Any:
    given = {"rank": RANK, "alpha": SCALE * RANK, "start_step": K, "ratio": RATIO, "seed": 1, "dtype": "float64"}
    return lrcompile.apply(base() if model is None else model, lrcompile.spec("delta-lora", **given | fields))


def pair(model: Any, index: int = 0) -> Any:
    return model[index].lrcompile_adapters["weight"]["default"]


def loss_of(y: torch.Tensor, number: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(number)
    return (y - torch.randn(y.shape, generator=g, dtype=torch.float64)).square().mean()


def inputs(number: int) -> torch.Tensor:
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(100 + number), dtype=torch.float64)


def take(model: Any, optimizer: Any, steps: int, start: int = 0) -> Any:
    for number in range(start + 1, start + steps + 1):
        optimizer.zero_grad()
        loss_of(model(inputs(number)), number).backward()
        optimizer.step()
    return model


class Literal(nn.Module):
    """The algorithm as it is written down: two maps whose W really moves, t counted from 0."""

    def __init__(self, adapted: Any):
        super().__init__()
        self.W = [adapted[i].weight.detach().clone() for i in (0, 2)]
        self.b = [adapted[i].bias.detach().clone() for i in (0, 2)]
        self.A = nn.ParameterList(pair(adapted, i).A.detach().clone() for i in (0, 2))
        self.B = nn.ParameterList(pair(adapted, i).B.detach().clone() for i in (0, 2))
        self.t = 0

    def layer(self, i: int, x: torch.Tensor) -> torch.Tensor:
        return x @ self.W[i].T + self.b[i] + SCALE * x @ self.A[i].T @ self.B[i].T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(1, self.layer(0, x).tanh())

    def products(self) -> list[torch.Tensor]:
        return [(B @ A).detach() for A, B in zip(self.A, self.B, strict=True)]

    def step(self, optimizer: torch.optim.Optimizer, start_step: int, ratio: float) -> None:
        """Step t: parameters t → t + 1, and W with them where t > K."""
        before = self.products()
        optimizer.step()
        if self.t > start_step:
            for i, (new, old) in enumerate(zip(self.products(), before, strict=True)):
                self.W[i] = self.W[i] + ratio * SCALE * (new - old)
        self.t += 1


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
}


@pytest.mark.parametrize("start_step", [0, K])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_the_literal_algorithm_over_30_steps(optimizer, start_step):
    model = delta_lora(start_step=start_step)
    literal = Literal(model)
    make = OPTIMIZERS[optimizer]
    ours, theirs = lrcompile.optimizer(model, lambda p, lr: make(p), lr=0.0), make(literal.parameters())
    for number in range(1, 31):
        take(model, ours, 1, number - 1)
        theirs.zero_grad()
        loss_of(literal(inputs(number)), number).backward()
        literal.step(theirs, start_step, RATIO)
        for i, index in enumerate((0, 2)):
            torch.testing.assert_close(pair(model, index).A, literal.A[i], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(pair(model, index).B, literal.B[i], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model(X), literal(X), rtol=1e-12, atol=1e-12)
    assert all(float(B.detach().abs().max()) > 0.05 for B in literal.B)


def moved(model: Any, index: int) -> torch.Tensor:
    """W_T − W_0 of the literal algorithm, as this form holds it: all of the update but s·BA."""
    adapter = pair(model, index)
    return adapter.delta(torch.float64) - SCALE * (adapter.B @ adapter.A).detach()


@pytest.mark.parametrize("start_step", [0, K])
def test_the_weight_has_moved_by_the_telescoped_sum_and_its_rank_is_at_most_2r(start_step):
    model = delta_lora(start_step=start_step)
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.05, weight_decay=0.1)
    take(model, optimizer, start_step + 1)
    started = [(pair(model, i).B @ pair(model, i).A).detach() for i in (0, 2)]
    take(model, optimizer, 12, start_step + 1)
    for i, index in enumerate((0, 2)):
        product = (pair(model, index).B @ pair(model, index).A).detach()
        expected = RATIO * SCALE * (product - started[i])
        torch.testing.assert_close(moved(model, index), expected, rtol=1e-12, atol=1e-13)
        assert torch.linalg.matrix_rank(moved(model, index), rtol=1e-9) == 2 * RANK
        effective = model[index].weight + pair(model, index).delta(torch.float64)
        said = base()[index].weight + SCALE * (1 + RATIO) * product - RATIO * SCALE * started[i]
        torch.testing.assert_close(effective, said, rtol=1e-12, atol=1e-13)


def test_the_weight_is_untouched_up_to_the_start_and_plain_lora_until_then():
    model = delta_lora()
    plain = lrcompile.apply(base(), lrcompile.spec("lora", rank=RANK, alpha=SCALE * RANK, seed=1, dtype="float64"))
    one, other = (lrcompile.optimizer(each, torch.optim.AdamW, lr=0.05) for each in (model, plain))
    for number in range(1, K + 2):  # W moves in step K + 2: the first after t > K was reached
        take(model, one, 1, number - 1)
        take(plain, other, 1, number - 1)
        assert all(torch.equal(pair(model, i).B, pair(plain, i).B) for i in (0, 2))
        assert all(not moved(model, i).any() or number == K + 1 for i in (0, 2))
        assert float(moved(model, 0).abs().max()) < 1e-14
    torch.testing.assert_close(model(X), plain(X), rtol=1e-13, atol=1e-13)
    take(model, one, 1, K + 1)
    assert float(moved(model, 0).abs().max()) > 1e-3
    assert all(torch.equal(model[i].weight, base()[i].weight) for i in (0, 2))


def test_starting_changes_no_output_and_no_value():
    model = delta_lora(start_step=0)
    with torch.no_grad():
        for i in (0, 2):
            pair(model, i).B.normal_()
    y = model(X).detach()
    for i in (0, 2):
        pair(model, i).follow()
        A, _ = pair(model, i).factors()
        assert torch.equal(A[:RANK], pair(model, i).A)
    torch.testing.assert_close(model(X), y, rtol=1e-13, atol=1e-13)


def test_the_factors_get_the_gradient_of_s_and_the_input_that_of_the_effective_weight():
    model: Any = nn.Sequential(nn.Linear(7, 5)).double()
    delta_lora(model)
    adapter = pair(model)
    with torch.no_grad():
        adapter.B.normal_()
        adapter.follow()
        adapter.A.normal_()
        adapter.B.normal_()
    x = X.clone().requires_grad_()
    y = model(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    G = upstream.T @ X
    A, B = adapter.A.detach(), adapter.B.detach()
    torch.testing.assert_close(adapter.A.grad, SCALE * B.T @ G, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapter.B.grad, SCALE * G @ A.T, rtol=1e-12, atol=1e-12)
    effective = model[0].weight.detach() + adapter.delta(torch.float64)
    torch.testing.assert_close(x.grad, upstream @ effective, rtol=1e-12, atol=1e-12)
    assert adapter.A0.grad is None
    assert adapter.B0.grad is None


def test_accumulating_gradients_moves_the_weight_once_a_step():
    runs = []
    for parts in (1, 4):
        model = delta_lora()
        optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.05)
        for number in range(1, 9):
            optimizer.zero_grad()
            for x in inputs(number).chunk(parts):
                (model(x).square().sum() / 4).backward()
            optimizer.step()
        runs.append(model)
    for i in (0, 2):
        torch.testing.assert_close(moved(runs[0], i), moved(runs[1], i), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(pair(runs[0], i).B0, pair(runs[1], i).B0, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stop", [2, K + 1, 7], ids=["before the start", "at the start", "after it"])
def test_a_resumed_run_continues_to_the_bit(stop):
    def run(steps, start=0, file=None):
        model = delta_lora(dtype=None)
        optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.05)
        if file is not None:
            loaded = torch.load(io.BytesIO(file), weights_only=True)
            model.load_state_dict(loaded["model"])
            optimizer.load_state_dict(loaded["optimizer"])
        take(model, optimizer, steps, start)
        buffer = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
        return model, buffer.getvalue()

    whole, _ = run(10)
    _, file = run(stop)
    resumed, _ = run(10 - stop, stop, file)
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())
    assert torch.equal(whole(X), resumed(X))


def test_a_saved_adapter_computes_the_same_when_it_is_loaded(tmp_path):
    model = delta_lora()
    take(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=0.05), 8)
    lrcompile.save(model, tmp_path / "a")
    loaded = lrcompile.load(base(), tmp_path / "a", trainable=True)
    assert torch.equal(loaded(X), model(X))
    take(loaded, lrcompile.optimizer(loaded, torch.optim.AdamW, lr=0.05), K + 3)  # follows on from the same product
    assert all(torch.equal(pair(loaded, i).B0, pair(model, i).B0) for i in (0, 2))


def test_an_optimizer_ahead_of_its_model_is_refused():
    model = delta_lora()
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.05)
    take(model, optimizer, K + 2)
    fresh = delta_lora()
    ahead = lrcompile.optimizer(fresh, torch.optim.AdamW, lr=0.05)
    ahead.load_state_dict(optimizer.state_dict())
    with pytest.raises(lrcompile.AdapterError, match="has taken 5 steps, and the weight at '0' does not follow yet"):
        take(fresh, ahead, 1)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: m.half().double(), lambda m: m.bfloat16().double()])
def test_copies_and_casts_go_on_following(how):
    model = delta_lora()
    take(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=0.05), 8)
    other = how(model)
    assert all(pair(other, i).follows and bool(pair(other, i).following) for i in (0, 2))
    assert float(moved(other, 0).abs().max()) > 1e-3


def test_it_trains_beside_an_nf4_base_as_the_literal_algorithm_does_beside_its_values():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(64, 5, bias=False))
    lrcompile.quantize(model, "nf4", compute_dtype="float32")
    values = nn.Sequential(nn.Linear(64, 5, bias=False))
    values[0].weight.data = model(torch.eye(64)).T.contiguous()
    twins = [delta_lora(each, dtype=None) for each in (model, values)]
    codes = {k: v.clone() for k, v in model.state_dict().items() if "lrcompile" not in k}
    for each in twins:
        optimizer = lrcompile.optimizer(each, torch.optim.SGD, lr=0.05)
        for number in range(8):
            x = torch.randn(6, 64, generator=torch.Generator().manual_seed(number))
            optimizer.zero_grad()
            (each(x) - x[:, :5]).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in codes.items())
    assert all(pair(each).follows for each in twins)
    # Float32 sums of 64 terms in another order, over 8 steps.
    torch.testing.assert_close(pair(twins[0]).B, pair(twins[1]).B, rtol=1e-4, atol=1e-6)
    assert float(moved(twins[0], 0).abs().max()) > 1e-4


def test_merge_and_unmerge_materialise_what_the_weight_has_become():
    model = delta_lora()
    take(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=0.05), 9)
    y, kept = model(X).detach(), [pair(model, i).delta(torch.float64) for i in (0, 2)]
    lrcompile.merge(model)
    torch.testing.assert_close(model(X), y, rtol=1e-12, atol=1e-12)
    for index, delta in zip((0, 2), kept, strict=True):
        torch.testing.assert_close(model[index].weight - base()[index].weight, delta, rtol=1e-12, atol=1e-13)
    lrcompile.unmerge(model)
    assert all(torch.equal(model[i].weight, base()[i].weight) for i in (0, 2))
    lrcompile.remove(model)
    assert torch.equal(model(X), base()(X))


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 6))

    def forward(self, x):
        return (x @ self.weight).tanh()


ELSEWHERE: dict[str, Any] = {
    "captured graph": lambda: torch.export.export(base(), (X,)).module(),
    "raw parameter": lambda: nn.Sequential(Raw().double()),
    "packed attention": lambda: nn.TransformerEncoderLayer(7, 1, 9, dropout=0.0, batch_first=True).double(),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_it_follows_at_every_kind_of_site(kind):
    torch.manual_seed(5)
    model = ELSEWHERE[kind]()
    targets = ["0"] if kind == "raw parameter" else "all-linear"
    delta_lora(model, start_step=0, targets=targets)
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.05)
    x = X.unsqueeze(0) if kind == "packed attention" else X
    for number in range(3):
        optimizer.zero_grad()
        y = model(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        optimizer.step()
        if number == 1:
            assert all(m.follows for m in model.modules() if hasattr(m, "follows"))
    y = model(x).detach()
    lrcompile.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_it_trains_as_it_does_uncompiled_through_its_start(backend):
    model, twin = delta_lora(start_step=1), delta_lora(start_step=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    optimizers = [lrcompile.optimizer(each, torch.optim.SGD, lr=0.1) for each in (model, twin)]
    for number in range(1, 6):
        for each, optimizer in zip((compiled, twin), optimizers, strict=True):
            take(each, optimizer, 1, number - 1)
    for i in (0, 2):
        torch.testing.assert_close(pair(model, i).B, pair(twin, i).B, rtol=1e-12, atol=1e-12)


def test_dropout_is_no_field_of_it_and_start_and_ratio_are_required():
    with pytest.raises(lrcompile.SpecError, match="has no dropout: W and BA must see the same gradient"):
        lrcompile.spec("delta-lora", start_step=1, ratio=0.5, dropout=0.1)
    for fields in ({"start_step": 1}, {"ratio": 0.5}):
        with pytest.raises(lrcompile.SpecError, match="has no usual value"):
            lrcompile.spec("delta-lora", **fields)
    for wrong in ({"start_step": -1}, {"ratio": 0.0}, {"ratio": float("inf")}):
        with pytest.raises(lrcompile.SpecError, match="is not valid for delta-lora"):
            lrcompile.spec("delta-lora", **{"start_step": 1, "ratio": 0.5} | wrong)


def test_its_start_is_the_base_to_the_bit_and_only_the_pair_trains():
    model = delta_lora()
    assert torch.equal(model(X), base()(X))
    names = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"A", "B"}


def test_under_autocast_the_factors_keep_their_bits_and_their_gradients_their_share():
    model: Any = nn.Sequential(nn.Linear(7, 5))
    delta_lora(model, dtype=None)
    adapter = pair(model)
    with torch.no_grad():
        adapter.B.normal_()
        adapter.follow()
    grads = {}
    for following in (True, False):
        adapter.zero_grad()
        adapter.follows = following
        with torch.autocast("cpu", torch.bfloat16):
            y = model(X.float())
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        grads[following] = (adapter.A.grad.clone(), adapter.B.grad.clone())
        A, _ = adapter.factors()
        assert torch.equal(A[:RANK], adapter.A)
        assert A.dtype == torch.float32
    for followed, plain in zip(grads[True], grads[False], strict=True):
        # Both are sums of a few products of bfloat16 numbers; 2⁻⁸ is its unit roundoff.
        torch.testing.assert_close(followed, plain, rtol=2**-5, atol=2**-5 * float(plain.abs().max()))
