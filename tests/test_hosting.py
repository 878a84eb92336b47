"""A swapped class is the original in all but its forward, and survives copies, pickles and a fresh process."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.errors import AdapterError
from lrcompile.hosting import Host, host_class, hosted_by, original_class, restore, stack, stacked, swap


class Doubled(Host):
    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)  # type: ignore[misc]


class Shifted(Host):
    def forward(self, *args, **kwargs):
        return 1 + super().forward(*args, **kwargs)  # type: ignore[misc]


class Own(nn.Linear):
    """A user's subclass."""

    def extra(self):
        return "mine"


def test_swap_changes_the_forward_only_and_restore_undoes_it():
    module: Any = Own(3, 2)
    weight, keys, x = module.weight, list(module.state_dict()), torch.randn(4, 3)
    y = module(x)
    swap(module, Doubled)
    assert torch.equal(module(x), 2 * y)
    assert isinstance(module, Own)
    assert module.weight is weight
    assert list(module.state_dict()) == keys
    assert module.extra() == "mine"
    assert type(module).__doc__ == Own.__doc__
    restore(module, Doubled)
    assert type(module) is Own
    assert torch.equal(module(x), y)


def test_one_class_is_generated_once():
    assert host_class(Doubled, nn.Linear) is host_class(Doubled, nn.Linear)


def test_stacked_classes_come_apart_in_order():
    module: Any = nn.Linear(3, 2)
    x, y = torch.ones(1, 3), module(torch.ones(1, 3))
    swap(module, Doubled)
    swap(module, Shifted)
    assert torch.equal(module(x), 1 + 2 * y)
    assert stack(type(module)) == ([Shifted, Doubled], nn.Linear)
    assert stacked([Shifted, Doubled], nn.Linear) is type(module)
    assert original_class(module) is nn.Linear
    assert hosted_by(module, Shifted)
    assert not hosted_by(module, Doubled)
    with pytest.raises(AdapterError, match="something else changed its class"):
        restore(module, Doubled)


@pytest.mark.parametrize("copier", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_class_values_and_hooks(copier):
    module, x = nn.Linear(3, 2), torch.randn(4, 3)
    swap(module, Doubled)
    swap(module, Shifted)
    other = copier(module)
    assert type(other) is type(module)
    assert torch.equal(other(x), module(x))


def test_hooks_registered_before_and_after_run():
    module, calls = nn.Linear(3, 2), []
    module.register_forward_hook(lambda *_: calls.append("before"))
    swap(module, Doubled)
    module.register_forward_pre_hook(lambda *_: calls.append("pre"))
    module(torch.ones(1, 3))
    restore(module, Doubled)
    module(torch.ones(1, 3))
    assert calls == ["pre", "before"] * 2


def test_a_forward_replaced_on_the_instance_is_refused():
    module: Any = nn.Linear(3, 2)
    module.forward = lambda x: x
    with pytest.raises(AdapterError, match="replaced on the instance"):
        swap(module, Doubled)
    assert type(module) is nn.Linear


def test_an_adapted_model_loads_in_a_fresh_process(tmp_path):
    model: Any = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Embedding(4, 3))[:2]
    lrcompile.apply(model, lrcompile.spec("lora", rank=2))
    nn.init.normal_(model[0].lrcompile_adapters["weight"]["default"].B)
    x = torch.randn(3, 5)
    torch.save((model, x, model(x).detach()), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, x, y = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(model(x), y)\n"
        "import lrcompile\n"
        "lrcompile.merge(model, final=True)\n"
        "assert type(model[0]) is torch.nn.Linear and torch.allclose(model(x), y, atol=1e-6)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
