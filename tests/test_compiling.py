"""`compile`: the model's values and gradients, and graphs that are compiled once for whatever changes in training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lrcompile
from lrcompile import accounts
from lrcompile.errors import AdapterError, SpecError

WIDE, NARROW, VOCABULARY = 12, 9, 11
TARGETS = ["q", "v", "up", "down"]


class Block(nn.Module):
    """Two maps of one input, a sequence dimension that matters, an index."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.doubles = index, False
        self.q, self.v = nn.Linear(WIDE, NARROW), nn.Linear(WIDE, WIDE, bias=False)
        self.up, self.down = nn.Linear(WIDE, 2 * NARROW), nn.Linear(2 * NARROW, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        x = x + torch.softmax(q @ q.mT, -1) @ self.v(x)
        x = x + self.down(torch.tanh(self.up(x)))
        return x * (self.index + 1) if self.doubles else x


class Net(nn.Module):
    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDE)
        self.blocks = nn.ModuleList(Block(index) for index in range(depth))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def adapted(depth: int = 1, method: str = "lora", **ranks: int) -> Any:
    """With an adapter of each name and rank, its factors random; the first one acts and trains."""
    torch.manual_seed(1)
    model = Net(depth).double()
    for name, rank in (ranks or {"a": 3}).items():
        add(model, name, rank, method)
    first = next(iter(ranks or {"a": 3}))
    return lrcompile.activate(model, first, train=first)


def add(model: nn.Module, name: str, rank: int, method: str = "lora") -> None:
    lrcompile.apply(model, lrcompile.spec(method, rank=rank, alpha=2.0 * rank, targets=TARGETS), name=name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype), alpha=0.3)


def compiled(model: nn.Module, **options: Any) -> Any:
    return lrcompile.compile(model, options={"inner": "aot_eager"}, **options)


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(100 * batch + length))


def step(function: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradient of a random linear function of it in every parameter that trains."""
    model.zero_grad()
    y = function(x)
    if y.requires_grad:
        y.backward(torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2)))
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(function: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> None:
    """Outputs and every gradient are eager's, to the rounding of float64."""
    y, gradients = step(function, model, x)
    with torch.compiler.set_stance("force_eager"):
        expected, wanted = step(model, model, x)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    assert gradients.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(gradients[name], wanted[name], rtol=1e-10, atol=1e-11, msg=name)


def graphs(model: nn.Module) -> int:
    """How many graphs were compiled for `model`; none of what ran was given up on."""
    assert not counters["graph_break"]
    return len(accounts.graphs_of(model))


def test_values_scale_a_same_form_adapter_batch_and_length_compile_nothing_anew():
    model = adapted(a=3, b=3)
    run = compiled(model)
    for batch, length in ((4, 4), (2, 7), (5, 3), (7, 7)):
        agree(run, model, ids(batch, length))
    lrcompile.activate(model, {"a": -0.5})
    agree(run, model, ids(2, 7))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    agree(run, model, ids(2, 7))
    lrcompile.activate(model, "b", train="b")
    agree(run, model, ids(3, 5))
    assert graphs(model) == 1


@pytest.mark.parametrize("method", ["lora", "dora", "hira", "lora-drop"])
def test_any_rank_up_to_the_maximum_runs_in_one_graph(method):
    options: dict[str, Any] = {"warmup_steps": 2, "threshold": 0.5} if method == "lora-drop" else {}
    torch.manual_seed(1)
    model: Any = Net().double()
    for name, rank in {"a": 3, "one": 1, "most": 8}.items():
        spec = lrcompile.spec(
            method, rank=rank, targets=TARGETS, **({"alpha": 4.0} if method != "hira" else {}), **options
        )
        lrcompile.apply(model, spec, name=name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".A", ".B", ".m")):
                parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype), alpha=0.3)
    run = compiled(lrcompile.activate(model, "a", train="a"), max_rank=8)
    for name in ("a", "one", "most", "a"):
        agree(run, lrcompile.activate(model, name, train=name), ids(2, 5))
    assert graphs(model) == 1


def test_an_adapter_added_later_is_padded_too():
    model = adapted(a=3)
    run = compiled(model, max_rank=6)
    agree(run, model, ids(2, 5))
    add(model, "later", 5)
    agree(run, model, ids(2, 5))
    assert graphs(model) == 1


