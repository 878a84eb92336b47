"""An `fx.GraphModule` (symbolically traced, or the module of an exported program): its own nodes are the sites."""

from __future__ import annotations

from torch import fx, nn

from lrcompile.adapters import ADAPTERS, AdapterSlots
from lrcompile.sites.parameter import slot_of
from lrcompile.sites.site import Slot
from lrcompile.sites.weight_uses import reads_of
from lrcompile.walking import submodule

NAME = "graph"
HOST = None
_CAPTURED = "its module holds an adapter captured with the graph; apply to the model before capturing it"


def slots(module: nn.Module) -> list[Slot] | None:
    if not isinstance(module, fx.GraphModule):
        return None
    found = []
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, reads in reads_of(module.graph).items():
        if name in parameters and parameters[name].dim() >= 2 and ADAPTERS not in name.split("."):
            holder = submodule(module, name.rpartition(".")[0])._modules.get(ADAPTERS)
            captured = holder is not None and not isinstance(holder, AdapterSlots)
            found.append(Slot(name, refusal=_CAPTURED) if captured else slot_of(reads, name, parameters[name]))
    return found


def called(module: nn.Module) -> set[str]:
    """The submodules that the graph calls: they are sites of their own kinds."""
    assert isinstance(module, fx.GraphModule)
    return {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
