"""lrcompile.optimizer is a real torch optimizer over what trains."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.errors import AdapterError


def model() -> Any:
    return lrcompile.apply(
        nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)), lrcompile.spec("lora", rank=2, bias="all", seed=0)
    )


def train(m, optimizer, steps=3, scheduler=None):
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        m(torch.randn(4, 6, generator=g, dtype=next(m.parameters()).dtype)).square().mean().backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


def test_it_holds_exactly_what_trains():
    m = model()
    optimizer = lrcompile.optimizer(m, torch.optim.AdamW, lr=1e-2, weight_decay=0.3)
    assert isinstance(optimizer, torch.optim.AdamW)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in m.parameters() if p.requires_grad}
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_it_trains_the_adapter_and_leaves_the_base():
    m = model()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    train(m, lrcompile.optimizer(m, torch.optim.AdamW, lr=1e-2))
    changed = {k for k, v in m.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k, p in m.named_parameters() if p.requires_grad}


def test_its_state_survives_a_checkpoint_loaded_with_weights_only(tmp_path):
    runs = []
    for interrupted in (False, True):
        m = model()
        torch.manual_seed(0)
        with torch.no_grad():
            for name, p in m.named_parameters():
                if "lrcompile" not in name:
                    p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))
        optimizer = lrcompile.optimizer(m, torch.optim.AdamW, lr=1e-2)
        train(m, optimizer, 2)
        if interrupted:
            torch.save(optimizer.state_dict(), tmp_path / "o.pt")
            optimizer = lrcompile.optimizer(m, torch.optim.AdamW, lr=1e-2)
            optimizer.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
        train(m, optimizer, 2)
        runs.append([p.detach().clone() for p in m.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_schedulers_and_closures_work():
    m = model()
    optimizer = lrcompile.optimizer(m, torch.optim.SGD, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(m, optimizer, 2, scheduler)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    lbfgs = lrcompile.optimizer(m, torch.optim.LBFGS, lr=0.1)

    def closure():
        lbfgs.zero_grad()
        loss = m(torch.ones(2, 6)).square().mean()
        loss.backward()
        return loss

    assert lbfgs.step(closure) is not None


def test_any_callable_that_makes_an_optimizer_will_do():
    optimizer = lrcompile.optimizer(model(), functools.partial(torch.optim.AdamW, eps=1e-6), lr=1e-3)
    assert optimizer.param_groups[0]["eps"] == 1e-6


@pytest.mark.parametrize("wrap", [torch.compile, lambda m: nn.ModuleDict({"inner": m})])
def test_the_model_may_be_wrapped_by_now(wrap):
    m = model()
    optimizer = lrcompile.optimizer(wrap(m), torch.optim.SGD, lr=0.1)
    train(m, optimizer, 1)


def test_accelerate_prepares_it():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    m = model()
    prepared, optimizer = accelerator.prepare(m, lrcompile.optimizer(m, torch.optim.AdamW, lr=1e-2))
    before = m[0].lrcompile_adapters["weight"]["default"].B.detach().clone()
    optimizer.zero_grad()
    accelerator.backward(prepared(torch.randn(4, 6)).square().mean())
    optimizer.step()
    assert not torch.equal(m[0].lrcompile_adapters["weight"]["default"].B, before)


def test_a_model_without_adapters_is_refused():
    with pytest.raises(lrcompile.AdapterError, match=r"lrcompile\.apply"):
        lrcompile.optimizer(nn.Linear(2, 2), torch.optim.SGD, lr=0.1)


def test_a_model_in_which_nothing_trains_is_refused():
    m: Any = nn.Sequential(nn.Linear(6, 7))
    lrcompile.apply(m, lrcompile.spec("lora", rank=2))
    lrcompile.activate(m, "default", train=[])
    with pytest.raises(lrcompile.AdapterError, match="train=name"):
        lrcompile.optimizer(m, torch.optim.SGD, lr=0.1)


def test_something_else_than_a_model_or_an_optimizer_class_is_an_adapter_error():
    with pytest.raises(AdapterError, match="got NoneType"):
        lrcompile.optimizer(None, torch.optim.SGD, 0.1)  # type: ignore[arg-type]
    model = lrcompile.apply(nn.Linear(5, 4), lrcompile.spec("lora", rank=2))
    with pytest.raises(AdapterError, match="optimizer class such as"):
        lrcompile.optimizer(model, "adam", 0.1)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="expected a torch"):
        lrcompile.report(None)  # type: ignore[arg-type]


POLICIES = [
    ("lora+", torch.optim.AdamW),
    ("lora-fa", torch.optim.AdamW),
    ("lora-pro", torch.optim.AdamW),
    ("lora-rite", lrcompile.LoraRite),
]


@pytest.mark.parametrize(("method", "cls"), POLICIES, ids=[method for method, _ in POLICIES])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_each_policy_trains_a_compiled_model_as_it_does_an_eager_one(method, cls, dropout):
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        m: Any = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()
        lrcompile.apply(m, lrcompile.spec(method, rank=2, seed=0, dropout=dropout))
        before = [p.detach().clone() for p in m.parameters() if p.requires_grad]
        run: Any = torch.compile(m, backend="aot_eager", fullgraph=True) if compiled else m
        train(run, lrcompile.optimizer(run, cls, lr=1e-2), 5)
        ends.append([p.detach().clone() for p in m.parameters() if p.requires_grad])
        moved = [bool((end != start).any()) for end, start in zip(ends[-1], before, strict=True)]
        assert all(moved)
    if not dropout:
        for eager, captured in zip(*ends, strict=True):
            torch.testing.assert_close(captured, eager, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("method", "cls"), POLICIES[1:], ids=[method for method, _ in POLICIES[1:]])
def test_a_policy_on_whole_factors_refuses_sharded_ones(method, cls, tmp_path):
    distributed: Any = torch.distributed
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        m: Any = lrcompile.apply(nn.Sequential(nn.Linear(6, 7)), lrcompile.spec(method, rank=2, seed=0))
        distributed.fsdp.fully_shard(m, mesh=distributed.device_mesh.init_device_mesh("cpu", (1,)))
        with pytest.raises(AdapterError, match="sharded"):
            train(m, lrcompile.optimizer(m, cls, lr=1e-2), 1)
    finally:
        distributed.destroy_process_group()