def test_without_a_maximum_each_rank_is_compiled_once_and_more_than_torchs_limit_of_them():
    torch.manual_seed(1)
    model: Any = nn.Sequential(nn.Linear(13, 11)).double()
    ranks = [f"r{rank}" for rank in range(1, 11)]
    for name in ranks:
        lrcompile.apply(model, lrcompile.spec("lora", rank=int(name[1:]), targets=["0"]), name=name)
    run = compiled(model)
    for name in (*ranks, *ranks):
        step(run, lrcompile.activate(model, name, train=name), torch.ones(3, 13, dtype=torch.float64))
    assert graphs(model) == 10


def test_a_rank_above_the_maximum_is_refused_by_name_and_changes_nothing():
    model = adapted(small=2, large=5)
    lrcompile.activate(model, "large")
    with pytest.raises(AdapterError, match=r"'large' has rank 5 at blocks\.0\.q.*max_rank=4"):
        compiled(model, max_rank=4)
    lrcompile.activate(model, "small")
    run = compiled(model, max_rank=4)
    with pytest.raises(AdapterError, match="'large' has rank 5"):
        lrcompile.activate(model, "large")
    with pytest.raises(AdapterError, match="'huge' has rank 6"):
        lrcompile.apply(model, lrcompile.spec("lora", rank=6, targets=TARGETS), name="huge")
    assert lrcompile.report(model).active == ("small",)
    assert lrcompile.report(model).adapters == ("small", "large")
    agree(run, model, ids(2, 5))


def test_every_other_combination_is_compiled_once_and_found_again():
    model = adapted(a=3, b=3)
    add(model, "d", 2, "dora")
    lrcompile.activate(model, "a", train="a")
    run = compiled(model)

    def combinations() -> Iterator[None]:
        yield
        with lrcompile.disabled(model):
            yield
        lrcompile.activate(model, ["a", "b"])
        yield
        lrcompile.activate(model, "b", train="a")
        yield
        lrcompile.activate(model, "d", train="d")
        yield
        lrcompile.merge(model)
        yield
        lrcompile.unmerge(model)
        lrcompile.activate(model, "a", train="a")

    seen = []
    for _ in range(2):
        for _ in combinations():
            agree(run, model, ids(2, 5))
        seen.append(graphs(model))
    # merged and disabled are one: no adapter acts in either
    assert seen == [5, 5]


@pytest.mark.parametrize("depth", [2, 6])
def test_by_blocks_the_number_of_graphs_does_not_grow_with_depth(depth):
    model = adapted(depth, a=3, b=4)
    assert compiled(model, regions="blocks", max_rank=4) is model
    agree(model, model, ids(2, 5))
    lrcompile.activate(model, "b", train="b")
    agree(model, model, ids(3, 4))
    # the first block's input needs no gradient, that of the others does
    assert graphs(model) == 2


@pytest.mark.parametrize("depth", [4, 6])
def test_an_index_that_blocks_compute_with_is_no_reason_to_compile_each(depth):
    model = adapted(depth)
    for block in model.blocks:
        block.doubles = True
    compiled(model, regions="blocks")
    agree(model, model, ids(2, 5))
    assert graphs(model) <= 3


def test_a_model_compiled_by_blocks_is_a_model_like_any_other(tmp_path):
    model = adapted(2, a=3)
    plain, base = copy.deepcopy(model), set(Net(2).state_dict())
    x, expected = ids(2, 5), model(ids(2, 5))
    compiled(model, regions="blocks")
    for other in (model, copy.deepcopy(model)):
        torch.testing.assert_close(other(x), expected)
    assert set(model.state_dict()) == set(plain.state_dict())
    lrcompile.save(model, tmp_path / "a")
    torch.save(model, tmp_path / "whole.pt")
    torch.testing.assert_close(torch.load(tmp_path / "whole.pt", weights_only=False)(x), expected)
    lrcompile.merge(model)
    torch.testing.assert_close(model(x), expected)
    lrcompile.remove(model)
    assert set(model.state_dict()) == base
    torch.testing.assert_close(model(x), lrcompile.remove(plain)(x))
    lrcompile.load(model, tmp_path / "a")
    torch.testing.assert_close(model(x), expected)


