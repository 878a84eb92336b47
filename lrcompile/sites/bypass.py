"""Parents that read a child's weights by attribute, past the child's forward: the class each is given so that it does
not.

`nn.TransformerEncoderLayer` runs one fused kernel on raw weights in evaluation (even with gradients on), and
`nn.TransformerEncoder` feeds its layers nested tensors made for that kernel. `nn.MultiheadAttention` reads
`out_proj.weight` (see `attention`).
"""

from __future__ import annotations

from torch import nn

from lrcompile.adapters import AdapterSet
from lrcompile.hosting import Host, original_class
from lrcompile.sites import attention
from lrcompile.sites.linear import keeps_forward


def _off_while_adapted(name: str) -> property:
    """An attribute that reads as False while an adapter acts below; what the instance holds underneath stays as it
    was.
    """

    def read(self: nn.Module) -> object:
        return self.__dict__[name] if not acts_below(self) else False

    def write(self: nn.Module, value: object) -> None:
        self.__dict__[name] = value

    return property(read, write)


def acts_below(module: nn.Module) -> bool:
    """Does any adapter under `module` act beside its weight now?"""
    return any(each.live for each in module.modules() if isinstance(each, AdapterSet))


class UnfusedEncoderLayer(Host):
    """`nn.TransformerEncoderLayer` on its ordinary path; the fused kernel never sees adapters."""

    activation_relu_or_gelu = _off_while_adapted("activation_relu_or_gelu")


class UnfusedEncoder(Host):
    """`nn.TransformerEncoder` that never converts to nested tensors."""

    use_nested_tensor = _off_while_adapted("use_nested_tensor")


def refusal_below(module: nn.Module) -> str | None:
    """Why no adapter below `module` can be trusted to act: its own forward may read their weights by attribute."""
    if isinstance(module, nn.MultiheadAttention) and not keeps_forward(module, nn.MultiheadAttention):
        return f"it lies in a {original_class(module).__name__}, whose own forward may read the weight past adapters"
    return None


def mixin_for(module: nn.Module) -> type[Host] | None:
    """The class an ancestor (or the host itself) needs while an adapter acts below it."""
    if isinstance(module, nn.TransformerEncoderLayer):
        return UnfusedEncoderLayer
    if isinstance(module, nn.TransformerEncoder):
        return UnfusedEncoder
    if isinstance(module, nn.MultiheadAttention):
        return attention.HOST
    return None
