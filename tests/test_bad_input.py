"""What a user can get wrong before, around and after `apply`: one typed error that names the thing and the remedy, and
the model exactly as before. (Files have theirs beside what reads them; wrappers in test_wrapping.)
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lrcompile


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(9, 6), nn.Linear(6, 7), nn.Linear(7, 5)
        self.read, self.unused, self.norm = nn.Linear(5, 5), nn.Linear(5, 5), nn.LayerNorm(5)
        self.raw = nn.Parameter(torch.randn(5, 5))
        self.up.register_forward_hook(lambda *_: None)
        self.embed.weight.requires_grad_(False)

    def forward(self, ids):
        x = self.norm(self.down(self.up(self.embed(ids)).relu()))
        return F.linear(x + self.raw.detach().sum(), self.read.weight)


IDS = torch.tensor([[1, 2, 8]])


def applied(**fields) -> Any:
    model: Any = Model().eval()
    lrcompile.apply(model, lrcompile.spec("lora", **{"rank": 2, "targets": ["up", "down"], "seed": 0} | fields))
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(p)
    return model


def merged() -> Any:
    model: Any = applied()
    lrcompile.merge(model)
    return model


def everything(model: Any) -> dict:
    modules = dict(model.named_modules())
    return {
        "bytes": {
            k: v.detach().contiguous().view(torch.uint8).numpy().tobytes() for k, v in model.state_dict().items()
        },
        "objects": {k: id(p) for k, p in model.named_parameters()},
        "classes": {k: type(m) for k, m in modules.items()},
        "trains": {k: p.requires_grad for k, p in model.named_parameters()},
        "modes": {k: m.training for k, m in modules.items()},
        "names": {k: sorted(vars(m)) for k, m in modules.items()},
        "hooks": {k: list(m._forward_hooks.values()) for k, m in modules.items()},
        "output": model(IDS).detach().numpy().tobytes(),
    }


def applying(method="lora", name="default", example_inputs=None, **fields):
    """What must fail: `apply` with these fields."""
    return lambda m: lrcompile.apply(
        m, lrcompile.spec(method, **{"rank": 2} | fields), name=name, example_inputs=example_inputs
    )


SPEC, TARGET, ADAPTER, MERGE = (
    lrcompile.SpecError,
    lrcompile.TargetError,
    lrcompile.AdapterError,
    lrcompile.MergeError,
)
ITEMS = {
    "an unknown method": (Model, applying("lorra"), SPEC, "'lorra'.*'lora'"),
    "an unknown field": (Model, applying(rnak=2), SPEC, "'rnak'.*'rank'"),
    "a value out of range": (Model, applying(dropout=1.5), SPEC, r"dropout.*\[0, 1\)"),
    "a rank above the matrix": (
        Model,
        applying(rank=6, targets=["up", "down"]),
        SPEC,
        "rank=6.*5.*'down'.*rank_pattern",
    ),
    "a target that hits nothing": (Model, applying(targets=["up", "dwn"]), TARGET, "'dwn'.*'down'"),
    "a target that is no weight": (Model, applying(targets=["up", "norm"]), TARGET, "'norm'.*LayerNorm"),
    "a weight that is no linear map": (Model, applying(targets=["up", "raw"]), TARGET, "raw: .*sum.*exclude="),
    "a target no gradient reaches": (
        Model,
        applying(targets=["up", "unused"], example_inputs=(IDS,)),
        TARGET,
        r"unused\.lrcompile_adapters.*Exclude",
    ),
    "a weight read by its parent": (
        Model,
        applying(targets=["up", "read"], example_inputs=(IDS,)),
        TARGET,
        r"read\.lrcompile_adapters.*read by a\s+parent",
    ),
    "the same name twice": (applied, applying(targets=["up"]), ADAPTER, "'default'.*another name="),
    "a name that is no name": (Model, applying(name="a.b"), ADAPTER, r"'a\.b'.*letters"),
    "4 bits for an embedding": (Model, applying("qlora", targets=["up", "embed"]), SPEC, "embed.*exclude"),
    "apply on a merged model": (merged, applying(name="b"), MERGE, r"lrcompile\.unmerge"),
    "merge twice": (merged, lrcompile.merge, MERGE, r"merged already.*lrcompile\.unmerge"),
    "quantize a merged model": (merged, lambda m: lrcompile.quantize(m, "nf4"), MERGE, "final=True.*unmerge"),
    "activate while merged": (merged, lambda m: lrcompile.activate(m, []), MERGE, r"lrcompile\.unmerge"),
    "unmerge what is not merged": (applied, lrcompile.unmerge, MERGE, "not merged"),
    "merge without an adapter": (Model, lrcompile.merge, ADAPTER, r"lrcompile\.apply"),
    "remove an unknown one": (applied, lambda m: lrcompile.remove(m, "x"), ADAPTER, "'x'.*'default'"),
    "activate an unknown one": (applied, lambda m: lrcompile.activate(m, "x"), ADAPTER, "'x'.*'default'"),
    "train an unknown one": (applied, lambda m: lrcompile.activate(m, [], train="x"), ADAPTER, "'x'.*'default'"),
    "into= of a float base": (applied, lambda m: lrcompile.merge(m, into="nf4"), MERGE, "NF4 base.*leave it out"),
    "an optimizer for nothing": (
        Model,
        lambda m: lrcompile.optimizer(m, torch.optim.SGD, lr=1),
        ADAPTER,
        r"lrcompile\.apply",
    ),
}


@pytest.mark.parametrize(("build", "call", "error", "message"), ITEMS.values(), ids=ITEMS)
def test_one_typed_error_names_the_thing_and_the_remedy_and_nothing_changes(build, call, error, message):
    model = build()
    before = everything(model)
    with pytest.raises(error, match=rf"(?s){message}") as caught:
        call(model)
    assert isinstance(caught.value, lrcompile.LrcompileError)
    after = everything(model)
    for what, value in before.items():
        assert after[what] == value, what


def test_a_target_no_gradient_reaches_stops_the_first_step_before_anything_is_updated():
    model: Any = applied(targets=["down", "unused"]).train()
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.1)
    model(IDS).sum().backward()
    before = everything(model)
    with pytest.raises(lrcompile.TargetError, match=r"(?s)unused\.lrcompile_adapters.*Exclude"):
        optimizer.step()
    assert everything(model) == before


def test_a_missing_extra_names_what_installs_it(monkeypatch, tmp_path):
    report = lrcompile.report(applied())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(lrcompile.MissingDependencyError, match=r"'matplotlib'.*pip install 'lrcompile\[demo\]'"):
        report.plot(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def step(model, optimizer):
    optimizer.zero_grad()
    model(IDS).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("moment", ["forward", "backward", "step"])
def test_ctrl_c_during_training_leaves_a_model_that_can_be_removed_and_trained_on(moment):
    model: Any = applied().train()
    weights = {k: v.clone() for k, v in model.state_dict().items() if "lrcompile" not in k}
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.1)

    def stop(*_):
        raise KeyboardInterrupt

    handles = {
        "forward": lambda: model.down.register_forward_hook(stop),
        "backward": lambda: model.down.lrcompile_adapters["weight"]["default"].B.register_hook(stop),
        "step": lambda: optimizer.register_step_pre_hook(stop),
    }
    handle = handles[moment]()
    with pytest.raises(KeyboardInterrupt):
        step(model, optimizer)
    handle.remove()
    step(model, optimizer)
    lrcompile.remove(model)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert set(model.state_dict()) == set(weights)


@pytest.mark.parametrize("after", [0, 1])
def test_ctrl_c_during_merge_leaves_nothing_merged(monkeypatch, after):
    from lrcompile import folding

    model, left, real = applied(), [after], folding.effect
    before = everything(model)

    def stop(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*args)

    monkeypatch.setattr(folding, "effect", stop)
    with pytest.raises(KeyboardInterrupt):
        lrcompile.merge(model)
    assert everything(model) == before


def test_apply_within_inference_mode_is_refused_as_nothing_could_train():
    model = torch.nn.Linear(5, 7)
    with torch.inference_mode(), pytest.raises(lrcompile.AdapterError, match="inference_mode"):
        lrcompile.apply(model, lrcompile.spec("lora", rank=2))
    assert type(model) is torch.nn.Linear
