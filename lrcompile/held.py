"""What a weight or a bias holds, as something that can be taken out and put back: how a merge is undone, and how it is
hidden for a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lrcompile.int8.modules import hand_back, hand_over, is_int8
from lrcompile.kernels.nf4_dequant import Nf4
from lrcompile.nf4.modules import Layout, attach, codes_of, detach, is_nf4, layout_of


@dataclass
class Held:
    """The content of one parameter: a float tensor, NF4 codes and their layout, or what an adapter holds in INT8."""

    data: Tensor | None = None
    codes: tuple[Nf4, Layout] | None = None
    by_adapter: bool = False


@dataclass
class Fold:
    """A parameter that holds a merged update: what it held before, and the name of the one it was one with."""

    base: Held
    tied_to: str | None = None
    shared: nn.Parameter | None = None
    """The parameter itself, where other modules hold it too: this use was given one of its own."""
    bias: Fold | None = None
    """The same of the bias beside a weight, where an adapter changes it too."""


def put(host: nn.Module, slot: str, new: Held, others: Sequence[str]) -> Fold:
    """Put `new` in the place of a parameter's content; where `others` hold the parameter too, give this use its own."""
    if not others:
        return Fold(on_host(exchange(host, slot, new)))
    shared = host._parameters[slot]
    assert shared is not None
    assert new.data is not None
    host._parameters[slot] = nn.Parameter(new.data, requires_grad=shared.requires_grad)
    return Fold(Held(data=shared.data), others[0], shared)


def take_back(host: nn.Module, slot: str, fold: Fold) -> None:
    """Undo `put`."""
    own = host._parameters.get(slot)
    if fold.shared is None:
        exchange(host, slot, fold.base)
    else:
        assert own is not None
        fold.shared.data = fold.shared.data.to(own)
        host._parameters[slot] = fold.shared


def exchange(host: nn.Module, slot: str, new: Held) -> Held:
    """Put `new` in the place of a parameter's content, which is returned; parameter objects keep their identity."""
    if slot == "weight" and is_nf4(host):
        codes = codes_of(host).codes
        device = codes.device
        old = Held(codes=(codes_of(host), layout_of(host)))
        data = new.data if new.data is not None else codes.new_empty(0)
        detach(host, nn.Parameter(data.to(device), requires_grad=False))
    elif slot == "weight" and is_int8(host):
        old, device = Held(by_adapter=True), torch.device("cpu")
        assert new.data is not None
        hand_back(host, nn.Parameter(new.data, requires_grad=False))
    else:
        parameter = host._parameters[slot]
        assert parameter is not None
        device = parameter.device
        old = Held(data=parameter.data)
        if new.data is not None:
            parameter.data = new.data.to(parameter)  # the model may have been cast or moved since
    if new.codes is not None:
        nf4, layout = new.codes
        attach(host, _moved(nf4, device), layout if old.data is None else replace(layout, dtype=old.data.dtype))
    if new.by_adapter:
        hand_over(host)
    return old


def on_host(held: Held) -> Held:
    """The same content in host memory, so that a kept copy costs no device memory."""
    if held.data is not None:
        return Held(data=held.data.detach().cpu())
    if held.by_adapter:
        return held
    assert held.codes is not None
    nf4, layout = held.codes
    return Held(codes=(_moved(nf4, torch.device("cpu")), layout))


def _moved(nf4: Nf4, device: torch.device) -> Nf4:
    double = (None if tensor is None else tensor.to(device) for tensor in nf4[2:])
    return Nf4(nf4.codes.to(device), nf4.absmax.to(device), *double)
