"""Parents that read a child's weights by attribute, past the child's forward: the class each is given so that it does
not.

`nn.TransformerEncoderLayer` runs one fused kernel on raw weights in evaluation (even with gradients on), and
`nn.TransformerEncoder` feeds its layers nested tensors made for that kernel. `nn.MultiheadAttention` reads
`out_proj.weight` (see `attention`).
"""

from __future__ import annotations

from torch import nn

from lrcompile.hosting import Host
from lrcompile.sites import attention


def _pinned(value: bool) -> property:
    """An attribute that reads as `value` while the class is swapped; what the instance holds underneath stays as it
    was.
    """

    def ignore(self: nn.Module, new: object) -> None:
        raise AttributeError("cannot be set while an adapter is attached below this module")

    return property(lambda self: value, ignore)


class UnfusedEncoderLayer(Host):
    """`nn.TransformerEncoderLayer` on its ordinary path; the fused kernel never sees adapters."""

    activation_relu_or_gelu = _pinned(False)


class UnfusedEncoder(Host):
    """`nn.TransformerEncoder` that never converts to nested tensors."""

    use_nested_tensor = _pinned(False)


def mixin_for(module: nn.Module) -> type[Host] | None:
    """The class an ancestor (or the host itself) needs while an adapter acts below it."""
    if isinstance(module, nn.TransformerEncoderLayer):
        return UnfusedEncoderLayer
    if isinstance(module, nn.TransformerEncoder):
        return UnfusedEncoder
    if isinstance(module, nn.MultiheadAttention):
        return attention.HOST
    return None
