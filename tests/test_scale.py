"""What each operation does grows in proportion to the number of sites: counted in lines of Python run, so exactly.

Of a cost a + b·n, the second difference over equal steps of n is 0; of one with a loop over pairs of sites it is not.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.planning import plan

SIZES = (2, 4, 6)
"""Layers, 7 sites each."""
SHARE = 2e-3
"""Of what a step in size adds, by which it may differ: less than one line for ten pairs of sites."""

Counted = Iterator[tuple[str, Callable[[], object]]]


def lines(operation: Callable[[], object]) -> int:
    count = 0

    def trace(*_: object) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return trace

    gc.disable()  # a collection between would run finalizers of what is not ours
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        operation()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def llama(layers: int) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return transformers.LlamaForCausalLM(config)


def named(model: nn.Module, kind: type[nn.Module] = nn.Linear) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind) and name != "lm_head"]


def filled(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lrcompile_adapters" in name:
            nn.init.normal_(parameter, std=0.02)


def switched_off(model: nn.Module) -> None:
    with lrcompile.disabled(model):
        pass


def life(model: nn.Module, spec: lrcompile.Spec, folder: Path) -> Counted:
    """Each operation on a model with one adapter, in an order in which each is possible."""
    yield "plan", lambda: plan(model, spec)
    yield "apply", lambda: lrcompile.apply(model, spec)
    filled(model)
    yield "report", lambda: lrcompile.report(model)
    yield "print", lambda: str(lrcompile.report(model))
    yield "save", lambda: lrcompile.save(model, folder)
    yield "remove", lambda: lrcompile.remove(model)
    yield "load", lambda: lrcompile.load(model, folder)


def defaults(layers: int, folder: Path) -> Counted:
    model, spec = llama(layers), lrcompile.spec("lora", rank=2)
    yield from life(model, spec, folder / "a")
    yield "activate", lambda: lrcompile.activate(model, {"default": 0.5}, train="default")
    yield "disabled", lambda: switched_off(model)
    yield "merge", lambda: lrcompile.merge(model)
    yield "unmerge", lambda: lrcompile.unmerge(model)
    yield "optimizer", lambda: lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-3)
    yield "apply another", lambda: lrcompile.apply(model, spec, name="another")
    filled(model)
    yield "activate both", lambda: lrcompile.activate(model, ["default", "another"])
    yield "save both", lambda: lrcompile.save(model, folder / "both")
    yield "load over one", lambda: lrcompile.load(model, folder / "a", "another", replace=True)
    yield "remove one", lambda: lrcompile.remove(model, "another")
    lrcompile.activate(model, "default")
    yield "merge for good", lambda: lrcompile.merge(model, final=True)


def sites_by_name(layers: int, folder: Path) -> Counted:
    model = llama(layers)
    yield from life(model, lrcompile.spec("lora", rank=2, targets=named(model)), folder)


def exclusions_by_name(layers: int, folder: Path) -> Counted:
    model = llama(layers)
    yield from life(model, lrcompile.spec("lora", rank=2, exclude=named(model)[:-3]), folder)


def patterns_by_name(layers: int, folder: Path) -> Counted:
    model = llama(layers)
    pattern = dict.fromkeys(named(model), 3)
    yield from life(model, lrcompile.spec("lora", rank=2, rank_pattern=pattern, alpha_pattern=pattern), folder)
    lrcompile.remove(model)
    (folder / "lrcompile.json").unlink()
    yield "load from PEFT's config", lambda: lrcompile.load(model, folder)


def modules_trained_by_name(layers: int, folder: Path) -> Counted:
    model = llama(layers)
    norms = [name for name in named(model, nn.Module) if name.endswith("layernorm")]
    yield from life(model, lrcompile.spec("lora", rank=2, train_modules=norms), folder)


def biases(layers: int, folder: Path) -> Counted:
    model = llama(layers)
    for name in named(model):
        model.get_submodule(name).bias = nn.Parameter(torch.zeros(model.get_submodule(name).out_features))
    yield from life(model, lrcompile.spec("bitfit"), folder)


def folders_of_peft(layers: int, folder: Path) -> Counted:
    peft = pytest.importorskip("peft")
    model = llama(layers)
    config = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["norm"])
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(folder)
    written = json.loads((folder / "adapter_config.json").read_text())
    for targets in ("all-linear", named(model)):  # PEFT itself writes one or the other, by their number
        (folder / "adapter_config.json").write_text(json.dumps(written | {"target_modules": targets}))
        yield "load all" if targets == "all-linear" else "load by name", lambda: lrcompile.load(model, folder)
        lrcompile.remove(model)


def other_forms(layers: int, folder: Path) -> Counted:
    model = llama(layers)
    fields: dict[str, dict[str, Any]] = {
        "dora": {"rank": 2},
        "vera": {"rank": 2},
        "ia3": {},
        "adalora": {"rank": 2, "target_rank": 1, "total_steps": 9},
        "qlora": {"rank": 2},
    }
    for method, given in fields.items():
        for name, operation in life(model, lrcompile.spec(method, **given), folder / method):
            yield f"{name} {method}", operation
        lrcompile.remove(model)


def encoders(layers: int, folder: Path) -> Counted:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    yield from life(model, lrcompile.spec("lora", rank=2), folder)
    lrcompile.remove(model)
    (folder / "lrcompile.json").unlink()
    yield "load from PEFT's config", lambda: lrcompile.load(model, folder)


def captured_graphs(layers: int, folder: Path) -> Counted:
    stack = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4 * layers)))
    model = torch.export.export(stack, (torch.randn(2, 4),)).module()
    yield from life(model, lrcompile.spec("lora", rank=2), folder)
    yield "merge", lambda: lrcompile.merge(model)


class Opaque(nn.MultiheadAttention):
    """Its own forward may read weights past their modules, so what is below it is refused."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def refusals_and_ties(layers: int, folder: Path) -> Counted:
    model = nn.Module()
    model.opaque = nn.ModuleList(Opaque(4, 1) for _ in range(layers))
    pairs = [(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(layers)]
    for one, other in pairs:
        other.weight = one.weight
    model.tied = nn.ModuleList(each for pair in pairs for each in pair)
    yield from life(model, lrcompile.spec("lora", rank=2), folder)
    yield "merge", lambda: lrcompile.merge(model)


SCENES: list[Callable[[int, Path], Counted]] = [
    defaults, sites_by_name, exclusions_by_name, patterns_by_name, modules_trained_by_name, biases, folders_of_peft,
    other_forms, encoders, captured_graphs, refusals_and_ties,
]  # fmt: skip


def uneven(scene: Callable[[int, Path], Counted], folder: Path) -> dict[str, tuple[int, int]]:
    """Lines that the second and the third size add to the one before, where these differ."""
    small, middle, large = (
        {name: lines(operation) for name, operation in scene(layers, folder / str(layers))} for layers in SIZES
    )
    steps = {name: (middle[name] - small[name], large[name] - middle[name]) for name in small}
    assert all(first > 0 for first, _ in steps.values())
    return {name: step for name, step in steps.items() if abs(step[1] - step[0]) > SHARE * step[0]}


@pytest.mark.parametrize("scene", SCENES, ids=[scene.__name__ for scene in SCENES])
def test_twice_the_sites_take_twice_the_work_and_no_more(scene, tmp_path):
    for _, operation in scene(1, tmp_path / "first"):
        operation()  # what is done once only
    found = uneven(scene, tmp_path)
    if found:  # what a process does once, a cache that is filled, falls into one count and not into the next
        again = uneven(scene, tmp_path / "again")
        found = {name: step for name, step in found.items() if name in again}
    assert not found