def saved_bytes(function: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> int:
    """Of what is kept for the backward pass, beside parameters."""
    kept: dict[int, int] = {}
    held = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(x)
    assert y.requires_grad
    return sum(kept.values())


def test_a_memory_budget_keeps_less_for_the_backward_pass_and_gives_the_same_gradients():
    model = adapted(3)
    kept = []
    for budget in (1.0, 0.5, 0.1):
        run = compiled(model, memory_budget=budget)
        agree(run, model, ids(4, 6))
        kept.append(saved_bytes(run, model, ids(4, 6)))
    assert kept[0] > kept[1] > kept[2] > 0


@pytest.mark.parametrize("method", ["galore", "q-galore"])
def test_the_step_that_finds_a_projection_is_one_graph_too(method):
    def trained(compile: bool) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model: Any = nn.Sequential(nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, 13)).double()
        lrcompile.apply(model, lrcompile.spec(method, rank=2, targets=["0", "2"], update_proj_gap=2, seed=5))
        optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.05)
        run = compiled(model, fullgraph=True) if compile else model
        for at in range(4):
            x = torch.randn(6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(at))
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
        assert not compile or graphs(model) == 2  # P is found, P is used
        return model.state_dict()

    eager = trained(compile=False)
    for name, tensor in trained(compile=True).items():
        torch.testing.assert_close(tensor, eager[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"memory_budget": 0.0}, "memory_budget"),
        ({"memory_budget": 1.5}, "memory_budget"),
        ({"memory_budget": "half"}, "memory_budget"),
        ({"memory_budget": float("nan")}, "memory_budget"),
        ({"max_rank": 0}, "max_rank"),
        ({"max_rank": 2.0}, "max_rank"),
        ({"max_rank": True}, "max_rank"),
        ({"regions": "layers"}, "regions"),
        ({"regions": "blocks"}, "regions"),  # a model without any
    ],
)
def test_an_option_out_of_range_is_refused_by_name(options, field):
    with pytest.raises(SpecError) as error:
        lrcompile.compile(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), **options)
    assert error.value.field == field


def test_a_maximum_rank_is_for_models_with_adapters():
    with pytest.raises(AdapterError, match="has no adapter"):
        lrcompile.compile(Net(), max_rank=4)


def test_a_model_without_adapters_is_compiled_as_it_is():
    model = Net().double()
    agree(compiled(model), model, ids(2, 5))


def test_torchs_own_settings_are_as_before_outside_the_model():
    def settings() -> tuple[Any, ...]:
        symbols: Any = torch.fx.experimental._config
        compiler, tracing = torch.compiler.config, torch._dynamo.config
        return (
            compiler.dynamic_sources, compiler.unbacked_sources, tracing.recompile_limit, tracing.specialize_float,
            symbols.use_duck_shape, torch._functorch.config.activation_memory_budget,
        )  # fmt: skip

    before, model = settings(), adapted()
    step(compiled(model, max_rank=4, memory_budget=0.5), model, ids(2, 5))
    assert settings() == before


def test_what_reads_or_switches_a_model_takes_the_compiled_one(tmp_path):
    model = adapted(a=3, b=3)
    run, base = compiled(model), lrcompile.remove(copy.deepcopy(model))
    assert lrcompile.activate(run, "b", train="b") is run
    with lrcompile.disabled(run) as same:
        assert same is run
        torch.testing.assert_close(run(ids(2, 5)), base(ids(2, 5)))
    agree(run, model, ids(2, 5))
    assert lrcompile.report(run) == lrcompile.report(model)
    lrcompile.save(run, tmp_path)
    lrcompile.optimizer(run, torch.optim.SGD, lr=0.1).step()
    with pytest.raises(AdapterError, match=r"torch\.compile"):
        lrcompile.merge(run)


def test_the_report_says_what_became_of_each_graph():
    model = adapted(a=3)
    run = compiled(model)
    assert lrcompile.report(model).compiled == ()
    step(run, model, ids(2, 5))
    (line,) = lrcompile.report(model).compiled
    assert "4 of adapters" in line
    assert "group-by-input: 3" in line  # q and v are one
    assert line in str(lrcompile.report(model))
    assert lrcompile.report(copy.deepcopy(model)).compiled == ()


def test_the_report_says_why_an_adapter_stayed_as_it_is():
    graph = accounts.Graph(7, 2)
    from lrcompile.passes.base import Refusal, Result

    graph.results = [("group-by-input", Result(1, (Refusal("lora_1", "its factors are a stack"),)))]
    expected = (
        "7 operations, 2 of adapters; group-by-input: 1; group-by-input left 1, as its factors are a stack (lora_1)"
    )
    assert str(graph) == expected


@pytest.mark.slow
@pytest.mark.parametrize("regions", [None, "blocks"])
def test_by_inductor_too(regions):
    model = adapted(2, a=3, one=1)
    run = lrcompile.compile(model, max_rank=4, regions=regions)
    agree(run, model, ids(2, 5))
    agree(run, lrcompile.activate(model, "one", train="one"), ids(4, 3))
    assert graphs(model) == (1 if regions is None else 2)
