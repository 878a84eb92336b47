"""What a weight holds, as something that can be taken out and put back: how a merge is undone, and how it is hidden
for a while.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from lrcompile.kernels.nf4_linear import Nf4
from lrcompile.nf4_modules import Layout, attach, codes_of, detach, is_nf4, layout_of


@dataclass
class Held:
    """The content of one weight: a float tensor, or NF4 codes and their layout."""

    data: Tensor | None = None
    codes: tuple[Nf4, Layout] | None = None


@dataclass
class Fold:
    """A weight that holds a merged update: what it held before, and the name of the parameter it was one with."""

    base: Held
    tied_to: str | None = None
    shared: nn.Parameter | None = None
    """The parameter itself, where other modules hold it too: this use was given one of its own."""


def exchange(host: nn.Module, slot: str, new: Held) -> Held:
    """Put `new` in the place of the weight's content, which is returned; parameter objects keep their identity."""
    if is_nf4(host):
        device = host.weight_codes.device  # type: ignore[union-attr]
        old = Held(codes=(codes_of(host), layout_of(host)))
        data = new.data if new.data is not None else host.weight_codes.new_empty(0)  # type: ignore[operator,union-attr]
        detach(host, nn.Parameter(data.to(device), requires_grad=False))  # type: ignore[arg-type]
    else:
        parameter = host._parameters[slot]
        assert parameter is not None
        device = parameter.device
        old = Held(data=parameter.data)
        if new.data is not None:
            parameter.data = new.data.to(parameter)  # the model may have been cast or moved since
    if new.codes is not None:
        codes, layout = new.codes
        if isinstance(old.data, Tensor):
            layout = replace(layout, dtype=old.data.dtype)
        attach(host, Nf4(*(tensor if tensor is None else tensor.to(device) for tensor in codes)), layout)
    return old


def on_host(held: Held) -> Held:
    """The same content in host memory, so that a kept copy costs no device memory."""
    if held.data is not None:
        return Held(data=held.data.detach().cpu())
    assert held.codes is not None
    codes, layout = held.codes
    return Held(codes=(Nf4(*(tensor if tensor is None else tensor.cpu() for tensor in codes)), layout))
